"""Units that stay: the most important ones, and equally many heads for each shared key and value."""

import pytest
import torch

from rlkd.compression.real.choice import keep_top_units
from rlkd.compression.selection import num_kept
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
