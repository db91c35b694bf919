"""Knowledge in the labels: cross entropy. And the log-softmax that all logit terms share."""

import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.registry import term


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax with classes first, [*N, C, B], of logits [*N, B, C].

    torch's CPU kernel is vectorised along the last dimension only if it is long. With 10 classes, softmax over the
    second to last dimension takes a twelfth of the time (128 x 48 x 10: 55 against 660 microseconds).
    """
    return F.log_softmax(logits.transpose(-1, -2).contiguous(), dim=-2)


@term("cross_entropy", "hard_label", "https://arxiv.org/abs/1503.02531")
def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels, in nats.

    Formula: -(1/B) sum_b log softmax(z_b)[y_b], the hard-label part of distillation (Hinton, Vinyals & Dean 2015).

    Args:
        student_logits: [B, C].
        labels: [B] int64 in [0, C).

    Returns:
        A scalar.
    """
    return -log_probabilities(student_logits).gather(0, labels[None]).mean()


@term("label_smoothing", "hard_label", "https://arxiv.org/abs/1512.00567")
def label_smoothing(student_logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy with labels that leave a tenth to all classes: the baseline without a teacher.

    Formula: (1 - s) CE(z, y) - (s/C) (1/B) sum_bc log softmax(z_b)[c] (Szegedy et al. 2016, section 7).

    Args:
        student_logits: [B, C].
        labels: [B] int64 in [0, C).
        smoothing: s in [0, 1).

    Returns:
        A scalar.
    """
    log_q = log_probabilities(student_logits)  # [C, B]
    return -(1 - smoothing) * log_q.gather(0, labels[None]).mean() - smoothing * log_q.mean()
