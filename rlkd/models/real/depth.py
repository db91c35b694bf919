"""In which order the blocks of a real student are skipped, where its depth is what the control of units changes.

Skipping whole blocks is what makes small batches faster: thinner blocks run as many operations as whole ones.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.block_calls import ObservedBlock
from rlkd.models.real.blocks import Group
from rlkd.models.real.influence import removal_order


def block_order(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    seen: Mapping[str, ObservedBlock],
    *,
    widths: Sequence[int],
    groups: Sequence[Group],
    stays: int | None,
) -> tuple[int, ...]:
    """Return all blocks (from 1), that of least influence last: blocks are skipped from the end of this order.

    Args:
        model: an untouched student.
        inputs: training samples that the influence is measured on.
        seen: an observation of every block by its path, in their order.
        widths: of every block's output.
        groups: units of the blocks.
        stays: the block (from 1) that is never skipped; by default the one of most influence.

    Raises:
        UserError: the blocks cannot be skipped; says why.
    """
    reason = _why_not(seen, widths, groups)
    paths, first = list(seen), None if stays is None else stays - 1
    removed = None if reason else removal_order(model, inputs, paths, len(paths) - 1, stays=first)
    if removed is None:
        reason = reason or "a block gives another size than it takes"
        raise UserError(f"attach.units: got depth; allowed: width, because {reason}")
    (last,) = set(range(len(paths))) - set(removed)
    return tuple(number + 1 for number in (last, *reversed(removed)))


def _why_not(seen: Mapping[str, ObservedBlock], widths: Sequence[int], groups: Sequence[Group]) -> str:
    """Say why blocks cannot be skipped, as far as one pass shows it, or ""."""
    blocks, paths = list(seen.values()), list(seen)
    if any(block.num_calls != 1 for block in blocks):
        return "its blocks do not run once each, as modules, in one pass"
    if not all(block.gives_tensor for block in blocks):
        return "its blocks do not give one tensor each"
    if not all(block.enters_as_left for block in blocks[1:]):
        return "its blocks do not hand on what they give from one to the next"
    if len(set(widths)) > 1 or 0 in widths:
        return f"its blocks have the widths {sorted(set(widths))}"
    for group in groups:
        inside = f"{paths[group.block]}."
        layers = (group.reader, *group.writers, *group.norms, *group.shared)
        if not all(layer.startswith(inside) for layer in layers):
            return f"units of block {group.block + 1} are read outside of it"
    lacking = set(range(len(paths))) - {group.block for group in groups}
    if lacking:
        return f"block {min(lacking) + 1} has no units that rlkd knows"
    return ""
