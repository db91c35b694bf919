"""Metrics of answers alone: logits of student and teacher, and labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses import jensen_shannon

NUM_BINS = 15


def agreement(student_logits: Tensor, teacher_logits: Tensor, k: int = 1) -> float:
    """Return the mean share of the teacher's k likeliest classes that are among the student's k likeliest.

    Formula: (1/B) sum_b |top_k(s_b) & top_k(t_b)| / k; k = 1 is the share of equal answers.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        k: at most C; a larger one counts as C.
    """
    k = min(k, student_logits.shape[-1])
    ours, theirs = (logits.topk(k, dim=-1).indices for logits in (student_logits, teacher_logits))  # [B, k]
    return float((ours[:, :, None] == theirs[:, None]).any(-1).double().mean())


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Return the Jensen-Shannon divergence at T = 1, in nats, at most log 2 = 0.693."""
    return float(jensen_shannon(student_logits, teacher_logits, 1.0))


def knowledge_coverage(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> float:
    """Return the share of the samples [B] that the teacher answers right which the student answers right, too.

    It is 0 where the teacher answers nothing right.
    """
    taught = teacher_logits.argmax(-1) == labels
    return float(((student_logits.argmax(-1) == labels) & taught).sum() / taught.sum().clamp_min(1))


def calibration_error(logits: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> float:
    """Return the expected calibration error, in [0, 1].

    Formula: sum_m (n_m / B) |accuracy_m - mean confidence_m| over bins of equal width of the largest probability
    (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        logits: [B, C].
        labels: [B] int64.
        num_bins: M.
    """
    confidence, answers = logits.double().softmax(-1).max(-1)  # each [B]
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    members = F.one_hot(bins, num_bins).double()  # [B, M]
    gap = members.T @ ((answers == labels).double() - confidence)  # [M]
    return float(gap.abs().sum() / len(labels))


def accuracy_by_class(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Return the accuracy on the samples of each class; None for a class without a sample.

    Args:
        logits: [B, C].
        labels: [B] int64.
    """
    member = F.one_hot(labels, logits.shape[-1]).double()  # [B, C]
    right = member.T @ (logits.argmax(-1) == labels).double()  # [C]
    counts = member.sum(0)  # [C]
    return [float(r / n) if n else None for r, n in zip(right, counts, strict=True)]


def tail_accuracy(logits: Tensor, labels: Tensor, train_labels: Tensor) -> float:
    """Return the mean accuracy over the third of the classes with the fewest training samples (the long tail).

    Args:
        logits: [B, C].
        labels: [B] int64.
        train_labels: [L] int64, of the training samples; ties go to the classes of lower accuracy, so that among
            equally frequent classes the tail is the hardest third.
    """
    by_class = accuracy_by_class(logits, labels)
    counts = torch.bincount(train_labels, minlength=logits.shape[-1]).tolist()
    found = sorted((count, a) for count, a in zip(counts, by_class, strict=True) if a is not None)
    tail = found[: max(1, len(found) // 3)]
    return sum(a for _, a in tail) / len(tail)
