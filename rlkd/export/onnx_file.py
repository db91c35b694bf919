"""Write a student as ONNX graphs with dynamic batch and length, and compare them with PyTorch on real samples."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.errors import UserError
from rlkd.export.flat import BATCH, Student, flatten, num_early_exits, output_names
from rlkd.io.files import write_whole

OPSET = 18
TOLERANCE = 1e-4
COMPARED_BATCHES = (1, 17)
EDGE = 1e-5  # of a confidence at the threshold, which float rounding may put on either side
Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], Tensor]  # inputs by name to logits [B, ...]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide the notes of torch's exporter inside the block, about which a user can do nothing."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export_flat(student: Student, inputs: Inputs, dynamic_length: bool) -> Any:
    """Return the straight ONNX graph of a student (`rlkd.export.surgery` says what it gives).

    Args:
        student: in evaluation mode.
        inputs: of two or more samples, by name, each [B, ...].
        dynamic_length: whether the second dimension of every input is a length that may change.

    Raises:
        UserError: torch cannot export the student.
    """
    batch, length = torch.export.Dim(BATCH), torch.export.Dim("length")
    shapes = tuple({0: batch, **({1: length} if dynamic_length else {})} for _ in inputs)
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                flatten(student, list(inputs)),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=list(inputs),
                output_names=output_names(num_early_exits(student)),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many kinds for what it cannot follow
        line = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"onnx: torch cannot export this student ({type(error).__name__}: {line:.200})") from error
    assert program is not None
    return program.model_proto


def save_graph(graph: Any, path: Path) -> None:
    """Write an ONNX graph, whole or not at all."""
    write_whole(path, graph.SerializeToString())


def session_of(graph: Any, threads: int = 1) -> Any:
    """Return an onnxruntime session on the CPU.

    Args:
        graph: a path, or a graph in memory.
        threads: for one call.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = str(graph) if isinstance(graph, str | Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def runner_of(session: Any) -> Run:
    """Return a function from inputs by name to the session's first output."""
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Inputs) -> Tensor:
        given = {name: inputs[name].numpy() for name in names}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def torch_runner(student: Student) -> Run:
    """Return a function from inputs by name to the student's logits."""

    @torch.inference_mode()
    def run(inputs: Inputs) -> Tensor:
        answer: Tensor = student(**inputs)
        return answer

    return run


def torch_runner_on(student: Student, device: torch.device) -> Run:
    """Return a function from inputs by name to the student's logits, which also copies both to and from `device`."""
    run = torch_runner(student.to(device))

    def there(inputs: Inputs) -> Tensor:
        return run({name: tensor.to(device) for name, tensor in inputs.items()}).cpu()  # waits for the device

    return there


@dataclass(frozen=True)
class Parity:
    """How far an exported student is from PyTorch on real samples."""

    largest: float  # absolute difference of a logit
    num_samples: int
    num_on_edge: int  # samples whose confidence stands at the exit threshold, within rounding
    batch_sizes: tuple[int, ...]

    def line(self) -> str:
        """Return the report in one line."""
        edge = f"; {self.num_on_edge} samples stand at the exit threshold" if self.num_on_edge else ""
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"largest difference to PyTorch {self.largest:.2e} over {self.num_samples} real samples, at batch {sizes}"
            f"{edge}"
        )


def compare(
    run: Run,
    students: Sequence[Student],
    batch: Callable[[Tensor], Inputs],
    index: Tensor,
    counts: Callable[[Inputs], Tensor | None] = lambda inputs: None,
) -> Parity:
    """Compare an exported student with PyTorch at batch 1 and 17.

    Args:
        run: of the exported student.
        students: the student, and, where it has early exits, the same student at thresholds a rounding below and above:
            a sample agrees if it agrees with one of them.
        batch: gives the inputs of samples.
        index: [B] int64, the samples.
        counts: [B, L] bool, positions whose logits count; None: all.
    """
    largest, num_samples, num_on_edge = 0.0, 0, 0
    references = [torch_runner(student) for student in students]
    for size in COMPARED_BATCHES:
        rows = index if size > 1 else index[: COMPARED_BATCHES[-1]]
        for chunk in torch.split(rows[: len(rows) - len(rows) % size], size):
            inputs = batch(chunk)
            answer, counted = run(inputs), counts(inputs)
            gaps = torch.stack([_gap(answer, reference(inputs), counted) for reference in references])  # [R, B]
            least = gaps.min(0).values
            largest = max(largest, float(least.max()))
            num_samples += len(chunk) if size > 1 else 0
            num_on_edge += int((least < gaps[0] - TOLERANCE).sum()) if size > 1 else 0
    return Parity(largest, num_samples, num_on_edge, COMPARED_BATCHES)


def _gap(one: Tensor, other: Tensor, counted: Tensor | None) -> Tensor:
    """Return [B], the largest absolute difference of each sample's logits; inf where one is not finite."""
    difference = (one - other).abs()
    if counted is not None:
        difference = torch.where(counted[..., None], difference, 0.0)
    return difference.nan_to_num(torch.inf).flatten(1).amax(1)
