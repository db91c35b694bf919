"""Post-training int8: smaller, as accurate, and taken back where it is not."""

from typing import Any

import pytest
import small_students
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")

from rlkd.export.int8 import METHODS, layers_of, quantise, sensitivities, within
from rlkd.export.onnx_file import export_flat
from rlkd.export.surgery import fold_exits, operators_of, split_parts
from rlkd.runs.export_int8 import _last_of, weight_bytes

Case = tuple[Any, list[dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    """A straight graph, training batches, and validation samples with their labels."""
    student, data = small_students.trained_chain(widths=(48, 48, 24))
    flat = export_flat(student, {"inputs": data.inputs[:3].flatten(1)}, dynamic_length=False)
    batches = [{"inputs": data.inputs[rows].flatten(1)} for rows in data.splits["train"][:128].split(32)]
    validation = data.splits["validation"]
    return flat, batches, data.inputs[validation].flatten(1), data.labels[validation]


def accuracy(graph: Any, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    return float((_last_of(graph)({"inputs": inputs}).argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("method", METHODS)
def test_int8_is_smaller_and_nearly_as_accurate(case: Case, method: Any) -> None:
    flat, batches, inputs, labels = case
    made = quantise(flat, method, batches)
    assert len(layers_of(flat, method)) == 6
    assert accuracy(made.graph, inputs, labels) > accuracy(flat, inputs, labels) - 0.02
    assert weight_bytes(made.graph) < 0.45 * weight_bytes(flat)
    used = operators_of(made.graph)
    assert ("DynamicQuantizeLinear" if method == "dynamic" else "QuantizeLinear") in used
    assert "If" in operators_of(fold_exits(made.graph, 2))
    assert len(split_parts(made.graph, 2)) == 3


def test_a_layer_that_stays_in_float_is_in_float(case: Case) -> None:
    flat, batches, _, _ = case
    first = layers_of(flat, "static")[0]
    all_in, without = (quantise(flat, "static", batches, kept) for kept in ([], [first]))
    assert weight_bytes(without.graph) > weight_bytes(all_in.graph)
    assert without.kept_float == (first,)


def test_the_most_sensitive_layers_go_back_first(case: Case) -> None:
    flat, batches, inputs, _ = case
    probe = {"inputs": inputs[:64]}
    moved = sensitivities(flat, "static", batches, probe)
    order = sorted(moved, key=lambda name: -moved[name])
    assert len(order) == 6
    assert min(moved.values()) > 0
    said: list[str] = []
    losses = iter([0.03, 0.02, 0.001])  # of all layers, without one, without two
    found = within(flat, "static", batches, probe, lambda graph: next(losses), 0.005, said.append)
    assert found is not None
    assert found[0].kept_float == tuple(order[:2])
    assert found[1] == 0.001
    assert said[0] == "int8 static: all layers lose 3.00 points, more than 0.5; taken back"
    assert "2 of 6 layers stay in float32" in said[1]


def test_int8_is_given_up_where_half_of_the_layers_do_not_mend_it(case: Case) -> None:
    flat, batches, inputs, _ = case
    said: list[str] = []
    assert within(flat, "dynamic", batches, {"inputs": inputs[:8]}, lambda graph: 0.04, 0.005, said.append) is None
    assert said[-1] == "int8 dynamic: loses 4.00 points with 3 layers in float32; taken back"
