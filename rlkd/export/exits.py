"""Choose exit thresholds on validation data for an accuracy or a latency that is asked for."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlkd.compression import CompactStudent
from rlkd.compression.real.shipped import shipped_student
from rlkd.compression.selection import exits_taken
from rlkd.cost.timing import time_calls
from rlkd.errors import UserError
from rlkd.export import surgery
from rlkd.export.flat import Student, flatten, num_early_exits
from rlkd.export.onnx_file import export_flat, session_of

Batch = Callable[[Tensor], Mapping[str, Tensor]]  # inputs by name of the samples at [B] int64
NUM_CANDIDATES = 2000
NUM_TIMED = 8  # samples that the parts up to each exit are timed on, one at a time
MIDDLE = 0.75  # any threshold at neither end, to have every exit answer


@dataclass(frozen=True)
class CalibratedExit:
    """An exit threshold and what it brings on the samples that it was chosen on."""

    threshold: float
    accuracy: float
    exit_rates: tuple[float, ...]  # share of samples that leave at each exit, the end last
    latency_s: float | None = None  # mean of a sample at batch 1, by the rates and the time up to each exit

    def line(self) -> str:
        """Return the choice in one line."""
        rates = ", ".join(f"{rate:.3f}" for rate in self.exit_rates)
        took = "" if self.latency_s is None else f", {1e6 * self.latency_s:.1f} us for a sample at batch 1 in the mean"
        return (
            f"exit threshold {self.threshold:.4f}: accuracy {self.accuracy:.4f} on validation, exits take {rates}{took}"
        )


def with_threshold(student: Student, threshold: float) -> Student:
    """Return the student with another exit threshold; it shares the parameters."""
    if isinstance(student, CompactStudent):
        other = CompactStudent(
            list(student.layers),
            list(student.heads),
            student.exits,
            student.input_shape,
            student.kept_inputs,
            threshold,
            list(student.gates),
        )
        return other.eval()
    return shipped_student(student.model, student.heads, replace(student.shipment, threshold=threshold))


def calibrate(student: Student, batch: Batch, index: Tensor, labels: Tensor, asked: float) -> CalibratedExit:
    """Return the lowest threshold at which the student is at least as accurate as asked.

    Args:
        student: has early exits that decide by confidence.
        batch: gives the inputs of samples.
        index: [B] int64, validation samples.
        labels: [S] of all samples.
        asked: accuracy.

    Raises:
        UserError: no early exit decides by confidence, or the student is less accurate even without early exits.
    """
    check_decides(student, f"--exit_accuracy: got {asked:g}")
    last: CalibratedExit | None = None
    for choice in _choices(student, batch, index, labels):
        if choice.accuracy >= asked:
            return choice
        last = choice
    assert last is not None
    raise UserError(
        f"--exit_accuracy: got {asked:g}; allowed: at most {last.accuracy:.4f}, this student's accuracy on validation "
        "without early exits"
    )


def calibrate_latency(
    student: Student, batch: Batch, index: Tensor, labels: Tensor, *, exits_s: Sequence[float], most_s: float
) -> CalibratedExit:
    """Return the threshold with the highest accuracy at which a sample takes at most `most_s` in the mean.

    Of equally accurate thresholds the fastest is taken.

    Args:
        student, batch, index, labels: as in `calibrate`.
        exits_s: seconds of a sample that leaves at each exit, the end last, as of `time_exits`.
        most_s: the mean latency that is asked for.

    Raises:
        UserError: no early exit decides by confidence, or even samples that leave first take longer.
    """
    check_decides(student, "--exit_latency: got a limit")
    best, least_s = None, math.inf
    for choice in _choices(student, batch, index, labels):
        took_s = sum(rate * seconds for rate, seconds in zip(choice.exit_rates, exits_s, strict=True))
        least_s = min(least_s, took_s)
        is_better = best is None or choice.accuracy > best.accuracy
        if took_s <= most_s and is_better:  # thresholds rise, so the first of equals is the fastest
            best = replace(choice, latency_s=took_s)
    if best is None:
        raise UserError(
            f"--exit_latency: got {1e6 * most_s:.1f} us; allowed: at least {1e6 * least_s:.1f} us, the mean where "
            "nearly all leave at the first exit"
        )
    return best


def check_decides(student: Student, given: str) -> None:
    """Raise UserError, beginning with `given`, for a student without an early exit that decides by confidence."""
    is_gated = isinstance(student, CompactStudent) and len(student.gates) > 0
    if num_early_exits(student) == 0 or is_gated:
        why = "gates decide at its exits" if is_gated else "it ships without an early exit that decides"
        raise UserError(f"{given}, but this student has no threshold: {why}; leave the option out")


def time_exits(
    student: Student, batch: Batch, index: Tensor, *, traced: Mapping[str, Tensor], has_length: bool, threads: int
) -> list[float]:
    """Return the median seconds of a sample that leaves at each exit, the end last, in onnxruntime at batch 1.

    Every part of the chain of parts is timed, all in turns, on NUM_TIMED samples that are run through all parts.

    Args:
        student: has early exits.
        batch: gives the inputs of samples.
        index: [B] int64, of which the first NUM_TIMED are timed.
        traced: inputs of some samples, with which the graph is made.
        has_length: whether the second dimension of the inputs is a length that may change.
        threads: of a call.
    """
    parts = surgery.split_parts(export_flat(student, traced, has_length), num_early_exits(student))
    sessions = [session_of(part, threads) for part in parts]
    fed: list[list[dict[str, Any]]] = [[] for _ in sessions]  # of each part, for each sample
    for row in index[:NUM_TIMED]:
        known = {name: value.numpy() for name, value in batch(row[None]).items()}
        for session, inputs in zip(sessions, fed, strict=True):
            inputs.append({value.name: known[value.name] for value in session.get_inputs()})
            gives = [value.name for value in session.get_outputs()]
            known |= dict(zip(gives, session.run(None, inputs[-1]), strict=True))
    timed = time_calls([partial(_run_all, session, rows) for session, rows in zip(sessions, fed, strict=True)])
    means_s = [latency.median_s / len(rows) for latency, rows in zip(timed, fed, strict=True)]
    return [sum(means_s[: number + 1]) for number in range(len(means_s))]


def _run_all(session: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for inputs in rows:
        session.run(None, inputs)


def _choices(student: Student, batch: Batch, index: Tensor, labels: Tensor) -> Iterator[CalibratedExit]:
    """Yield thresholds, from the lowest on, with what they bring on the samples at `index` [B]."""
    logits = _exit_logits(with_threshold(student, MIDDLE), batch, index)  # [E, B, C]
    confidence, answer = logits.softmax(-1).max(-1)  # [E, B]
    right = answer == labels[index]
    patience = 0 if isinstance(student, CompactStudent) else student.shipment.patience
    for threshold in _candidates(confidence[:-1]):
        limit = torch.tensor([threshold])
        taken = exits_taken(confidence[None], answer[None], limit, logits.shape[-1], patience)[0]  # [E, B]
        accuracy = float((taken & right).any(0).double().mean())
        yield CalibratedExit(threshold, accuracy, tuple(taken.double().mean(1).tolist()))


@torch.no_grad()
def _exit_logits(student: Student, batch: Batch, index: Tensor) -> Tensor:
    """Return [E, B, C], what every exit answers."""
    flat = flatten(student, list(batch(index[:1])))
    parts: list[Any] = [torch.stack(flat.exit_logits(*batch(rows).values())) for rows in torch.split(index, 64)]
    return torch.cat(parts, dim=1)


def _candidates(confidence: Tensor) -> list[float]:
    """Return rising thresholds that stand halfway between confidences, so no sample is near one; 1 stands last."""
    seen: Tensor = torch.unique(confidence.double())
    chosen = seen[torch.linspace(0, len(seen) - 1, min(NUM_CANDIDATES, len(seen))).long()]
    following = seen[(torch.searchsorted(seen, chosen) + 1).clamp_max(len(seen) - 1)]
    return [*((chosen + following) / 2).tolist(), 1.0]
