import math

import pytest
import torch
from torch import nn

from rlkd.errors import UserError
from rlkd.teachers.data_free import (
    DataFreeConfig,
    Generator,
    distil_without_data,
    generator_loss,
    student_loss,
)


def test_losses_by_hand() -> None:
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])  # (3/4, 1/4) and (1/4, 3/4): balanced
    student = torch.zeros(2, 2) + 5.0  # an offset counts for nothing
    half = math.log(3) / 2  # every centred logit differs by this
    assert student_loss(teacher, student).item() == pytest.approx(half, rel=1e-6)
    config = DataFreeConfig(one_hot=2.0, balance=3.0, disagreement=4.0)
    expected = 2 * -math.log(0.75) - 3 * math.log(2) - 4 * half
    assert generator_loss(teacher, student, config).item() == pytest.approx(expected, rel=1e-6)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(UserError, match="num_rounds 0"):
        DataFreeConfig(num_rounds=0).check()
    with pytest.raises(UserError, match="learning_rate 0"):
        DataFreeConfig(learning_rate=0.0).check()


def test_invented_inputs_stay_within_bounds() -> None:
    torch.manual_seed(0)
    invented = Generator(4, 6, (-1.0, 2.0))(torch.randn(50, 4))
    assert invented.shape == (50, 6)
    assert invented.min() >= -1.0
    assert invented.max() <= 2.0


def test_a_student_learns_the_teachers_answers_without_any_sample() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).requires_grad_(False)
    with torch.no_grad():
        teacher[0].weight.mul_(4)
        teacher[2].weight.mul_(3)
    student, generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), Generator(8, 4, (-1.0, 1.0))
    samples = 2 * torch.rand(500, 4) - 1  # never seen in training

    def agreement() -> float:
        return float((student(samples).argmax(-1) == teacher(samples).argmax(-1)).float().mean())

    before = agreement()
    config = DataFreeConfig(num_rounds=60, batch_size=64, learning_rate=1e-2)
    losses = distil_without_data(teacher, student, generator, config, torch.Generator().manual_seed(0))
    assert len(losses) == 60
    assert agreement() > max(0.85, before)
    assert all(p.grad is None for p in teacher.parameters())
