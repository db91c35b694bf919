"""Real students on the grid of dynamic int8: the runtime computes what is trained."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")
pytest.importorskip("transformers", reason="the extra hf is not installed: pip install 'rlkd[hf]'")

from rlkd.compression.real.shipped import Shipment, ShippedStudent, shipped_student
from rlkd.errors import UserError
from rlkd.export.dynamic_grid import FakeDynamic, _Rounding
from rlkd.export.int8 import layers_of, quantise, tables_of
from rlkd.export.onnx_file import export_flat
from rlkd.runs.export_int8 import _last_of, aware_forms, chosen_form
from rlkd.runs.shipped import ShippedData

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
NUM_SAMPLES, NUM_TRAIN = 160, 96


@pytest.fixture(scope="module")
def opened() -> ShippedData:
    """A random student of two blocks with an exit, whose texts hold class 1 where their first word is above 22."""
    torch.manual_seed(0)
    model = tiny_models.tiny("bert", layers=2, **SMALL).eval()
    head = nn.Linear(16, 2)
    nn.init.normal_(head.weight, std=0.3)
    blocks = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    shipment = Shipment("sequence_classification", blocks, (), (1,), 0, 0.7, None, 1.0, 2, True)
    inputs = tiny_models.batch("bert", size=NUM_SAMPLES)
    labels = (inputs["input_ids"][:, 0] > 22).long()
    index = torch.arange(NUM_SAMPLES)
    return ShippedData(
        folder=Path(),
        student=shipped_student(model, nn.ModuleList([head]), shipment),
        kind="sequence_classification",
        data_name="words",
        batch=lambda rows: {name: values[rows] for name, values in inputs.items()},
        labels=labels,
        splits={"train": index[:NUM_TRAIN], "validation": index[NUM_TRAIN:128], "test": index[128:]},
        has_length=True,
        card={},
        open_teacher=lambda: lambda rows: 6.0 * F.one_hot(labels[rows], 2).float(),
    )


@pytest.fixture(scope="module")
def flat(opened: ShippedData) -> Any:
    return export_flat(opened.student, opened.batch(torch.arange(3)), dynamic_length=True)


def faked(opened: ShippedData) -> FakeDynamic:
    student = opened.student
    assert isinstance(student, ShippedStudent)
    return FakeDynamic(student, list(opened.batch(torch.arange(1))))


def test_a_layer_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[0.0, 127.6], [-127.5, 3.4]]))  # the grid has step 255.1 / 255, 0 at 127
    other = nn.Parameter(torch.tensor([[0.3, 0.3]]))
    inputs = torch.tensor([[510.0, 2.9], [0.0, 1.2]], requires_grad=True)  # step 2
    with _Rounding([weight]) as rounding:
        found = F.linear(inputs, weight, torch.tensor([0.25, 0.0]))
        untouched = F.linear(inputs, other)
    step = 255.1 / 255
    wanted = torch.tensor(
        [[2 * 128 * step + 0.25, -510 * 127 * step + 2 * 3 * step], [2 * 128 * step + 0.25, 6 * step]]
    )
    torch.testing.assert_close(found.detach(), wanted)
    torch.testing.assert_close(untouched.detach(), 0.3 * inputs.detach().sum(1, keepdim=True))
    assert rounding.num_calls == 1
    found[1].sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], torch.tensor([0.0, 2.0]))  # of the rounded inputs


def test_a_lookup_by_hand() -> None:
    table = nn.Parameter(torch.tensor([[0.0, 255.0], [0.6, 0.4], [7.0, 8.0]]))  # the grid has step 1
    other = nn.Parameter(torch.tensor([[0.3]]))
    with _Rounding([table]) as rounding:
        found = F.embedding(torch.tensor([1, 1]), table)
        untouched = F.embedding(torch.tensor([0]), other)
    torch.testing.assert_close(found.detach(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(untouched.detach(), torch.tensor([[0.3]]))
    assert rounding.num_lookups == 1
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    torch.testing.assert_close(table.grad[:, 0], torch.tensor([0.0, 2.0, 0.0]))
    with _Rounding([table], rounds_tables=False) as rounding:
        torch.testing.assert_close(F.embedding(torch.tensor([1]), weight=table), table[1:2])
    assert rounding.num_lookups == 1


def test_the_runtime_computes_what_is_trained(opened: ShippedData, flat: Any) -> None:
    fake, inputs = faked(opened), opened.batch(torch.arange(NUM_SAMPLES))
    with torch.no_grad():
        wanted = fake(inputs)
    assert fake.num_layers == len(layers_of(flat, "dynamic")) == 2 * 6 + 3  # two blocks, pooler, classifier, exit
    assert fake.num_lookups == len(tables_of(flat)) == 3  # words, positions, kinds of tokens
    answer = _last_of(quantise(flat, "dynamic", []).graph)(inputs)
    off = (_last_of(flat)(inputs) - answer).abs().amax(1)  # of the student without any grid
    gap = (wanted - answer).abs().amax(1)
    assert float(gap.median()) < 0.05 * float(off.median())
    assert float(gap.quantile(0.9)) < 0.5 * float(off.median())  # a value between two integers may go to either
    assert float((wanted.argmax(-1) == answer.argmax(-1)).float().mean()) > 0.98


@pytest.mark.slow
def test_a_student_learns_on_its_grid_and_ships_what_it_learned(opened: ShippedData, flat: Any) -> None:
    before = {name: value.clone() for name, value in opened.student.state_dict().items()}
    log: list[str] = []
    made = aware_forms(opened, flat, 1, most_lost=1.0, num_steps=120, log=log.append, seed=1)
    assert [form.name for form in made] == ["int8 aware dynamic"]
    assert made[0].lost < -0.1  # a random student gained
    right = opened.accuracy(_last_of(made[0].straight), opened.few("validation"))
    assert log == [f"int8 aware dynamic: {100 * right:.2f} % right on validation as it was trained"]
    assert all(torch.equal(before[name], value) for name, value in opened.student.state_dict().items())


@pytest.mark.slow
def test_what_loses_too_much_is_taken_back(opened: ShippedData, flat: Any) -> None:
    log: list[str] = []
    assert aware_forms(opened, flat, 1, most_lost=-1.0, num_steps=8, log=log.append) == []
    assert len(log) == 1
    assert log[0].endswith("more than -100; taken back")


class Functional(nn.Module):
    """A module whose first layer is a product of matrices that no nn.Linear computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 8))
        self.last = nn.Linear(8, 2)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.last(F.relu(values @ self.weight))
        return logits


