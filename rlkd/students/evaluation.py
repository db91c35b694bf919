"""Metrics from the logits of every exit: shared by the lock-step population and the solo student."""

import torch
from torch import Tensor

from rlkd.compression.selection import exit_ends, exits_at, spread
from rlkd.models import Masks
from rlkd.objectives.hard_label import log_probabilities
from rlkd.students.interface import Metrics


@torch.no_grad()
def summarise(
    logits: tuple[Tensor, ...],
    labels: Tensor,
    teacher_log_p: Tensor,
    exit_threshold: Tensor,
    masks: Masks,
    scores: Masks,
    patience: int = 0,
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
    """
    num_classes = logits[0].shape[-1]
    log_q = torch.stack([log_probabilities(z) for z in logits], dim=1)  # [N, E, C, B]
    confidence, answer = log_q.max(-2)  # [N, E, B]
    correct = answer == labels
    picked = labels.expand(*log_q.shape[:2], 1, -1)  # [N, E, 1, B]
    losses = -log_q.gather(-2, picked)[..., 0, :].mean(-1)  # [N, E]

    left_at = exits_taken(confidence.exp(), answer, exit_threshold, num_classes, patience)

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


def exits_taken(
    confidence: Tensor, answer: Tensor, exit_threshold: Tensor, num_classes: int, patience: int = 0
) -> Tensor:
    """Where every sample leaves: [N, E, B] bool, one True a sample.

    Args:
        confidence: [N, E, B], largest probability of every exit.
        answer: [N, E, B] int64, the class that has it.
        exit_threshold: [N].
        num_classes: C.
        patience: as in `summarise`.
    """
    waiting = torch.ones_like(answer[:, 0], dtype=torch.bool)  # [N, B]
    undecided = ~torch.stack(exit_ends(exit_threshold, num_classes)).any(0)[:, None]  # [N, 1]
    leaves = []
    for e in range(answer.shape[1] - 1):
        leave = exits_at(confidence[:, e], exit_threshold, num_classes)
        if 0 < patience <= e + 1:
            recent = answer[:, e + 1 - patience : e + 1]  # [N, patience, B]
            leave = leave | ((recent == recent[:, :1]).all(1) & undecided)
        leave = waiting & leave
        leaves.append(leave)
        waiting = waiting & ~leave
    return torch.stack([*leaves, waiting], dim=1)
