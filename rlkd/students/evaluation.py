"""Metrics from the logits of every exit: shared by the lock-step population and the solo student."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.compression.selection import exits_taken, spread
from rlkd.losses.hard_label import log_probabilities
from rlkd.models import Masks
from rlkd.students.interface import Metrics


@dataclass(frozen=True)
class ExitsByClass:
    """Exit statistics of one student, class by class, in the order of the classes."""

    num_samples: Tensor  # [C] int64
    exit_rates: Tensor  # [C, E], share of the class's samples that left at each exit
    accuracy: Tensor  # [C], each sample answered by the exit it left at


@torch.no_grad()
def exits_by_class(logits: tuple[Tensor, ...], labels: Tensor, threshold: Tensor, patience: int = 0) -> ExitsByClass:
    """Exit statistics of one student.

    Args:
        logits: one [B, C] an exit.
        labels: [B].
        threshold: [1].
        patience: as in `summarise`.
    """
    probabilities = torch.stack(logits).softmax(-1)  # [E, B, C]
    confidence, answer = probabilities.max(-1)  # [E, B]
    num_classes = probabilities.shape[-1]
    left_at = exits_taken(confidence[None], answer[None], threshold, num_classes, patience)[0]  # [E, B]
    right = (left_at & (answer == labels)).any(0).double()  # [B]
    member = F.one_hot(labels, num_classes).double()  # [B, C]
    count = member.sum(0)  # [C]
    rates = member.T @ left_at.T.double() / count.clamp_min(1.0)[:, None]  # [C, E]
    return ExitsByClass(count.long(), rates, member.T @ right / count.clamp_min(1.0))


@torch.no_grad()
def summarise(
    logits: tuple[Tensor, ...],
    labels: Tensor,
    teacher_log_p: Tensor,
    exit_threshold: Tensor,
    masks: Masks,
    scores: Masks,
    patience: int = 0,
    gates: tuple[Tensor, ...] = (),
) -> Metrics:
    """Metrics of N students.

    Args:
        logits: one [N, B, C] an exit.
        labels: [B].
        teacher_log_p: [N, C, B], `log_probabilities` of the teachers' logits.
        exit_threshold: [N].
        masks: one [N, G] a group.
        scores: importance, one [N, G] a group.
        patience: a sample also leaves where this many exits in a row agree (PABEE, Zhou et al. 2020), unless the
            threshold is at an end, which lets all or none leave; 0 switches the rule off.
        gates: one [N, B] an early exit, logits of leaving, which then decide instead of confidence and threshold.
    """
    num_classes = logits[0].shape[-1]
    log_q = torch.stack([log_probabilities(z) for z in logits], dim=1)  # [N, E, C, B]
    confidence, answer = log_q.max(-2)  # [N, E, B]
    correct = answer == labels
    picked = labels.expand(*log_q.shape[:2], 1, -1)  # [N, E, 1, B]
    losses = -log_q.gather(-2, picked)[..., 0, :].mean(-1)  # [N, E]

    left_at = exits_taken(confidence.exp(), answer, exit_threshold, num_classes, patience, gates)  # [N, E, B]

    teacher_answer = teacher_log_p.max(-2).indices[:, None]  # [N, 1, B]; argmax takes six times as long
    gap = teacher_log_p - log_q[:, -1]  # [N, C, B]
    return Metrics(
        accuracy=(left_at & correct).any(1).float().mean(-1),
        exit_accuracy=correct.float().mean(-1),
        exit_loss=losses,
        exit_rates=left_at.float().mean(-1),
        agreement=(left_at & (answer == teacher_answer)).any(1).float().mean(-1),
        divergence=(teacher_log_p.exp() * gap).sum(-2).mean(-1),
        kept=torch.stack([m.sum(-1) for m in masks], dim=-1),
        spread=torch.stack([spread(scores[0]), spread(scores[1])], dim=-1),
    )
