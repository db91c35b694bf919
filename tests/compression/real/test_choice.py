"""Units that stay: the most important ones, and equally many heads for each shared key and value."""

import pytest
import torch

from rlkd.compression.real.choice import keep_top_units
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
