"""Fake quantisation is what the runtime computes, and its gradient passes straight through."""

from pathlib import Path
from typing import Any

import pytest
import small_students
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")

from rlkd.compression import CompactStudent
from rlkd.data import DataSet
from rlkd.errors import UserError
from rlkd.export.aware import (
    AwareConfig,
    FakeChain,
    accuracy_of,
    calibrated,
    four_bit_layers,
    layer_names,
    train_aware,
)
from rlkd.export.fake_quant import fake_quantise, grid_between, to_integers
from rlkd.export.onnx_file import export_flat
from rlkd.export.qdq import LayerGrids, with_integers
from rlkd.runs.export_int8 import _last_of, aware_forms, integer_graph, weight_bytes
from rlkd.runs.shipped import ShippedData

Case = tuple[CompactStudent, DataSet, Any]


@pytest.fixture(scope="module", params=["mlp", "conv"])
def case(request: pytest.FixtureRequest) -> Case:
    widths = (36, 36, 36) if request.param == "mlp" else (8, 12)
    exits = (1, 2) if request.param == "mlp" else (1,)
    student, data = small_students.trained_chain(request.param, widths, exits)
    inputs = data.inputs[:3].reshape(3, *student.input_shape)
    return student, data, export_flat(student, {"inputs": inputs}, dynamic_length=False)


def test_a_grid_by_hand() -> None:
    grid = grid_between(torch.tensor(-1.0), torch.tensor(2.0), 2)  # 0, 1, 2, 3 stand for -1, 0, 1, 2
    values = torch.tensor([-5.0, -1.0, -0.4, 0.5, 0.6, 1.5, 2.0, 9.0], requires_grad=True)
    assert to_integers(values.detach(), grid).tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    rounded = fake_quantise(values, grid)
    assert rounded.tolist() == [-1, -1, 0, 0, 1, 2, 2, 2]
    rounded.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad[[0, 7]].tolist() == [0, 0]  # outside of the grid
    assert values.grad[2:6].tolist() == [1, 1, 1, 1]


def test_zero_is_on_every_grid() -> None:
    for low, high in ((0.3, 2.0), (-3.0, -0.2), (-0.1, 5.0)):
        grid = grid_between(torch.tensor(low), torch.tensor(high), 8)
        assert float(fake_quantise(torch.tensor(0.0), grid)) == 0.0


@pytest.mark.parametrize("bits", [{}, {"layers.1": 4, "heads.0": 4}])
def test_the_runtime_computes_what_was_trained(case: Case, bits: dict[str, int]) -> None:
    student, data, flat = case
    chain = calibrated(student, data, bits)
    graph = integer_graph(flat, chain)
    test = data.splits["test"]
    inputs = data.inputs[test].reshape(len(test), *student.input_shape)
    logits = chain(data.inputs[test])
    wanted, waiting = logits[0], torch.ones(len(test), dtype=torch.bool)
    for number, later in enumerate(logits[1:]):
        waiting = waiting & student.stays(logits[number], number)
        wanted = torch.where(waiting[:, None], later, wanted)
    answer = _last_of(graph)({"inputs": inputs})
    near = (answer - wanted).abs().amax(1) < 1e-3
    assert float(near.float().mean()) > 0.98  # a value halfway between two integers may be rounded to either
    right = float((answer.argmax(-1) == data.labels[test]).float().mean())
    assert right == pytest.approx(accuracy_of(chain, data, test), abs=0.005)
    exact = FakeChain(student)  # without any grid the answers are others: the test can fail
    exact.high += 1e6
    assert not torch.allclose(exact(data.inputs[test])[-1], logits[-1], atol=1e-2)


def test_integers_take_a_quarter_of_the_bytes_and_four_bits_less(case: Case) -> None:
    student, data, flat = case
    eight = integer_graph(flat, calibrated(student, data))
    four = integer_graph(flat, calibrated(student, data, four_bit_layers(student, data)))
    assert weight_bytes(eight) < 0.4 * weight_bytes(flat)
    assert weight_bytes(four) < weight_bytes(eight)
    assert len(four.SerializeToString()) < len(eight.SerializeToString())


def test_layers_without_a_grid_and_grids_without_a_layer_are_refused(case: Case) -> None:
    student, data, flat = case
    chain = calibrated(student, data)
    grids = LayerGrids(chain.activation_grid(0), chain.weight_grid("layers.0"), torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"layer student\.layers\.0\.weight has no grid"):
        with_integers(flat, {})
    every = {f"student.{name}.weight": grids for name in layer_names(student)}
    with pytest.raises(ValueError, match=r"the graph lacks \['student\.layers\.9\.weight'\]"):
        with_integers(flat, every | {"student.layers.9.weight": grids})


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UserError, match="--qat: got 7 steps; allowed: at least 8"):
        AwareConfig(num_steps=7).check()


def test_what_loses_too_much_on_the_grid_is_taken_back(case: Case) -> None:
    student, data, flat = case
    if len(student.exits) != 3:
        return  # one kind of student will do
    inputs = data.inputs.flatten(1)
    opened = ShippedData(
        folder=Path(),
        student=student,
        kind="chain",
        data_name="digits",
        batch=lambda rows: {"inputs": inputs[rows]},
        labels=data.labels,
        splits=data.splits,
        has_length=False,
        card={},
        data=data,
        teacher_logits=lambda: 6.0 * torch.nn.functional.one_hot(data.labels, 10).float(),
    )
    said: list[str] = []
    made = aware_forms(opened, flat, 2, most_lost=1.0, num_steps=8, log=said.append)
    assert [form.name for form in made] == ["int8 aware", "int4 and int8 aware"]
    assert said[0].startswith("int4 and int8 aware: four-bit weights in ")
    said.clear()
    assert aware_forms(opened, flat, 2, most_lost=-1.0, num_steps=8, log=said.append) == []
    assert [line.endswith("taken back") for line in said] == [True, True]


def test_training_on_the_grid_mends_what_rounding_broke(case: Case) -> None:
    student, data, _ = case
    bits = dict.fromkeys([f"layers.{i}" for i in range(len(student.layers))], 2)
    before = accuracy_of(calibrated(student, data, bits), data, data.splits["validation"])
    teacher = 6.0 * torch.nn.functional.one_hot(data.labels, 10).float()
    config = AwareConfig(num_steps=80, learning_rate=3e-3)
    trained = train_aware(student, data, teacher, config, seed=0, bits=bits)
    assert trained.accuracy > before + 0.01
    again = train_aware(student, data, teacher, config, seed=0, bits=bits)
    assert again.accuracy == trained.accuracy
