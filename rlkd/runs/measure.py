"""`rlkd measure`: a shipped student in PyTorch and in onnxruntime, beside another student or a teacher."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.compression import compact
from rlkd.errors import UserError
from rlkd.export import surgery
from rlkd.export.flat import num_early_exits
from rlkd.export.measure import CPU, NUM_COUNTED, MeasuredForm, count_macs, measure, parameters_of
from rlkd.export.onnx_file import export_flat, runner_of, session_of, torch_runner_on
from rlkd.hardware import Hardware
from rlkd.runs.export_exits import NUM_TRACED
from rlkd.runs.shipped import ShippedData, open_real_teacher

TEACHER = "teacher"
INT8_FILE = "model_int8.onnx"


def measure_student(
    opened: ShippedData,
    reload: Callable[[], ShippedData],
    against: ShippedData | None,
    hardware: Hardware,
    batch_sizes: tuple[int, ...],
) -> dict[str, Any]:
    """Return what was measured of a student, and of another one on the same data.

    Args:
        opened: the student.
        reload: opens it anew, to see what memory it takes.
        against: another student or a teacher; None: the student alone.
        hardware: gives threads and device.
        batch_sizes: samples that one call answers.
    """
    device = torch.device("cpu" if hardware.device == "cpu" else "cuda")
    forms = forms_of(opened, "student", hardware.threads, reload, device)
    if against is not None:
        forms += forms_of(against, "against", hardware.threads, lambda: against, device)
    test = opened.splits["test"]

    def batch(size: int) -> Mapping[str, Tensor]:
        return opened.batch(test[torch.arange(size) % len(test)])

    rows = measure(forms, batch, batch_sizes, hardware.threads, device=device)
    return {
        "format": 1,
        "data": opened.data_name,
        "hardware": hardware.name,
        "threads": hardware.threads,
        "torch": torch.__version__,
        "forms": rows,
    }


def forms_of(
    opened: ShippedData, label: str, threads: int, reload: Callable[[], ShippedData], device: torch.device = CPU
) -> list[MeasuredForm]:
    """Return a student's forms: torch, onnxruntime, and the int8 file that `rlkd export --int8` left beside it.

    On a GPU it is torch alone: the extra `onnx` has the onnxruntime of the CPU.
    """
    student, test = opened.student, opened.few("test")
    num_early = num_early_exits(student)
    run = torch_runner_on(student, device)
    counted = test[: NUM_COUNTED if num_early else 1]
    macs = count_macs(run, [opened.batch(row[None]) for row in counted])
    number = parameters_of(student)
    place = opened.folder / "student.safetensors"
    weights = [place] if place.exists() else sorted((opened.folder / "model").glob("*.safetensors"))
    torch_bytes = sum(path.stat().st_size for path in weights)
    forms = [
        MeasuredForm(
            f"{label}, torch",
            lambda: torch_runner_on(reload().student, device),
            torch_bytes or None,
            number,
            macs,
            "float32",
            opened.accuracy(run, test),
        ),
    ]
    if device.type != "cpu":
        return forms
    flat = export_flat(student, opened.batch(opened.few("validation", NUM_TRACED)), opened.has_length)
    graph = surgery.fold_exits(flat, num_early).SerializeToString()
    forms.append(_onnx_form(opened, f"{label}, onnxruntime", graph, threads, (number, macs, "float32")))
    int8 = opened.folder.parent / "export" / "onnx" / INT8_FILE
    if int8.exists():
        blob = int8.read_bytes()
        forms.append(_onnx_form(opened, f"{label}, onnxruntime int8", blob, threads, (number, macs, "int8")))
    return forms


def _onnx_form(opened: ShippedData, name: str, blob: bytes, threads: int, work: tuple[int, float, str]) -> MeasuredForm:
    import onnx

    def load() -> Callable[[Mapping[str, Tensor]], Tensor]:
        return runner_of(session_of(onnx.load_from_string(blob), threads))

    number, macs, precision = work
    accuracy = opened.accuracy(load(), opened.few("test"))
    return MeasuredForm(name, load, len(blob), number, macs, precision, accuracy)


def open_against(given: str, opened: ShippedData, config_of: Any, data: str | None) -> ShippedData:
    """Return the teacher of the run, or a model of transformers in a folder, on the data of `opened`.

    Args:
        given: "teacher", or the folder of a model of transformers.
        opened: the student that is measured, from a run folder.
        config_of: as in `open_shipped`.
        data: as in `open_shipped`, where `opened` was given it.

    Raises:
        UserError: the run does not tell its teacher.
    """
    run = opened.folder.parent
    if given == TEACHER and not (run / "config.yaml").exists():
        raise UserError(f"--against: {run} has no config.yaml that names a teacher; give a folder")
    if opened.kind == "chain":
        if given != TEACHER:
            raise UserError(f"--against: got {given!r:.60}; allowed: teacher, or the folder of a student")
        from rlkd.configs import DistilConfig
        from rlkd.data import load_dataset
        from rlkd.teachers import load_teachers

        config = config_of(run, DistilConfig)[0]
        teacher = load_teachers(config.teacher, load_dataset(opened.data_name))[-1]
        student = compact(teacher, teacher.full_masks(), 1.0).eval()
        return dataclasses.replace(opened, folder=run / TEACHER, student=student)
    from rlkd.envs.real_config import RealConfig

    config = config_of(run, RealConfig)[0]
    source = config.teacher if given == TEACHER else given
    return open_real_teacher(opened, source, config.columns, Path(data or config.data), config.allow_pickle)
