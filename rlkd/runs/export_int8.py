"""The int8 form of an exported student: all methods are tried, the fastest ships that loses little enough."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.compression import CompactStudent
from rlkd.compression.real.shipped import ShippedStudent
from rlkd.cost.timing import time_calls
from rlkd.errors import UserError
from rlkd.export import surgery
from rlkd.export.aware import AwareConfig, FakeChain, GridTask, four_bit_layers, train_aware, train_on_grid
from rlkd.export.dynamic_grid import FakeDynamic
from rlkd.export.int8 import METHODS, NUM_CALIBRATED, NUM_SENSITIVE, layers_of, quantise, tables_of, within
from rlkd.export.onnx_file import Inputs, Run, export_flat, runner_of, save_graph, session_of
from rlkd.export.qdq import LayerGrids, with_integers
from rlkd.hardware import Hardware
from rlkd.runs.export_exits import NUM_TRACED
from rlkd.runs.shipped import ShippedData

CALIBRATED_AT_ONCE = 32
NUM_ROUNDS = 21
REAL_BATCH_SIZE, REAL_LEARNING_RATE = 16, 5e-5  # of real students on the grid
AS_FAST = 1.05  # times the fastest form's latency, within which the form ships that loses least
Log = Callable[[str], object]


@dataclass(frozen=True)
class Form:
    """One form of the student, with what it reaches."""

    name: str  # "float32", "int8 dynamic" or "int8 static"
    graph: Any  # with its early exits
    straight: Any  # without
    lost: float  # accuracy on validation that it loses against float32, a share
    kept_float: tuple[str, ...] = ()


def int8_forms(opened: ShippedData, flat: Any, num_early: int, most_lost: float, log: Log) -> list[Form]:
    """Return the float form and those int8 forms that lose at most `most_lost` on validation.

    Args:
        opened: the student with its data.
        flat: its straight float graph.
        num_early: its early exits.
        most_lost: share of accuracy.
        log: called with a line for everything that is taken back.
    """
    train, validation = opened.splits["train"][:NUM_CALIBRATED], opened.few("validation")
    batches = [opened.batch(rows) for rows in torch.split(train, CALIBRATED_AT_ONCE)]
    probe = opened.batch(validation[:NUM_SENSITIVE])
    reference = opened.accuracy(_last_of(flat), validation)

    def loss_of(graph: Any) -> float:
        return reference - opened.accuracy(_last_of(graph), validation)

    forms = [Form("float32", surgery.fold_exits(flat, num_early), flat, 0.0)]
    for method in METHODS:
        if not layers_of(flat, method):
            log(f"int8 {method}: this graph has no layer for it")
            continue
        found = within(flat, method, batches, probe, loss_of, most_lost, log)
        if found is not None:
            made, lost = found
            folded = surgery.fold_exits(made.graph, num_early)
            forms.append(Form(f"int8 {method}", folded, made.graph, lost, made.kept_float))
    return forms


def aware_forms(
    opened: ShippedData, flat: Any, num_early: int, *, most_lost: float, num_steps: int, log: Log, seed: int = 0
) -> list[Form]:
    """Return the forms of quantisation-aware distillation that lose little enough.

    A chain is trained on two grids, all in int8, and mixed with int4; a real classifier on that of dynamic int8.

    Args:
        opened: a student whose run names its teacher.
        flat, num_early, most_lost, log: as in `int8_forms`.
        num_steps: of the training.
        seed: of its batches.

    Raises:
        UserError: the student is a language model, or its teacher is not named.
    """
    if opened.is_causal:
        raise UserError("--qat: got a language model; allowed: chains and classifiers")
    if (opened.teacher_logits or opened.open_teacher) is None:
        raise UserError(
            f"--qat: got a {opened.kind.replace('_', ' ')} student without a named teacher; allowed: the run folder of "
            "`rlkd distil` with a teacher that has weights"
        )
    trained = _aware_chains if opened.kind == "chain" else _aware_real
    reference = opened.accuracy(_last_of(flat), opened.few("validation"))
    forms = []
    for name, straight, note in trained(opened, flat, num_steps, seed):
        lost = reference - opened.accuracy(_last_of(straight), opened.few("validation"))
        if lost > most_lost:
            log(f"{name}: loses {100 * lost:.2f} points, more than {100 * most_lost:g}; taken back")
            continue
        forms.append(Form(name, surgery.fold_exits(straight, num_early), straight, lost))
        if note:
            log(f"{name}: {note}")
    return forms


Trained = Iterator[tuple[str, Any, str]]  # name, straight graph, and what the log says of it


def _aware_chains(opened: ShippedData, flat: Any, num_steps: int, seed: int) -> Trained:
    """Train a chain on its two grids."""
    data, student, teacher_logits = opened.data, opened.student, opened.teacher_logits
    assert isinstance(student, CompactStudent)
    assert data is not None
    assert teacher_logits is not None
    logits, config = teacher_logits(), AwareConfig(num_steps=num_steps)
    for name, bits in (("int8 aware", {}), ("int4 and int8 aware", four_bit_layers(student, data))):
        trained = train_aware(student, data, logits, config, seed, bits)
        yield name, integer_graph(flat, trained.chain), f"four-bit weights in {', '.join(bits)}" if bits else ""


def _aware_real(opened: ShippedData, flat: Any, num_steps: int, seed: int) -> Trained:
    """Train a real classifier on the grid of dynamic int8.

    Raises:
        UserError: its graph has layers that the training does not round.
    """
    student = opened.student
    assert isinstance(student, ShippedStudent)
    assert opened.open_teacher is not None
    config = AwareConfig(num_steps, batch_size=REAL_BATCH_SIZE, learning_rate=REAL_LEARNING_RATE)
    validation = opened.few("validation")
    traced = opened.batch(validation[:NUM_TRACED])
    fake = FakeDynamic(student, list(traced))
    with torch.no_grad():
        fake(traced)
    num_layers = len(layers_of(flat, "dynamic"))
    if not num_layers or fake.num_layers != num_layers:
        raise UserError(
            f"--qat: the graph has {num_layers} layers for dynamic int8, of which the training rounds "
            f"{fake.num_layers}; allowed: students whose int8 layers are all nn.Linear"
        )

    tables = tables_of(flat)
    kept_float: Sequence[str] = ()
    if fake.num_lookups != len(tables):  # the graph has one of them as a constant, say
        fake, kept_float = FakeDynamic(student, list(traced), rounds_tables=False), tables

    @torch.no_grad()
    def run(inputs: Inputs) -> Tensor:
        logits: Tensor = fake(inputs)
        return logits

    task = GridTask(
        exit_logits=lambda rows, _: fake.exit_logits(opened.batch(rows)),
        teacher_logits=opened.open_teacher(),
        accuracy=lambda: opened.accuracy(run, validation),
        labels=opened.labels,
        train=opened.splits["train"],
    )
    best = train_on_grid(fake, list(fake.parameters()), task, config, seed)
    graph = quantise(export_flat(fake.student, traced, opened.has_length), "dynamic", [], kept_float).graph
    yield "int8 aware dynamic", graph, f"{100 * best:.2f} % right on validation as it was trained"


def integer_graph(flat: Any, chain: FakeChain) -> Any:
    """Return the straight graph of a chain as it computes on its grid."""
    student = chain.student
    blocks = {f"layers.{i}": i for i in range(len(student.layers))}
    blocks |= {f"heads.{i}": block for i, block in enumerate(student.exits)}
    grids = {}
    for name, block in blocks.items():
        layer: Any = student.get_submodule(name)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        grids[f"student.{name}.weight"] = LayerGrids(
            chain.activation_grid(block), chain.weight_grid(name), weight, bias
        )
    return with_integers(flat, grids)


def _last_of(graph: Any) -> Run:
    """Return a function from inputs to the last output of a straight graph."""
    session = session_of(graph)
    names, last = [value.name for value in session.get_inputs()], session.get_outputs()[-1].name

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run([last], {name: inputs[name].numpy() for name in names})[0])

    return run


def add_int8(
    opened: ShippedData,
    flat: Any,
    num_early: int,
    *,
    hardware: Hardware,
    most_lost: float,
    aware_steps: int,
    out: Path,
    log: Log,
) -> dict[str, Any]:
    """Write model_int8.onnx, where an int8 form loses little enough, and log what it loses and gains.

    Args:
        opened: the student with its data.
        flat: its straight float graph.
        num_early: its early exits.
        hardware: gives batches and threads.
        most_lost: share of accuracy on validation that int8 may lose.
        aware_steps: of quantisation-aware distillation; 0: after the training alone.
        out: folder.
        log: called with a line for everything that was found.

    Returns:
        The forms with bytes, loss and latency, and which one was written.

    Raises:
        UserError: the target takes no int8.
    """
    if "int8" not in hardware.precisions:
        raise UserError(
            f"--int8: {hardware.name} takes {', '.join(hardware.precisions)}; allowed: a target that takes int8"
        )
    forms = int8_forms(opened, flat, num_early, most_lost, log)
    if aware_steps:
        forms += aware_forms(opened, flat, num_early, most_lost=most_lost, num_steps=aware_steps, log=log)
    forms = [forms[0], *(form for form in forms[1:] if _runs_on(form, hardware, log))]
    test = opened.few("test")
    timed = [_latency_s(forms, opened, size, hardware.threads) for size in hardware.batch_sizes]
    rows: list[dict[str, Any]] = []
    for index, form in enumerate(forms):
        session = session_of(form.graph, hardware.threads)
        latency = {str(size): row[index] for size, row in zip(hardware.batch_sizes, timed, strict=True)}
        rows.append(
            {
                "form": form.name,
                "weight_bytes": weight_bytes(form.graph),
                "points_lost_on_validation": 100 * form.lost,
                "test_accuracy": opened.accuracy(runner_of(session), test),
                "latency_s": latency,
                "kept_float": list(form.kept_float),
            }
        )
    record: dict[str, Any] = {"forms": rows, "written": None}
    if len(forms) == 1:
        log(
            f"int8 was taken back: no form that runs on {hardware.name} loses at most {100 * most_lost:g} points; "
            "float32 ships alone"
        )
        return record
    first = str(hardware.batch_sizes[0])
    best = chosen_form(rows, first)
    save_graph(forms[best].graph, out / "model_int8.onnx")
    record["written"] = rows[best]["form"]
    for row in rows[1:]:
        log(_line(row, rows[0]))
    slower = [size for size in latency if rows[best]["latency_s"][size] > rows[0]["latency_s"][size]]
    if slower:
        log(f"note: int8 is slower than float32 here at batch {', '.join(slower)}; it gains size alone")
    return record


def chosen_form(rows: Sequence[Mapping[str, Any]], batch_size: str) -> int:
    """Return the index of the form that ships: of those nearly as fast as the fastest, the one that loses least.

    Args:
        rows: of all forms as `add_int8` returns them, float32 first, which is not chosen.
        batch_size: at which latencies count.
    """
    most_s = AS_FAST * min(row["latency_s"][batch_size] for row in rows[1:])
    fast = [index for index in range(1, len(rows)) if rows[index]["latency_s"][batch_size] <= most_s]
    return min(fast, key=lambda index: float(rows[index]["points_lost_on_validation"]))


def _runs_on(form: Form, hardware: Hardware, log: Log) -> bool:
    """Whether the target has all operators of a form; log which ones it lacks."""
    missing = hardware.missing_operators(surgery.operators_of(form.graph))
    if missing:
        log(f"{form.name}: {hardware.name} lacks {', '.join(missing)}; left out")
    return not missing


def _line(row: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    speeds = [
        f"{reference['latency_s'][size] / seconds:.2f} times as fast at batch {size}"
        for size, seconds in row["latency_s"].items()
    ]
    return (
        f"{row['form']}: weights {reference['weight_bytes'] / row['weight_bytes']:.2f} times smaller, "
        f"{row['points_lost_on_validation']:.2f} points lost on validation, {', '.join(speeds)}"
    )


def weight_bytes(graph: Any) -> int:
    """Return the bytes of all tensors that a graph stores: weights, biases, scales and constants."""
    import onnx

    bits = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT4: 4}
    total = 0
    for tensor in graph.graph.initializer:
        width = bits.get(tensor.data_type, 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        total += -(-math.prod(tensor.dims) * width // 8)
    return total


def _latency_s(forms: Sequence[Form], opened: ShippedData, batch_size: int, threads: int) -> list[float]:
    """Return the median seconds of a batch of each form, timed against each other."""
    test = opened.splits["test"]
    inputs = opened.batch(test[torch.arange(batch_size) % len(test)])
    given = {name: value.numpy() for name, value in inputs.items()}
    calls: list[Callable[[], object]] = [partial(session_of(f.graph, threads).run, None, given) for f in forms]
    return [latency.median_s for latency in time_calls(calls, NUM_ROUNDS)]
