"""The units of a real student that stay: the most important ones of every group."""

from collections.abc import Sequence

from torch import Tensor

from rlkd.compression.selection import keep_top, num_kept
from rlkd.models.chain import Masks
from rlkd.models.real.blocks import Group


def keep_top_units(groups: Sequence[Group], scores: Sequence[Tensor], keep: Tensor, channel_multiple: int = 1) -> Masks:
    """Return masks of the most important units of every group, one [size] a group.

    Of heads that share keys and values, equally many stay for each of those, because attention repeats a key and a
    value equally often; `Group.settled` says how many.

    Args:
        groups: of a plan.
        scores: importance, one [size] a group.
        keep: [], share of the units.
        channel_multiple: kept units are rounded up, so that layers have multiples of so many channels.
    """
    return tuple(
        _top(group, score, keep, group.multiple(channel_multiple)) for group, score in zip(groups, scores, strict=True)
    )


def _top(group: Group, scores: Tensor, keep: Tensor, multiple: int) -> Tensor:
    if group.sharing == 1:
        return keep_top(scores, keep, multiple)
    asked = float(num_kept(keep, group.size, multiple))
    share = keep.new_tensor(group.settled(asked) / group.size)
    rows = scores.reshape(-1, group.sharing)  # [keys and values, heads]
    return keep_top(rows, share.expand(len(rows))).flatten()
