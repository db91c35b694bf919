"""`rlkd export`: write a shipped student in the form that is deployed, check it, and report what was found."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.compression import CompactStudent
from rlkd.data.goal import limit_ratio
from rlkd.errors import UserError
from rlkd.export import runner as parts_runner
from rlkd.export import surgery
from rlkd.export.card import model_card, scale_line
from rlkd.export.exits import with_threshold
from rlkd.export.flat import BATCH, LAST, LOGITS, Student, flatten, num_early_exits
from rlkd.export.onnx_file import (
    COMPARED_BATCHES,
    EDGE,
    OPSET,
    TOLERANCE,
    Inputs,
    Parity,
    Run,
    compare,
    export_flat,
    quiet_exporter,
    runner_of,
    save_graph,
    session_of,
)
from rlkd.export.triton import write_repository
from rlkd.hardware import Hardware
from rlkd.io.files import write_error, write_whole
from rlkd.io.records import plain, write_json
from rlkd.runs.export_exits import NUM_TRACED, calibrated_exit
from rlkd.runs.export_int8 import add_int8
from rlkd.runs.shipped import ShippedData

TARGETS = ("onnx", "torch", "hf")
EXITS = ("both", "if", "parts")
NUM_COMPARED = 255  # samples whose answers are compared with PyTorch, a multiple of the compared batch
Log = Callable[[str], object]


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks of an export."""

    to: str
    hardware: Hardware
    exits: str = "both"  # an ONNX If for whole batches, a chain of parts for single samples, or both
    exit_accuracy: float | None = None  # on validation
    exit_latency: str | None = None  # of a sample at batch 1: 0.5 or 2x of the time without early exits, or 300us
    tolerance: float = TOLERANCE  # of a logit
    triton: Path | None = None
    name: str = "student"  # in the Triton repository
    int8: bool = False
    most_lost: float = 0.5  # points of accuracy on validation that int8 may lose
    aware_steps: int = 0  # of quantisation-aware distillation

    def check(self) -> None:
        """Raise UserError for what no export can do."""
        for option, value, allowed in (("--to", self.to, TARGETS), ("--exits", self.exits, EXITS)):
            if value not in allowed:
                raise UserError(f"{option}: got {value!r:.40}; allowed: {', '.join(allowed)}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"--tolerance: got {self.tolerance:g}; allowed: above 0, below 1")
        if self.exit_accuracy is not None and self.exit_latency is not None:
            raise UserError("--exit_accuracy, --exit_latency: got both; allowed: one, by which the threshold is chosen")
        if self.exit_latency is not None:
            limit_ratio("latency", self.exit_latency, 1.0, option="--exit_latency")
        if self.triton is not None and (self.to, self.exits) not in (("onnx", "both"), ("onnx", "if")):
            raise UserError(
                f"--triton: got --to {self.to} --exits {self.exits}; allowed: --to onnx with --exits both or if"
            )
        if self.int8 and self.to != "onnx":
            raise UserError(f"--int8: got --to {self.to}; allowed: with --to onnx")
        if self.aware_steps and not self.int8:
            raise UserError("--qat: got it without --int8; allowed: with --int8")
        if self.aware_steps < 0:
            raise UserError(f"--qat: got {self.aware_steps}; allowed: steps of training, 0 for none")
        if not 0 <= self.most_lost <= 100:
            raise UserError(f"--most_lost: got {self.most_lost:g}; allowed: 0 to 100 points")
        if "float32" not in self.hardware.precisions:
            raise UserError(
                f"--hardware: {self.hardware.name} takes {', '.join(self.hardware.precisions)}; allowed: a target that "
                "takes float32"
            )


@dataclass(frozen=True)
class ExportedForm:
    """What one form of export left in its folder."""

    files: dict[str, str]  # what each file is, by name
    interface: list[str]  # a line for each input and output
    notes: list[str]  # what was found, a line each
    usage: str
    record: dict[str, Any]  # for export.json


def export_student(opened: ShippedData, options: ExportOptions, out: Path, log: Log) -> dict[str, Any]:
    """Write the student into `out`, with a model card and export.json; returns what export.json has.

    Raises:
        UserError: the student cannot be had in this form, or does not agree with PyTorch.
    """
    options.check()
    if options.to == "hf" and opened.kind == "chain":
        raise UserError("--to: got hf for a chain, which transformers has no class for; allowed: onnx, torch")
    notes = []
    record: dict[str, Any] = {
        "format": 1,
        "to": options.to,
        "hardware": options.hardware.name,
        "data": opened.data_name,
    }
    chosen = calibrated_exit(opened, options.exit_accuracy, options.exit_latency, options.hardware.threads)
    if chosen is not None:
        notes.append(chosen.line())
        record["exits"] = plain(chosen)
        opened = opened.with_student(with_threshold(opened.student, chosen.threshold))
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_earlier(out)
    except OSError as error:
        raise write_error(out, error) from error
    written = {"onnx": _to_onnx, "torch": _to_torch, "hf": _to_transformers}[options.to](opened, options, out)
    notes += written.notes
    text = model_card(
        title=f"{opened.folder.parent.name or 'student'}: a distilled student ({options.to})",
        data_name=opened.data_name,
        card=opened.card,
        files=written.files,
        inputs=[*written.interface, scale_line(opened.card.get("input_scale"))],
        notes=notes,
        usage=written.usage,
    )
    write_whole(out / "README.md", text)
    record |= {**written.record, "files": list(written.files), "notes": notes}
    write_json(out / "export.json", record)
    for line in notes:
        log(line)
    return record


def _remove_earlier(out: Path) -> None:
    """Remove the graphs of an earlier export into the same folder, which this one may not write again."""
    for path in (out / "model.onnx", out / "model_int8.onnx", *(out / "parts").glob("part_*.onnx")):
        path.unlink(missing_ok=True)
    for name in ("parts.json", "runner.py"):
        (out / "parts" / name).unlink(missing_ok=True)


def _to_onnx(opened: ShippedData, options: ExportOptions, out: Path) -> ExportedForm:
    """Write model.onnx, and the parts of a student with early exits."""
    student, traced = opened.student, opened.batch(opened.few("validation", NUM_TRACED))
    num_early = num_early_exits(student)
    flat = export_flat(student, traced, opened.has_length)
    uses_parts = num_early > 0 and options.exits != "if" and not opened.is_causal
    uses_if = options.exits != "parts" or not uses_parts
    files: dict[str, str] = {}
    record: dict[str, Any] = {}
    notes = [f"ONNX opset {OPSET}, dynamic batch{' and length' * opened.has_length}"]
    interface = _interface(flat.graph.input, flat.graph.output[-1:])
    usage = ""
    if uses_if:
        graph = surgery.fold_exits(flat, num_early)
        check_operators(surgery.operators_of(graph), options.hardware)
        save_graph(graph, out / "model.onnx")
        parity = _checked(
            runner_of(session_of(out / "model.onnx", options.hardware.threads)), opened, options, "model.onnx"
        )
        what = "the student; the blocks behind an exit run while a sample of the batch still waits"
        files["model.onnx"] = what if num_early else "the student"
        notes.append(f"model.onnx: {parity.line()}")
        record |= {"parity": plain(parity), "operators": surgery.operators_of(graph)}
        if options.triton is not None:
            place = write_repository(graph, options.triton, options.name, options.hardware)
            notes.append(f"Triton model repository: {place}")
        usage = ONNX_USAGE.format(given=", ".join(f"{name!r}: {name}" for name in traced))
    if uses_parts:
        parts = surgery.split_parts(flat, num_early)
        check_operators(sorted({name for part in parts for name in surgery.operators_of(part)}), options.hardware)
        write_parts(parts, out / "parts")
        run = parts_run(parts_runner.PartsRunner(out / "parts", options.hardware.threads))
        parity = _checked(run, opened, options, "parts")
        files["parts/"] = "one graph for each exit, and runner.py, by which every sample leaves on its own"
        notes.append(f"parts: {parity.line()}")
        record["parity_of_parts"] = plain(parity)
        usage += PARTS_USAGE.format(given=", ".join(f"{name!r}: {name}" for name in traced))
    if options.int8:
        found = add_int8(
            opened,
            flat,
            num_early,
            hardware=options.hardware,
            most_lost=options.most_lost / 100,
            aware_steps=options.aware_steps,
            out=out,
            log=notes.append,
        )
        record["int8"] = found
        if found["written"]:
            files["model_int8.onnx"] = f"the same as model.onnx, {found['written']}"
    return ExportedForm(files, interface, notes, usage, {**record, "opset": OPSET, "num_early_exits": num_early})


ONNX_USAGE = """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {{{given}}})
"""
PARTS_USAGE = """
from parts.runner import PartsRunner

logits, exits = PartsRunner("parts")({{{given}}})
"""
TORCH_USAGE = """import torch

student = torch.export.load("model.pt2").module()
logits = student({given})
"""
HF_USAGE = """from transformers import {auto}

model = {auto}.from_pretrained("model")
"""


def check_operators(used: Sequence[str], hardware: Hardware) -> None:
    """Raise UserError for operators of a graph that the target lacks."""
    missing = hardware.missing_operators(used)
    if not missing:
        return
    mend = "give --exits parts, which needs no If" if missing == ["If"] else "choose another target or student"
    raise UserError(f"--hardware: {hardware.name} lacks {', '.join(missing)}, which this student's graph uses; {mend}")


def write_parts(parts: Sequence[Any], folder: Path) -> None:
    """Write the graphs of a chain of parts, the list of them, and the runner."""
    names = [f"part_{number}.onnx" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_graph(part, folder / name)
    write_whole(folder / "parts.json", json.dumps({"parts": names}) + "\n")
    write_whole(folder / "runner.py", Path(parts_runner.__file__).read_text())


def parts_run(runner: parts_runner.PartsRunner) -> Run:
    """Return a function from inputs by name to the logits of a chain of parts."""

    def run(inputs: Inputs) -> Tensor:
        logits, _ = runner({name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return run


def _interface(inputs: Any, outputs: Any) -> list[str]:
    """Return a line for each input and output of a graph."""
    import onnx

    lines = []
    for word, values in (("input", inputs), ("output", outputs)):
        for value in values:
            tensor = value.type.tensor_type
            shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            name = LOGITS if value.name == LAST else value.name
            lines.append(f"{word} `{name}`: {kind} [{shape}]")
    return lines


def _checked(run: Run, opened: ShippedData, options: ExportOptions, what: str) -> Parity:
    """Compare a form with PyTorch on test samples.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    student = opened.student
    students: list[Student] = [student]
    if num_early_exits(student) and not (isinstance(student, CompactStudent) and len(student.gates)):
        threshold = student.threshold if isinstance(student, CompactStudent) else student.shipment.threshold
        students += [with_threshold(student, threshold + shift) for shift in (-EDGE, EDGE)]
    index = opened.few("test", NUM_COMPARED if len(opened.splits["test"]) >= COMPARED_BATCHES[-1] else None)
    if len(index) < COMPARED_BATCHES[-1]:
        index = index.repeat(-(-COMPARED_BATCHES[-1] // len(index)))
    parity = compare(run, students, opened.batch, index, _real_tokens if opened.is_causal else _all)
    if parity.largest > options.tolerance:
        raise UserError(
            f"{what}: differs from PyTorch by {parity.largest:.2e} on real samples; allowed: {options.tolerance:g} "
            "(--tolerance); do not deploy it"
        )
    return parity


def _all(inputs: Inputs) -> Tensor | None:
    return None


def _real_tokens(inputs: Inputs) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


class _Answer(nn.Module):
    """A flat student that gives its logits alone."""

    def __init__(self, flat: nn.Module) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, *values: Tensor) -> Tensor:
        """Return the logits."""
        answer: Tensor = self.flat(*values)[-1]
        return answer


def _to_torch(opened: ShippedData, options: ExportOptions, out: Path) -> ExportedForm:
    """Write model.pt2, a program of torch.export."""
    traced = opened.batch(opened.few("validation", NUM_TRACED))
    batch, length = torch.export.Dim(BATCH), torch.export.Dim("length")
    shapes = tuple({0: batch, **({1: length} if opened.has_length else {})} for _ in traced)
    flat = _Answer(flatten(opened.student, list(traced))).eval()
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.export.export(flat, tuple(traced.values()), dynamic_shapes=(shapes,))
            torch.export.save(program, out / "model.pt2")
            loaded = torch.export.load(out / "model.pt2").module()
    except OSError as error:
        raise write_error(out / "model.pt2", error) from error
    except Exception as error:  # the exporter raises errors of many kinds for what it cannot follow
        line = " ".join(str(error).split())
        raise UserError(f"torch: cannot export this student ({type(error).__name__}: {line:.200})") from error

    @torch.inference_mode()
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        answer: Tensor = loaded(*inputs.values())
        return answer

    parity = _checked(run, opened, options, "model.pt2")
    notes = [f"torch {torch.__version__}, dynamic batch{' and length' * opened.has_length}; {parity.line()}"]
    if num_early_exits(opened.student):
        notes.append("early exits decide who is answered where, but every block runs: --to onnx stops early")
    shapes_of = [
        f"input `{name}`: {str(v.dtype).removeprefix('torch.')} {list(v.shape[1:])}" for name, v in traced.items()
    ]
    usage = TORCH_USAGE.format(given=", ".join(traced))
    record = {"parity": plain(parity), "torch": torch.__version__}
    return ExportedForm({"model.pt2": "a program of torch.export"}, shapes_of, notes, usage, record)


def check_plain(folder: Path) -> None:
    """Raise UserError for a real student whose `model/` is no plain folder of transformers."""
    from rlkd.compression.real.student_folder import PLAIN

    if not (folder / PLAIN).exists():
        raise UserError(
            "--to: got hf for a student whose sizes transformers' configuration cannot say (heads, channels or blocks "
            "are cut out of it); allowed: onnx, torch"
        )


def _to_transformers(opened: ShippedData, options: ExportOptions, out: Path) -> ExportedForm:
    """Copy the model's folder, which transformers loads as it is, and check what it answers there."""
    from rlkd.compression.real.shipped import ShippedStudent
    from rlkd.models.real.hooks import forward, logits_of
    from rlkd.models.real.pretrained import AUTO_CLASSES, Kind, load_model

    student = opened.student
    assert isinstance(student, ShippedStudent)
    check_plain(opened.folder)
    try:
        shutil.copytree(opened.folder / "model", out / "model", dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise UserError(f"{out / 'model'}: cannot copy the model ({error!s:.120})") from error
    kind: Kind = student.shipment.kind
    loaded = load_model(str(out / "model"), kind)

    @torch.inference_mode()
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return logits_of(forward(loaded, inputs)).float()

    notes = []
    shipment = student.shipment
    record: dict[str, Any] = {}
    if shipment.select_after is None or shipment.keep >= 1.0:
        whole = with_threshold(student, 1.0)
        parity = _checked(run, opened.with_student(whole), options, "model")
        notes.append(parity.line())
        record["parity"] = plain(parity)
    test = opened.few("test")
    accuracy = opened.accuracy(run, test)
    record["accuracy"] = accuracy
    if num_early_exits(student) or record.get("parity") is None:
        notes.append(
            "transformers runs the whole model: early exits and left-out tokens are not used, and accuracy on "
            f"{len(test)} test samples is {accuracy:.4f}; --to onnx carries them"
        )
    usage = HF_USAGE.format(auto=AUTO_CLASSES[kind])
    return ExportedForm({"model/": "a folder of transformers"}, [], notes, usage, record)
