"""What a gated student's loss is made of, by hand."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlkd.envs import CONTROLS, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.references import References
from rlkd.models import GateConfig, Outputs, StudentConfig, build_student
from rlkd.students.gating import GateTraining, Stakes


def exit_cost(kept: Tensor) -> Tensor:
    """Latency: kept units over 10, twice that at the second exit; energy: a tenth of latency."""
    first = kept.sum(-1) / 10  # [N]
    latency = torch.stack([first, 2 * first], dim=-1)
    return torch.stack([latency, latency / 10], dim=-1)


def test_stakes_follow_preference_and_masks() -> None:
    training = GateTraining(GateConfig(), exit_cost, 3)
    training.reset(torch.arange(3), [(1.0, 0.0, 0.0), (0.5, 0.3, 0.2), (0.2, 0.0, 0.8)])
    training.reset(torch.tensor([2]), [(0.4, 0.6, 0.0)])
    masks = (torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0], [1.0], [0.0]]))  # 3, 2, 2 kept
    stakes = training.stakes(masks, torch.tensor([0.0, 1000.0, 5000.0]))
    assert stakes.accuracy_weight.tolist() == pytest.approx([1.0, 0.5, 0.4])
    # student 2: 0.3 * 0.2 + 0.2 * 0.02, and twice that; student 3: 0.6 * 0.2
    assert stakes.exit_cost.flatten().tolist() == pytest.approx([0.0, 0.0, 0.064, 0.128, 0.12, 0.24])
    assert stakes.beta.tolist() == pytest.approx([0.1, 0.15, 0.3])


def test_the_loss_is_alpha_distillation_less_beta_expected_reward() -> None:
    training = GateTraining(GateConfig(alpha=0.5), exit_cost, 1)
    early, late = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # right, wrong
    gate = torch.tensor([math.log(3.0)])  # leaves with 3/4
    stakes = Stakes(torch.tensor(0.6), torch.tensor([0.1, 0.2]), torch.tensor(0.2))
    loss = training.loss(torch.tensor(4.0), Outputs((early, late), (), (gate,)), torch.tensor([0]), stakes)
    # 0.5 * 4 - 0.2 * (0.75 * 0.5 + 0.25 * -0.2)
    assert float(loss) == pytest.approx(2.0 - 0.2 * 0.325)


@pytest.mark.parametrize("num_students", [1, 2])
def test_a_resumed_gated_student_goes_on_with_its_own_beta(scenario: Scenario, num_students: int) -> None:
    gate = GateConfig(enabled=True, beta_step=0.1, steps_per_rise=15)  # beta is 0.1, 0.2, 0.3 in the first windows
    config = dataclasses.replace(scenario.config, student=StudentConfig(widths=(8, 8), gate=gate))
    gated = dataclasses.replace(scenario, config=config, template=build_student(config.student, (8, 8), 10))
    gated = dataclasses.replace(gated, known=References())
    first, second = Episodes(gated, num_students), Episodes(gated, num_students)
    seeds = [2**60 + i for i in range(num_students)]
    first.reset(seeds)
    u = first.start.clone()
    u[:, CONTROLS.index("learning_rate")] = 0.9
    first.step(u)
    second.reset([seed + 7 for seed in seeds])
    second.load_training_state(first.training_state())
    for episodes in (first, second):
        episodes.step(u)
    mine, other = first.students.state_dict(), second.students.state_dict()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name
