"""The counted work against what the compacted network multiplies when it runs, and what profiles refuse."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlkd.compression import compact, exits_at, keep_top
from rlkd.cost import calibrate, load_profile, workload
from rlkd.cost.profile import describe
from rlkd.cost.timing import _grid
from rlkd.errors import UserError
from rlkd.models import ChainStudent, ExitGate, GateConfig, Masks, StudentConfig, build_student, initialise

STUDENTS = {
    "mlp": StudentConfig(),
    "deep": StudentConfig(widths=(20, 16, 12), exits=(1, 2)),
    "conv": StudentConfig("conv", (4, 6), (1,)),
    "no_exit": StudentConfig(widths=(12, 9), exits=()),
    "gated": StudentConfig(widths=(20, 16, 12), exits=(1, 2), gate=GateConfig(enabled=True)),
}


def multiplied(network: nn.Module, inputs: Tensor) -> int:
    """Multiplications with weights that one call makes, seen from outside at every layer that runs."""
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        positions = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        total += len(output) * positions * layer.weight.numel()  # type: ignore[operator]

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        network(inputs)
    for hook in hooks:
        hook.remove()
    return total


@torch.no_grad()
def rates_of(student: ChainStudent, masks: Masks, inputs: Tensor, threshold: float) -> Tensor:
    """[1, E] shares of the inputs that leave at each exit."""
    waiting, rates = torch.ones(len(inputs), dtype=torch.bool), []
    for early in student(inputs, masks).logits[:-1]:
        leave = waiting & exits_at(early.softmax(-1).amax(-1), torch.tensor(threshold), student.num_classes)
        rates.append(leave.float().mean())
        waiting &= ~leave
    return torch.stack([*rates, waiting.float().mean()])[None]


@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("exit", ["never", "always", "mixed"])
@pytest.mark.parametrize("name", STUDENTS)
def test_counted_macs_are_the_multiplications_made(name: str, exit: str, keep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = build_student(STUDENTS[name], (8, 8), 10)
    initialise(student, generator)
    masks = tuple(keep_top(torch.rand(1, s, generator=generator), torch.tensor([keep]))[0] for s in student.group_sizes)
    inputs = torch.rand(64, 8, 8, generator=generator)
    threshold = {"never": 1.0, "always": 0.1, "mixed": 0.5}[exit]
    if exit == "mixed":
        with torch.no_grad():
            threshold = float(student(inputs, masks).logits[0].softmax(-1).amax(-1).median()) - 1e-6
    for gate in student.gates:
        assert isinstance(gate, ExitGate)
        gate.stand_for(threshold)
    rates = rates_of(student, masks, inputs, threshold)
    if exit == "mixed" and student.exits[0] != len(student.layers):
        assert 0 < float(rates[0, 0]) < 1
    kept = torch.tensor([[mask.sum() for mask in masks]])
    counted = workload(student, kept, rates, exit_threshold=torch.tensor([threshold]), batch_size=len(inputs)).macs
    assert len(inputs) * float(counted) == pytest.approx(multiplied(compact(student, masks, threshold), inputs))


def test_calibration_of_a_student_without_early_exits_knows_no_decision() -> None:
    profile = calibrate(build_student(StudentConfig(widths=(6,), exits=()), (8, 8), 10), batch_size=2)
    assert all(math.isfinite(c) and c >= 0 for c in profile.coefficients)
    assert sum(profile.coefficients) > 0
    assert {row["exit_rate"] for row in profile.provenance["grid"]} == {0.0}


@torch.no_grad()
def test_calibration_times_gated_students_at_the_rates_that_it_says() -> None:
    student = build_student(StudentConfig(widths=(8, 6), gate=GateConfig(enabled=True)), (8, 8), 10)
    initialise(student, torch.Generator().manual_seed(0))
    inputs = torch.rand(64, 8, 8, generator=torch.Generator().manual_seed(1))
    deciding = 0
    for setting, masks, threshold, rates in _grid(student, inputs):
        if 0 < setting["exit_rate"] < 1:
            left = float(
                (compact(student, masks, threshold).gates[0](student(inputs, masks).logits[0]) >= 0).float().mean()
            )
            assert left == pytest.approx(float(rates[0]), abs=1 / 64)
            deciding += 1
    assert deciding > 8
    assert describe(student)["exit_rule"] == "gate"


@pytest.mark.parametrize("name", ["call_s", "layer_s", "mac_s", "decided_s", "gathered_s"])
@pytest.mark.parametrize("value", [-1e-12, math.inf, math.nan], ids=str)
def test_a_profile_with_an_impossible_coefficient_is_refused(
    tmp_path: Path, profile_file: Path, name: str, value: float
) -> None:
    card = json.loads(profile_file.read_text())
    card["coefficients"][name] = value
    (tmp_path / "p.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"p\.json: not a cost profile.*rlkd calibrate"):
        load_profile(tmp_path / "p.json")


def test_a_profile_of_all_zeros_is_refused(tmp_path: Path, profile_file: Path) -> None:
    card = json.loads(profile_file.read_text())
    card["coefficients"] = dict.fromkeys(card["coefficients"], 0.0)
    (tmp_path / "p.json").write_text(json.dumps(card))
    with pytest.raises(UserError):
        load_profile(tmp_path / "p.json")


@pytest.mark.parametrize("size", [0, -3, math.inf], ids=str)
def test_a_profile_of_an_impossible_batch_is_refused(tmp_path: Path, profile_file: Path, size: float) -> None:
    card = json.loads(profile_file.read_text())
    card["batch_size"] = size
    (tmp_path / "p.json").write_text(json.dumps(card))
    with pytest.raises(UserError):
        load_profile(tmp_path / "p.json")
