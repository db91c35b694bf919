"""Observe the blocks of a model in forward passes: what each was given and gave, and what runs behind the last."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rlkd.data.examples import PADDING_MASK
from rlkd.errors import UserError
from rlkd.models.real.hooks import forward, logits_of, tensor_at, width_of

Call = tuple[Tensor | None, list[Tensor], Any]  # first argument, the other tensors, output


@dataclass(frozen=True)
class ObservedBlock:
    """Observation of a block in one forward pass, and in a second one with one row and one position fewer."""

    hidden: Tensor | None  # first tensor of its output; None where its first size is not the batch
    num_calls: int
    enters_as_left: bool  # its first argument is the output of the block before
    follows_rows: bool  # every other tensor that it is given has the batch, or one, as first size
    gives_tensor: bool  # its output is one tensor


def observe_blocks(
    model: nn.Module, blocks: Sequence[str], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, ObservedBlock], list[str]]:
    """Logits of a pass, with their graph, what the pass showed of every block, and what ran behind the last one."""
    was_training = model.training
    model.eval()
    try:
        with _calls(model, blocks) as first, _order(model, blocks) as order:
            logits = logits_of(forward(model, inputs))
        with _calls(model, blocks) as second, torch.no_grad():
            other = _other_pass(model, inputs, second)
    finally:
        model.train(was_training)
    sizes = (len(next(iter(inputs.values()))), other)
    observed: dict[str, ObservedBlock] = {}
    before: Tensor | None = None
    for block in blocks:
        calls, others = first[block], second[block]
        hidden = _hidden(calls, others, sizes) if calls and others else None
        entered = calls[0][0] if calls else None
        observed[block] = ObservedBlock(
            hidden,
            len(calls),
            before is not None and entered is not None and torch.equal(entered, before),
            bool(calls) and bool(others) and _follow_rows(calls[0][1], others[0][1], sizes),
            bool(calls) and isinstance(calls[0][2], Tensor),
        )
        before = hidden
    last = max((number for number, path in enumerate(order) if path is None), default=len(order))
    early = set(order[:last])
    after = dict.fromkeys(path for path in order[last:] if path is not None and path not in early)
    return logits, observed, list(after)


@contextmanager
def _calls(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of every block within the `with` block, in their order."""
    calls: dict[str, list[Call]] = {block: [] for block in blocks}
    handles = []
    for block in blocks:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, block: str = block) -> None:
            leaves = tree_leaves((args, kwargs))
            first = leaves[0] if leaves and isinstance(leaves[0], Tensor) else None
            calls[block].append((first, [leaf for leaf in leaves[1:] if isinstance(leaf, Tensor)], output))

        handles.append(model.get_submodule(block).register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _order(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[str | None]]:
    """Yield a list that passes fill: paths of modules with weights of their own as they begin, None as a block ends."""
    order: list[str | None] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    handles += [model.get_submodule(path).register_forward_hook(lambda *_: order.append(None)) for path in blocks]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _other_pass(model: nn.Module, inputs: Mapping[str, Tensor], calls: dict[str, list[Call]]) -> int:
    """Run another number of rows and, where the model takes it, one position of a text fewer; gives that number."""
    size = len(next(iter(inputs.values())))
    index = torch.arange(size - 1) if size > 1 else torch.zeros(2, dtype=torch.int64)
    rows = {name: values[index] for name, values in inputs.items()}
    mask = rows.get(PADDING_MASK)
    length = 0 if mask is None else mask.shape[1]
    shorter = {k: v[:, :-1] if v.ndim > 1 and v.shape[1] == length else v for k, v in rows.items()}
    try:
        forward(model, shorter)
    except Exception:  # a model that takes whole texts alone: what the blocks showed before it failed does not count
        for seen in calls.values():
            seen.clear()
        forward(model, rows)
    return len(index)


def _hidden(calls: Sequence[Call], others: Sequence[Call], sizes: tuple[int, int]) -> Tensor | None:
    """Return the last call's output, [B, L, D], [B, C, H, W] or [B, D], of the batch's size and the model's width."""
    try:
        hidden, smaller = (tensor_at(given[-1][2], 0, "") for given in (calls, others))
    except UserError:
        return None
    fits = (hidden.shape[0], smaller.shape[0]) == sizes and 2 <= hidden.ndim <= 4
    return hidden if fits and hidden.ndim == smaller.ndim and width_of(hidden) == width_of(smaller) else None


@torch.no_grad()
def bears_fewer_rows(model: nn.Module, last: str, inputs: Mapping[str, Tensor], logits: Tensor) -> bool:
    """Whether the model answers the rest rightly when one row is taken away ahead of its last block."""
    size = len(logits)

    def drop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(lambda v: v[:-1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v, (args, kwargs))

    was_training = model.training
    handle = model.get_submodule(last).register_forward_pre_hook(drop, with_kwargs=True)
    try:
        fewer = logits_of(forward(model.eval(), inputs))
    except Exception:  # what follows needs every row, whatever it raises
        return False
    finally:
        handle.remove()
        model.train(was_training)
    return size > 1 and fewer.shape[0] == size - 1 and torch.allclose(fewer, logits[:-1], rtol=1e-4, atol=1e-5)


def _follow_rows(tensors: Sequence[Tensor], others: Sequence[Tensor], sizes: tuple[int, int]) -> bool:
    """Whether each has the batch as first size, or one."""
    if len(tensors) != len(others):
        return False
    pairs = zip(tensors, others, strict=True)
    return all(a.ndim > 0 and (a.shape[0], b.shape[0]) in (sizes, (1, 1)) for a, b in pairs)
