import math

import pytest
import torch

from rlkd.errors import UserError
from rlkd.models import ExitGate, GateConfig, StudentConfig, build_student, initialise
from rlkd.models.gate import SLOPE, START


def test_beta_rises_by_a_twentieth_every_thousand_updates() -> None:
    updates = torch.tensor([0.0, 999.0, 1000.0, 2500.0, 3999.0, 4000.0, 90_000.0])
    wanted = [0.1, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3]
    assert GateConfig().beta(updates).tolist() == pytest.approx(wanted)
    assert GateConfig(beta_start=0.5, beta_end=0.5).beta(updates).tolist() == [0.5] * 7


def test_a_gate_begins_as_a_confidence_threshold() -> None:
    gate = ExitGate(3)
    gate.stand_for(0.6)
    p = torch.tensor([[0.61, 0.2, 0.19], [0.1, 0.59, 0.31], [0.02, 0.03, 0.95]])
    wanted = [SLOPE * (math.log(c) - math.log(0.6)) for c in (0.61, 0.59, 0.95)]
    assert (gate(p.log() + 7.0)).tolist() == pytest.approx(wanted, abs=1e-5)  # logits of the same probabilities
    assert (gate(p.log()) >= 0).tolist() == [True, False, True]
    with torch.no_grad():
        gate.weight[0, 1] = -2.0  # be slower to let samples of class 1 go
    assert gate(p.log()).tolist() == pytest.approx(
        [w - 2 * q for w, q in zip(wanted, (0.2, 0.59, 0.03), strict=True)], abs=1e-5
    )


def test_gates_change_no_other_initial_weight() -> None:
    plain, gated = (
        build_student(StudentConfig(widths=(8, 7, 6), exits=(1, 2), gate=GateConfig(enabled=on)), (8, 8), 10)
        for on in (False, True)
    )
    for student in (plain, gated):
        initialise(student, torch.Generator().manual_seed(4))
    tensors = dict(gated.named_parameters())
    assert set(tensors) - set(dict(plain.named_parameters())) == {
        f"gates.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")
    }
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    assert tensors["gates.1.bias"].item() == pytest.approx(-SLOPE * math.log(START))
    outputs = gated(torch.rand(5, 8, 8), gated.full_masks())
    assert [tuple(z.shape) for z in outputs.gates] == [(5,), (5,)]
    assert plain(torch.rand(5, 8, 8), plain.full_masks()).gates == ()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GateConfig(alpha=0.0), "student.gate: got alpha 0"),
        (GateConfig(beta_start=0.4), "beta_start 0.4, beta_end 0.3; allowed: alpha above 0"),
        (GateConfig(beta_step=-1.0), "beta_step -1"),
        (GateConfig(steps_per_rise=0), "steps_per_rise 0"),
    ],
)
def test_impossible_weights_are_refused(config: GateConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        StudentConfig(gate=config).check()


def test_a_gate_needs_an_exit() -> None:
    with pytest.raises(UserError, match="without an early exit"):
        StudentConfig(exits=(), gate=GateConfig(enabled=True)).check()
