"""The optimizers of real students and the course of the learning rate."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from module_students import TRAIN, controls, distance, student_of
from torch import nn

from rlkd.students.optimizers import Lion, load_optimizer_state, new_optimizer, optimizer_state, schedule


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


def test_lion_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    p.grad = torch.tensor([3.0, -0.1])
    optimizer.step()  # momentum 0: u = sign(0.1 g); p (1 - 0.05) - 0.1 u; m = 0.5 g = (1.5, -0.05)
    torch.testing.assert_close(p.data, torch.tensor([0.85, -1.8]))
    p.grad = torch.tensor([-10.0, 0.0])
    optimizer.step()  # 0.9 m + 0.1 g = (0.35, -0.045)
    torch.testing.assert_close(p.data, torch.tensor([0.85 * 0.95 - 0.1, -1.8 * 0.95 + 0.1]))


def test_adamw_by_hand() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(2.0)
    optimizer = new_optimizer(layer, "adamw", 0.1, 0.5)
    # the first step moves by lr against the sign, after decay by lr 0.5 of the matrix alone
    layer.weight.grad, layer.bias.grad = torch.full((1, 1), 3.0), torch.full((1,), -7.0)
    optimizer.step()
    torch.testing.assert_close(layer.weight.data, torch.tensor([[2.0 * 0.95 - 0.1]]))
    torch.testing.assert_close(layer.bias.data, torch.tensor([2.1]))
    # m = 0.9 0.1 3 + 0.1 g, v = 0.999 0.001 9 + 0.001 g^2, over 1 - 0.9^2 and 1 - 0.999^2
    layer.weight.grad, layer.bias.grad = torch.full((1, 1), -1.0), None
    optimizer.step()
    moved = (0.17 / 0.19) / (0.009991 / 0.001999) ** 0.5
    torch.testing.assert_close(layer.weight.data, torch.tensor([[1.8 * 0.95 - 0.1 * moved]]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_a_resumed_adamw_goes_on_as_one_that_never_stopped(layout: str) -> None:
    def steps(optimizer: torch.optim.Optimizer, layer: nn.Module, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            given = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(number))
            layer(given).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    layer = nn.Conv2d(2, 5, 3)
    if layout == "channels_last":
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif layout == "transposed":
        layer.weight.data = layer.weight.data.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    optimizer = new_optimizer(layer, "adamw", 0.01, 0.1)
    steps(optimizer, layer, range(3))
    state = {name: value.contiguous() for name, value in optimizer_state(optimizer).items()}  # as files keep it
    again = copy.deepcopy(layer)
    resumed = new_optimizer(again, "adamw", 0.01, 0.1)
    load_optimizer_state(resumed, state)
    steps(optimizer, layer, range(3, 6))
    steps(resumed, again, range(3, 6))
    assert torch.equal(layer.weight, again.weight)


def test_lion_trains() -> None:
    student = student_of(config=replace(TRAIN, optimizer="lion", learning_rate=1e-4))
    before = student.state_dict()
    assert not bool(student.train_window(controls()).diverged)
    assert distance(before, student.state_dict()) > 1e-5


def test_the_learning_rate_rises_and_falls_within_the_control() -> None:
    factors = [schedule(step, 10, 0.2, 0.1) for step in range(10)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert factors[6] == pytest.approx(0.55)  # half way down
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert all(f >= 0.1 for f in factors)
    slow, fast = student_of(), student_of()
    slow.train_window(controls(learning_rate=3e-3))
    fast.train_window(controls(learning_rate=6e-3))
    assert fast._optimizer.param_groups[0]["lr"] == pytest.approx(2 * slow._optimizer.param_groups[0]["lr"])


def test_the_control_s_hold_on_the_learning_rate_can_be_loosened() -> None:
    rates = []
    for exponent in (1.0, 0.5, 0.0):
        student = student_of(config=replace(TRAIN, rate_exponent=exponent))
        student.train_window(controls(learning_rate=0.012))  # four times the published one
        rates.append(student._optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(4 * rates[2])
    assert rates[1] == pytest.approx(2 * rates[2])
