"""Knowledge in the labels: cross entropy. And the log-softmax that all logit terms share."""

import torch.nn.functional as F
from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax with classes first, [*N, C, B], of logits [*N, B, C].

    torch's CPU kernel is vectorised along the last dimension only if it is long. With 10 classes, softmax over the
    second to last dimension takes a twelfth of the time (128 x 48 x 10: 55 against 660 microseconds).
    """
    return F.log_softmax(logits.transpose(-1, -2).contiguous(), dim=-2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels, in nats.

    Formula: -(1/B) sum_b log softmax(z_b)[y_b].

    Args:
        logits: [B, C], the student's.
        labels: [B] int64 in [0, C).

    Returns:
        A scalar.
    """
    return -log_probabilities(logits).gather(0, labels[None]).mean()
