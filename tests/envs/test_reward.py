"""The score J by hand."""

import pytest
import torch

from rlkd.cost import Cost
from rlkd.envs.reward import score, worst_score


def cost(latency: list[float], energy: list[float]) -> Cost:
    ratio, other = torch.tensor(latency), torch.tensor(energy)
    none = torch.zeros(len(latency))
    return Cost(none, none, none, ratio, other, none, none, none)


def test_weights_alone() -> None:
    preference = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.75, 0.25], [1.0, 0.0, 0.0]])
    found = score(torch.tensor([0.9, 0.5, 0.8]), cost([0.5, 1.2, 0.1], [0.25, 0.6, 0.1]), preference, torch.zeros(3))
    # 0.54 + 0.15 + 0.075; a student slower than the dense one: -0.15 + 0.1; accuracy alone
    assert found.tolist() == pytest.approx([0.765, -0.05, 0.8])


def test_a_point_below_the_floor_costs_a_tenth_until_the_penalty_is_two() -> None:
    accuracy = torch.tensor([0.92, 0.90, 0.89, 0.85, 0.71, 0.70, 0.60, 0.0])
    preference = torch.tensor([[0.0, 0.75, 0.25]]).expand(8, -1)
    found = score(accuracy, cost([0.4] * 8, [0.2] * 8), preference, torch.full((8,), 0.9))
    saved = 0.75 * 0.6 + 0.25 * 0.8  # 0.65
    assert found.tolist() == pytest.approx([saved - p for p in (0.0, 0.0, 0.1, 0.5, 1.9, 2.0, 2.0, 2.0)], abs=1e-5)


def test_a_diverged_student_scores_as_one_that_is_always_wrong_and_saves_nothing() -> None:
    floors = torch.tensor([0.0, 0.05, 0.2, 0.9])
    assert worst_score(floors).tolist() == pytest.approx([0.0, -0.5, -2.0, -2.0])
    preference = torch.tensor([[0.2, 0.6, 0.2]]).expand(4, -1)
    wrong = score(torch.zeros(4), cost([1.0] * 4, [1.0] * 4), preference, floors)
    torch.testing.assert_close(worst_score(floors), wrong)
