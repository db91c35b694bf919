import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from rlkd.compression import compact, exits_at, keep_top, load_student, save_student
from rlkd.compression.compact import _digest
from rlkd.compression.selection import gated_exits
from rlkd.errors import UserError
from rlkd.models import ChainStudent, GateConfig, Masks, StudentConfig, build_student, initialise

STUDENTS = {
    "mlp": StudentConfig(widths=(12, 9, 7), exits=(1, 2)),
    "conv": StudentConfig("conv", (4, 6), (1,)),
    "no_exit": StudentConfig(widths=(12, 9), exits=()),
    "gated": StudentConfig(widths=(12, 9, 7), exits=(1, 2), gate=GateConfig(enabled=True)),
}


def made(name: str) -> tuple[ChainStudent, Masks, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = build_student(STUDENTS[name], (8, 8), 10)
    initialise(student, generator)
    for layer in (*student.layers, *student.heads):
        torch.nn.init.uniform_(layer.bias, -0.5, 0.5, generator=generator)  # type: ignore[arg-type]
    for gate in student.gates:
        torch.nn.init.uniform_(gate.weight, -5, 5, generator=generator)  # type: ignore[arg-type]
        torch.nn.init.zeros_(gate.bias)  # type: ignore[arg-type]
    masks = tuple(
        keep_top(torch.rand(1, size, generator=generator), torch.tensor([0.5]))[0] for size in student.group_sizes
    )
    return student, masks, torch.rand(64, 8, 8, generator=generator)


def masked_answers(student: ChainStudent, masks: Masks, inputs: Tensor, threshold: float) -> Tensor:
    """Logits of the exit that each sample leaves at, by the masked student."""
    outputs = student(inputs, masks)
    logits, at = outputs.logits, torch.tensor(threshold)
    answers, waiting = logits[-1].clone(), torch.ones(len(inputs), dtype=torch.bool)
    for e, early in enumerate(logits[:-1]):
        if outputs.gates:
            leave = waiting & gated_exits(outputs.gates[e], at, student.num_classes)
        else:
            leave = waiting & exits_at(early.softmax(-1).amax(-1), at, student.num_classes)
        answers[leave] = early[leave]
        waiting &= ~leave
    return answers


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
@torch.no_grad()
def test_compacted_answers_equal_masked_answers(name: str, threshold: float) -> None:
    student, masks, inputs = made(name)
    if 0.1 < threshold < 1 and name != "no_exit":
        confidence = student(inputs, masks).logits[0].softmax(-1).amax(-1)
        threshold = float(confidence.quantile(threshold))  # so that some leave and some stay
        assert 0 < int((confidence >= threshold).sum()) < len(inputs)
    small = compact(student, masks, threshold)
    torch.testing.assert_close(small(inputs), masked_answers(student, masks, inputs, threshold), atol=1e-5, rtol=1e-4)


def test_masked_rows_and_columns_are_gone() -> None:
    student, masks, _ = made("mlp")
    small = compact(student, masks, 1.0)
    kept = [int(mask.sum()) for mask in masks]
    assert [tuple(layer.weight.shape) for layer in small.layers] == [(kept[k + 1], kept[k]) for k in range(3)]
    assert len(small.heads) == 1  # never exiting needs no early head
    for lowest in (0.0, 0.1, float(torch.tensor(0.1))):  # the last is above 0.1 by rounding alone
        always = compact(student, masks, lowest)
        assert len(always.layers) == 1
        assert len(always.heads) == 1


@pytest.mark.parametrize("name", STUDENTS)
def test_a_saved_student_answers_the_same(name: str, tmp_path: Path) -> None:
    student, masks, inputs = made(name)
    small = compact(student, masks, 0.4)
    save_student(small, tmp_path, {"note": "x"})
    assert torch.equal(load_student(tmp_path)(inputs), small(inputs))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    student, masks, _ = made("mlp")
    save_student(compact(student, masks, 0.4), tmp_path, {})
    return tmp_path


def test_an_altered_student_is_refused(saved: Path) -> None:
    weights = saved / "student.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(UserError, match="altered"):
        load_student(saved)
    card = json.loads((saved / "student.json").read_text())
    (saved / "student.json").write_text(json.dumps({**card, "format": 99}))
    with pytest.raises(UserError, match="format 99; allowed: 2"):
        load_student(saved)
    with pytest.raises(UserError, match="cannot read"):
        load_student(saved / "nowhere")


@pytest.mark.parametrize(("field", "value"), [("threshold", 0.9), ("exits", [2, 3]), ("num_classes", 11)])
def test_an_altered_architecture_is_refused(saved: Path, field: str, value: object) -> None:
    card = json.loads((saved / "student.json").read_text())
    assert card["architecture"][field] != value
    card["architecture"][field] = value
    (saved / "student.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="altered after it was saved"):
        load_student(saved)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_classes", 3, r"heads\.0\.weight is .*expected float32 \[3, "),
        ("num_classes", 0, "num_classes is 0"),
        ("threshold", "x", "threshold is 'x'"),
        ("threshold", 1.5, "threshold is 1.5; allowed: a number from 0 to 1"),
        ("threshold", True, "threshold is True"),
        ("widths", [12, -1, 7], "widths is -1"),
        ("widths", [2**20, 2**20, 2**20], r"layers\.0\.weight is "),  # 8 TiB: refused before any of it is taken
        ("widths", 3, "widths is 3"),
        ("kind", "conv", "input_shape"),
        ("kind", "rnn", "kind is 'rnn'"),
        ("exits", [9], "exits is"),
        ("exits", [2, 1, 3], "exits is"),
        ("exits", [], "exits is"),
        ("input_shape", [2**20, 2**20], "input_shape is"),
        ("num_kept_inputs", 65, "num_kept_inputs is 65"),
    ],
)
def test_a_card_that_makes_no_student_is_refused(saved: Path, field: str, value: object, words: str) -> None:
    card = json.loads((saved / "student.json").read_text())
    card["architecture"][field] = value
    card["sha256"] = _digest(card["architecture"], (saved / "student.safetensors").read_bytes())
    (saved / "student.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=words) as refusal:
        load_student(saved)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("index", [-1, 64])
def test_kept_inputs_outside_of_the_inputs_are_refused(saved: Path, index: int) -> None:
    tensors = load((saved / "student.safetensors").read_bytes())
    tensors["kept_inputs"][-1] = index
    blob = save(tensors)
    (saved / "student.safetensors").write_bytes(blob)
    card = json.loads((saved / "student.json").read_text())
    card["sha256"] = _digest(card["architecture"], blob)
    (saved / "student.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="kept_inputs must be rising indices below 64"):
        load_student(saved)


def test_a_gated_student_follows_its_gates_and_keeps_them_in_its_folder(tmp_path: Path) -> None:
    student, masks, inputs = made("gated")
    gate = student(inputs, masks).gates[0]
    assert 0 < int((gate >= 0).sum()) < len(inputs)
    small = compact(student, masks, 0.5)
    torch.testing.assert_close(small(inputs), compact(student, masks, 0.9)(inputs))  # the threshold decides nothing
    save_student(small, tmp_path, {})
    again = load_student(tmp_path)
    assert len(again.gates) == 2
    assert torch.equal(again(inputs), small(inputs))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for end, blocks in ((1.0, 3), (0.1, 1)):  # at its ends there is no decision to ship
        assert (len(compact(student, masks, end).gates), len(compact(student, masks, end).layers)) == (0, blocks)


def test_a_card_with_a_false_gate_is_refused(saved: Path) -> None:
    card = json.loads((saved / "student.json").read_text())
    for given in (False, 1, "yes"):
        card["architecture"]["gated"] = given
        card["sha256"] = _digest(card["architecture"], (saved / "student.safetensors").read_bytes())
        (saved / "student.json").write_text(json.dumps(card))
        with pytest.raises(UserError, match="gated is"):
            load_student(saved)
    card["architecture"]["gated"] = True  # a gated student without its gates
    card["sha256"] = _digest(card["architecture"], (saved / "student.safetensors").read_bytes())
    (saved / "student.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="gates"):
        load_student(saved)
