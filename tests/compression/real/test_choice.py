"""Units that stay: the most important ones, and equally many heads for each shared key and value."""

import dataclasses

import pytest
import torch

from rlkd.compression.real.choice import group_shares, keep_top_units, unit_masks, units_kept
from rlkd.compression.selection import num_kept
from rlkd.models.real.attachment import Plan, bare_plan
from rlkd.models.real.blocks import Group

UNITS = Group("units", 0, "down", ("up",), 4, 1)
HEADS = Group("heads", 0, "out", ("query",), 6, 8, shared=("key", "value"), sharing=3)


def test_the_most_important_units_of_every_group_stay() -> None:
    scores = (torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0]))
    units, heads = keep_top_units([UNITS, HEADS], scores, torch.tensor(0.5))
    assert units.tolist() == [0, 1, 0, 1]
    assert heads.tolist() == [1, 1, 0, 0, 1, 1]  # 3 of 6 are asked for: two of each three, for two is the nearest


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize(("size", "sharing"), [(9, 3), (8, 4), (6, 1), (8, 8), (32, 4)])
def test_as_many_stay_as_the_cost_counts(share: float, size: int, sharing: int) -> None:
    shared = ("key",) if sharing > 1 else ()
    group = Group("heads", 0, "out", ("query",), size, 8, shared=shared, sharing=sharing)
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    (mask,) = keep_top_units([group], (scores,), torch.tensor(share))
    asked = max(1.0, float(torch.tensor(share * size).round()))  # as limits and the profile count it
    assert float(mask.sum()) == group.settled(asked)
    assert group.settled(group.settled(asked)) == group.settled(asked)
    assert len(set(mask.view(-1, sharing).sum(1).tolist())) == 1 or sharing == 1


@pytest.mark.parametrize(
    ("group", "channels", "counts"),
    [  # counts: units that stay at the shares 0.01, 0.3, 0.6 and 1
        (Group("units", 0, "down", ("up",), 20, 1), 8, [8, 8, 16, 20]),
        (Group("channels", 0, "head", ("conv",), 20, 49), 8, [8, 8, 16, 20]),  # the head reads each at 49 positions
        (Group("heads", 0, "out", ("query",), 6, 8), 8, [1, 2, 4, 6]),  # a head is 8 channels
        (Group("heads", 0, "out", ("query",), 6, 4), 8, [2, 2, 4, 6]),
        (Group("heads", 0, "out", ("query",), 12, 4, shared=("key",), sharing=4), 8, [6, 6, 12, 12]),  # 3 keys
    ],
)
def test_kept_units_are_rounded_up_to_what_the_target_likes(group: Group, channels: int, counts: list[int]) -> None:
    scores = torch.rand(group.size, generator=torch.Generator().manual_seed(0))
    for share, count in zip((0.01, 0.3, 0.6, 1.0), counts, strict=True):
        keep = torch.tensor(share)
        (mask,) = keep_top_units([group], (scores,), keep, channels)
        assert float(mask.sum()) == count
        asked = float(num_kept(keep, group.size, group.multiple(channels)))  # as limits count it
        assert group.settled(asked) == count


def plan_of(order: tuple[int, ...]) -> Plan:
    """Four blocks with ten hidden units and four heads each."""
    sizes = (("units", 10, 1), ("heads", 4, 8))
    groups = tuple(Group(kind, block, "r", ("w",), size, width) for block in range(4) for kind, size, width in sizes)
    blocks = tuple(f"layer.{number}" for number in range(4))
    return dataclasses.replace(bare_plan(2, False), blocks=blocks, groups=groups, order=order)


@pytest.mark.parametrize(
    ("share", "counts"),  # units and heads of blocks 1 to 4
    [
        (1.0, [10, 4, 10, 4, 10, 4, 10, 4]),
        (0.875, [10, 4, 5, 2, 10, 4, 10, 4]),  # 3.5 blocks: 3, 1 and 4 are whole, 2 has half
        (0.75, [10, 4, 0, 0, 10, 4, 10, 4]),
        (0.76, [10, 4, 0, 0, 10, 4, 10, 4]),  # 0.04 of block 2 would be 0.4 hidden units
        (0.765, [10, 4, 1, 1, 10, 4, 10, 4]),  # 0.06 of block 2: one hidden unit, and each group has one at least
        (0.6, [10, 4, 0, 0, 10, 4, 4, 2]),  # 2.4 blocks
        (0.5, [10, 4, 0, 0, 10, 4, 0, 0]),
        (0.2, [0, 0, 0, 0, 8, 3, 0, 0]),  # one block always stays
        (0.001, [0, 0, 0, 0, 1, 1, 0, 0]),
        (0.0, [0, 0, 0, 0, 1, 1, 0, 0]),
    ],
)
def test_a_share_keeps_whole_blocks_then_a_part_of_the_next_one(share: float, counts: list[int]) -> None:
    plan = plan_of((3, 1, 4, 2))
    scores = tuple(torch.rand(g.size, generator=torch.Generator().manual_seed(0)) for g in plan.groups)
    masks = unit_masks(plan, scores, torch.tensor(share))
    assert [int(mask.sum()) for mask in masks] == counts
    assert units_kept(plan, torch.tensor([share, 1.0])).tolist() == [counts, [10, 4] * 4]  # as limits count it
    skipped = tuple(number for number in range(1, 5) if counts[2 * number - 2] == 0)
    assert plan.skipped(counts) == skipped
    part = next(
        (i for i, (mask, g) in enumerate(zip(masks, plan.groups, strict=True)) if 0 < mask.sum() < g.size), None
    )
    if part is not None:  # the most important ones of it
        assert scores[part][masks[part] == 1].min() >= scores[part][masks[part] == 0].max()


def test_every_block_keeps_the_same_share_without_an_order() -> None:
    plan = plan_of(())
    assert units_kept(plan, torch.tensor([0.5, 0.01])).tolist() == [[5, 2] * 4, [1, 1] * 4]
    assert plan.skipped([0.0] * 8) == ()
    assert units_kept(bare_plan(2, False), torch.tensor([0.5])).tolist() == [[1.0]]


def test_units_of_the_block_between_are_rounded_up_and_skipped_blocks_are_not() -> None:
    plan = plan_of((1, 2, 3, 4))
    assert units_kept(plan, torch.tensor(0.3), 8).tolist() == [10, 4, 8, 1, 0, 0, 0, 0]  # 0.2 of block 2


@pytest.mark.parametrize("num_blocks", [6, 12, 30])
def test_shares_of_whole_blocks_leave_no_rest(num_blocks: int) -> None:
    """A rounding error of single precision makes no block of one unit."""
    groups = tuple(Group("units", block, "r", ("w",), 8192, 1) for block in range(num_blocks))
    order = tuple(range(1, num_blocks + 1))
    plan = dataclasses.replace(bare_plan(2, False), blocks=("b",) * num_blocks, groups=groups, order=order)
    for count in range(1, num_blocks + 1):
        kept = units_kept(plan, torch.tensor(count / num_blocks))
        assert kept.tolist() == [8192.0] * count + [0.0] * (num_blocks - count)
        assert int(group_shares(plan, torch.tensor(count / num_blocks))[1].sum()) == count
