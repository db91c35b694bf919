"""Metrics that read features or count work: a linear probe on another data set, and operations for each sample."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

RIDGE = 1e-2  # penalty, as a share of the mean squared feature


def probe_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the test accuracy of a linear classifier on features, solved in closed form (ridge regression).

    Args:
        train: features [L, U] and labels [L] int64 that it is fitted to.
        test: features [B, U] and labels [B].
    """
    features, labels = train
    mean, deviation = features.double().mean(0), features.double().std(0).clamp_min(1e-6)

    def design(x: Tensor) -> Tensor:
        return F.pad((x.double() - mean) / deviation, (0, 1), value=1.0)  # [*, U + 1]

    a, targets = design(features), F.one_hot(labels).double()  # [L, U + 1], [L, C]
    penalty = RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    weights = torch.linalg.solve(a.T @ a + penalty, a.T @ targets)  # [U + 1, C]
    answers = (design(test[0]) @ weights).argmax(-1)
    return float((answers == test[1]).double().mean())


def flops_per_sample(model: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Return floating-point operations of one sample, the mean over inputs [B, *any]; early exits save theirs.

    Matrix products and convolutions count, a multiplication and an addition each.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return float(counter.get_total_flops()) / len(inputs)
