"""Choose exit thresholds on validation data for an accuracy that is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlkd.compression import CompactStudent
from rlkd.compression.real.shipped import shipped_student
from rlkd.compression.selection import exits_taken
from rlkd.errors import UserError
from rlkd.export.flat import Student, flatten, num_early_exits

NUM_CANDIDATES = 2000
MIDDLE = 0.75  # any threshold at neither end, to have every exit answer


@dataclass(frozen=True)
class CalibratedExit:
    """An exit threshold and what it brings on the samples that it was chosen on."""

    threshold: float
    accuracy: float
    exit_rates: tuple[float, ...]  # share of samples that leave at each exit, the end last

    def line(self) -> str:
        """Return the choice in one line."""
        rates = ", ".join(f"{rate:.3f}" for rate in self.exit_rates)
        return f"exit threshold {self.threshold:.4f}: accuracy {self.accuracy:.4f} on validation, exits take {rates}"


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


def calibrate(
    student: Student,
    batch: Callable[[Tensor], Mapping[str, Tensor]],
    index: Tensor,
    labels: Tensor,
    asked: float,
) -> CalibratedExit:
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
    decides = num_early_exits(student) > 0
    is_gated = isinstance(student, CompactStudent) and len(student.gates) > 0
    if not decides or is_gated:
        why = "gates decide at its exits" if is_gated else "it ships without an early exit that decides"
        raise UserError(
            f"--exit_accuracy: got {asked:g}, but this student has no threshold: {why}; leave the option out"
        )
    logits = _exit_logits(with_threshold(student, MIDDLE), batch, index)  # [E, B, C]
    confidence, answer = logits.softmax(-1).max(-1)  # [E, B]
    right = answer == labels[index]
    patience = 0 if isinstance(student, CompactStudent) else student.shipment.patience
    best: CalibratedExit | None = None
    for threshold in _candidates(confidence[:-1]):
        taken = exits_taken(confidence[None], answer[None], torch.tensor([threshold]), logits.shape[-1], patience)[
            0
        ]  # [E, B]
        accuracy = float((taken & right).any(0).double().mean())
        if accuracy >= asked:
            best = CalibratedExit(threshold, accuracy, tuple(taken.double().mean(1).tolist()))
            break
    if best is None:
        last = float(right[-1].double().mean())
        raise UserError(
            f"--exit_accuracy: got {asked:g}; allowed: at most {last:.4f}, this student's accuracy on validation "
            "without early exits"
        )
    return best


@torch.no_grad()
def _exit_logits(student: Student, batch: Callable[[Tensor], Mapping[str, Tensor]], index: Tensor) -> Tensor:
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
