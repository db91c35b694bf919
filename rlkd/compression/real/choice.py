"""The units of a real student that stay: the most important ones of every group, or those of whole blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkd.compression.selection import keep_top, num_kept
from rlkd.models.chain import Masks
from rlkd.models.real.attachment import Plan
from rlkd.models.real.blocks import Group


def group_shares(plan: Plan, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of its units that every group keeps, and whether its block stays.

    Where the plan has an order of n blocks, a share u keeps the first floor(u n) of them whole, and of the next one the
    share that remains. The others are skipped, and so is that one where less than half a unit of its largest group
    remains. The first block keeps at least one unit a group.

    Args:
        plan: with groups.
        keep: [*N], in [0, 1].

    Returns:
        Shares [*N, G] and [*N, G] bool.
    """
    shares = keep[..., None].expand(*keep.shape, len(plan.groups))
    if not plan.order:
        return shares, torch.ones_like(shares, dtype=torch.bool)
    ranks = torch.tensor([float(plan.order.index(group.block + 1)) for group in plan.groups])  # [G]
    largest = torch.tensor([float(max(g.size for g in plan.groups if g.block == h.block)) for h in plan.groups])  # [G]
    shares = (shares * len(plan.order) - ranks).clamp(0.0, 1.0)
    return shares, (shares * largest >= 0.5) | (ranks == 0)


def units_kept(plan: Plan, keep: Tensor, channel_multiple: int = 1) -> Tensor:
    """Return how many units of every group stay, [*N, G] floats; one that always stays for a plan without groups.

    Args:
        plan: of the student.
        keep: [*N], share of the units.
        channel_multiple: as of `keep_top_units`.
    """
    if not plan.groups:
        return torch.ones(*keep.shape, 1)
    shares, stays = group_shares(plan, keep)
    sizes = torch.tensor([float(group.size) for group in plan.groups])  # [G]
    multiples = torch.tensor([float(group.multiple(channel_multiple)) for group in plan.groups])  # [G]
    return num_kept(shares, sizes, multiples) * stays


def unit_masks(plan: Plan, scores: Sequence[Tensor], keep: Tensor, channel_multiple: int = 1) -> Masks:
    """Return masks of the units that stay, one [size] a group; all zeros for the groups of a block that is skipped.

    Args:
        plan: of the student.
        scores: importance, one [size] a group.
        keep: [], share of the units.
        channel_multiple: as of `keep_top_units`.
    """
    if not plan.groups:
        return ()
    shares, stays = group_shares(plan, keep)  # [G] each
    masks = keep_top_units(plan.groups, scores, shares, channel_multiple)
    return tuple(mask * stay for mask, stay in zip(masks, stays, strict=True))


def keep_top_units(groups: Sequence[Group], scores: Sequence[Tensor], keep: Tensor, channel_multiple: int = 1) -> Masks:
    """Return masks of the most important units of every group, one [size] a group.

    Of heads that share keys and values, equally many stay for each of those, because attention repeats a key and a
    value equally often; `Group.settled` says how many.

    Args:
        groups: of a plan.
        scores: importance, one [size] a group.
        keep: [] or one a group, [G], share of the units.
        channel_multiple: kept units are rounded up, so that layers have multiples of so many channels.
    """
    return tuple(
        _top(group, score, share, group.multiple(channel_multiple))
        for group, score, share in zip(groups, scores, keep.expand(len(groups)), strict=True)
    )


def _top(group: Group, scores: Tensor, keep: Tensor, multiple: int) -> Tensor:
    if group.sharing == 1:
        return keep_top(scores, keep, multiple)
    asked = float(num_kept(keep, group.size, multiple))
    share = keep.new_tensor(group.settled(asked) / group.size)
    rows = scores.reshape(-1, group.sharing)  # [keys and values, heads]
    return keep_top(rows, share.expand(len(rows))).flatten()