def test_students_that_cannot_be_trained_on_the_grid_are_refused(opened: ShippedData, flat: Any) -> None:
    def refused(other: ShippedData, graph: Any = flat, num_steps: int = 8) -> str:
        with pytest.raises(UserError) as found:
            aware_forms(other, graph, 0, most_lost=1.0, num_steps=num_steps, log=str)
        return str(found.value)

    assert "--qat: got 7 steps" in refused(opened, num_steps=7)
    orphan = dataclasses.replace(opened, open_teacher=None)
    assert refused(orphan).startswith("--qat: got a sequence classification student without a named teacher; allowed:")
    causal = dataclasses.replace(opened, kind="causal_lm")
    assert refused(causal) == "--qat: got a language model; allowed: chains and classifiers"
    student = shipped_student(
        Functional(), nn.ModuleList(), Shipment("module", (), (), (), 0, 1.0, None, 1.0, 2, False)
    )
    values = torch.rand(NUM_SAMPLES, 4)

    def batch(rows: Tensor) -> Mapping[str, Tensor]:
        return {"values": values[rows]}

    own = dataclasses.replace(opened, student=student, kind="module", batch=batch, has_length=False)
    graph = export_flat(student, batch(torch.arange(3)), dynamic_length=False)
    assert "the graph has 2 layers for dynamic int8, of which the training rounds 1" in refused(own, graph)


def test_of_forms_that_are_as_fast_the_one_that_loses_least_ships() -> None:
    rows = [
        {"latency_s": {"1": latency_s}, "points_lost_on_validation": lost}
        for latency_s, lost in ((0.5, 0.0), (1.0, 0.4), (1.04, 0.1), (1.06, 0.0))
    ]
    assert chosen_form(rows, "1") == 2
