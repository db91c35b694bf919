"""Early exits of exported graphs stop early, and answer as the student does."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_students
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")
import onnxruntime

from rlkd.compression import CompactStudent
from rlkd.data import DataSet
from rlkd.errors import UserError
from rlkd.export import surgery
from rlkd.export.exits import calibrate, with_threshold
from rlkd.export.onnx_file import compare, export_flat, runner_of, save_graph, session_of, torch_runner
from rlkd.export.runner import PartsRunner
from rlkd.export.triton import configuration
from rlkd.hardware import load_hardware
from rlkd.runs.export import write_parts

Flat = tuple[CompactStudent, DataSet, Any]


@pytest.fixture(scope="module")
def flat() -> Flat:
    student, data = small_students.trained_chain()
    return student, data, export_flat(student, {"inputs": data.inputs[:3].flatten(1)}, dynamic_length=False)


def exits_of(student: CompactStudent, inputs: torch.Tensor) -> list[int]:
    """At which exit, from 1, each sample leaves, one sample at a time."""
    taken = []
    for row in inputs:
        calls: list[int] = []
        hooks = [head.register_forward_hook(lambda *_, c=calls: c.append(1)) for head in student.heads]
        with torch.no_grad():
            student(row[None])
        for hook in hooks:
            hook.remove()
        taken.append(len(calls))
    return taken


def test_blocks_behind_an_exit_do_not_run_once_all_have_left(flat: Flat, tmp_path: Path) -> None:
    student, data, graph = flat
    save_graph(surgery.fold_exits(graph, 2), tmp_path / "model.onnx")
    inputs = data.inputs[data.splits["test"][:60]].flatten(1)
    taken = exits_of(student, inputs)
    assert set(taken) == {1, 2, 3}  # the case is worth its name
    for exit_number, num_gemms in ((1, 2), (2, 4), (3, 6)):  # a layer and a head up to each exit
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile{exit_number}")
        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, ["CPUExecutionProvider"])
        row = inputs[taken.index(exit_number)][None]
        (logits,) = session.run(None, {"inputs": row.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [e["args"].get("op_name", "") for e in events if e.get("cat") == "Node" and "kernel_time" in e["name"]]
        assert sum("Gemm" in name for name in ran) == num_gemms
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), student(row))


@pytest.mark.parametrize("size", [1, 17])
def test_the_folded_graph_answers_as_the_student(flat: Flat, size: int) -> None:
    student, data, graph = flat
    run = runner_of(session_of(surgery.fold_exits(graph, 2)))
    inputs = data.inputs[data.splits["test"][:size]].flatten(1)
    with torch.no_grad():
        torch.testing.assert_close(run({"inputs": inputs}), student(inputs), atol=1e-5, rtol=1e-5)


def test_in_parts_every_sample_leaves_on_its_own(flat: Flat, tmp_path: Path) -> None:
    student, data, graph = flat
    write_parts(surgery.split_parts(graph, 2), tmp_path)
    runner = PartsRunner(tmp_path)
    inputs = data.inputs[data.splits["test"][:60]].flatten(1)
    logits, exits = runner({"inputs": inputs.numpy()})
    assert exits.tolist() == exits_of(student, inputs)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), student(inputs), atol=1e-5, rtol=1e-5)
    sizes = []
    for part in runner._parts:  # what each part was given
        names = [value.name for value in part.get_inputs()]
        sizes.append(names)
    assert sizes[0] == ["inputs"]
    assert all("inputs" not in names for names in sizes[1:])  # no part reads the input again


def test_parts_behind_an_exit_do_not_run_once_all_have_left(flat: Flat, tmp_path: Path) -> None:
    student, data, graph = flat
    write_parts(surgery.split_parts(graph, 2), tmp_path)
    runner = PartsRunner(tmp_path)
    inputs = data.inputs[data.splits["test"][:60]].flatten(1)
    leaves_first = inputs[exits_of(student, inputs).index(1)][None]
    runner._parts[1:] = [None, None]  # a call of one of them would raise
    _, exits = runner({"inputs": leaves_first.numpy()})
    assert exits.tolist() == [1]


@pytest.mark.parametrize("answer", [float("nan"), float("inf")])
def test_an_answer_that_is_no_number_differs_from_every_student(flat: Flat, answer: float) -> None:
    student, data, _ = flat
    broken = lambda inputs: torch.full((len(inputs["inputs"]), 10), answer)  # noqa: E731
    index = data.splits["test"][:17]
    parity = compare(broken, [student], lambda rows: {"inputs": data.inputs[rows].flatten(1)}, index)
    assert parity.largest > 1e38


def test_a_sample_at_the_threshold_may_leave_on_either_side_of_it(flat: Flat) -> None:
    student, data, _ = flat
    other = with_threshold(student, 0.8)
    index = data.splits["test"][:51]

    def batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs": data.inputs[rows].flatten(1)}

    alone = compare(torch_runner(other), [student], batch, index)
    assert alone.largest > 1e-2  # some samples leave elsewhere
    assert alone.num_on_edge == 0
    both = compare(torch_runner(other), [student, other], batch, index)
    assert both.largest == 0.0
    assert both.num_on_edge > 0


def test_requests_stand_in_one_batch_where_sizes_are_fixed(flat: Flat) -> None:
    graph = surgery.fold_exits(flat[2], 2)
    cpu = load_hardware("cpu")
    assert "dynamic_batching" in configuration(graph, "tiny", cpu)
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    text = configuration(graph, "tiny", cpu)
    assert "dynamic_batching" not in text
    assert "dims: [ -1 ]" in text


def test_a_graph_without_early_exits_stays_straight(flat: Flat) -> None:
    _, data, _ = flat
    student, _ = small_students.trained_chain(exits=(), num_steps=1)
    graph = surgery.fold_exits(export_flat(student, {"inputs": data.inputs[:3].flatten(1)}, False), 0)
    assert "If" not in surgery.operators_of(graph)
    assert [value.name for value in graph.graph.output] == ["logits"]


def test_gates_decide_in_the_exported_graph_too() -> None:
    student, data = small_students.trained_chain(exits=(1,), gated=True)
    assert len(student.gates) == 1
    inputs = data.inputs[data.splits["test"][:51]].flatten(1)
    assert set(exits_of(student, inputs)) == {1, 2}
    run = runner_of(session_of(surgery.fold_exits(export_flat(student, {"inputs": inputs[:3]}, False), 1)))
    with torch.no_grad():
        torch.testing.assert_close(run({"inputs": inputs}), student(inputs), atol=1e-5, rtol=1e-5)
    asked = {"inputs": inputs}
    gated = with_threshold(student, 0.0)  # gates decide, whatever the threshold
    with torch.no_grad():
        torch.testing.assert_close(gated(inputs), student(inputs))
    with pytest.raises(UserError, match="gates decide at its exits; leave the option out"):
        calibrate(student, lambda rows: {"inputs": asked["inputs"][rows]}, torch.arange(51), data.labels, 0.9)
