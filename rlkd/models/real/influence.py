"""Which blocks of a model matter most: those that change most what flows through it.

The influence of a block is one minus the mean cosine between what enters and what leaves it (ShortGPT, Men et al. 2024,
https://arxiv.org/abs/2403.03853). Unlike in the paper, it is measured anew after each removal: without its neighbour, a
block of little influence may have much.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlkd.data.examples import PADDING_MASK
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.hooks import forward


def influential_blocks(model: nn.Module, inputs: Mapping[str, Tensor], count: int) -> list[int] | None:
    """Return the blocks (from 0) that are left when the one of least influence is taken away again and again.

    Args:
        model: a teacher; unchanged afterwards.
        inputs: a batch of training samples.
        count: of the blocks that are left, at least 1.

    Returns:
        Rising numbers, or None where blocks are not one list, or one gives another size than it takes or runs more
        than once.
    """
    paths = block_paths(model)
    if len({path.rpartition(".")[0] for path in paths}) != 1:
        return None
    removed = removal_order(model, inputs, paths, len(paths) - count)
    return None if removed is None else sorted(set(range(len(paths))) - set(removed))


def removal_order(
    model: nn.Module, inputs: Mapping[str, Tensor], paths: Sequence[str], count: int, *, stays: int | None = None
) -> list[int] | None:
    """Return the first `count` blocks (from 0) to go, when the one of least influence is taken away again and again.

    Args:
        model: unchanged afterwards.
        inputs: a batch of training samples.
        paths: of its blocks.
        count: below the number of blocks.
        stays: a block (from 0) that is never taken away.

    Returns:
        Blocks in the order in which they go, or None where one gives another size than it takes or runs more than once.
    """
    left, removed = list(range(len(paths))), list[int]()
    was_training = model.training
    model.eval()
    try:
        while len(removed) < count:
            found = _influences(model, inputs, paths, left)
            if found is None:
                return None
            influence = dict(zip(left, found, strict=True))
            removed.append(min((n for n in left if n != stays), key=lambda n: influence[n]))
            left.remove(removed[-1])
    finally:
        model.train(was_training)
    return removed


@torch.no_grad()
def _influences(
    model: nn.Module, inputs: Mapping[str, Tensor], paths: Sequence[str], left: Sequence[int]
) -> list[float] | None:
    """Return the influence of each block that is `left`, in one pass in which the other ones are identities."""
    found: dict[int, list[float | None]] = {number: [] for number in left}

    def hook_of(number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            leaving = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if number not in found:
                return handed_on(args, kwargs, output)
            entering = _of_same_shape((args, kwargs), leaving)
            if entering is None or leaving is None:
                found[number].append(None)
            else:
                found[number].append(_influence(entering, leaving, inputs.get(PADDING_MASK)))
            return output

        return hook

    blocks = [model.get_submodule(path) for path in paths]
    handles = [block.register_forward_hook(hook_of(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    values = [seen[0] for seen in found.values() if len(seen) == 1 and seen[0] is not None]
    return values if len(values) == len(left) else None


def handed_on(args: Any, kwargs: Any, output: Any) -> Any:
    """Return the output of a block that is skipped: what entered it, in the place of what it made of that.

    Args:
        args: of the call.
        kwargs: of the call.
        output: of the block; further items of a tuple stay.

    Raises:
        RuntimeError: no tensor that entered is shaped as what leaves.
    """
    entering = _of_same_shape((args, kwargs), next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None))
    if entering is None:
        raise RuntimeError("a block gives another size than it takes; it cannot be skipped")
    return (entering, *output[1:]) if isinstance(output, tuple) else entering


def _of_same_shape(arguments: Any, leaving: Tensor | None) -> Tensor | None:
    """Return what entered a block: the first of its arguments that is shaped as what leaves it."""
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return next((t for t in tensors if leaving is not None and t.shape == leaving.shape), None)


def _influence(entering: Tensor, leaving: Tensor, mask: Tensor | None) -> float:
    """Return one minus the mean cosine of [B, L, D] without padding, [B, D] or, over channels, [B, C, H, W]."""
    cosine = F.cosine_similarity(entering.float(), leaving.float(), dim=1 if leaving.ndim == 4 else -1)
    if mask is not None and mask.shape == cosine.shape:
        cosine = cosine[mask.bool().to(cosine.device)]
    return 1.0 - float(cosine.mean())
