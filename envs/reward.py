"""The score J of a student, and the reward: its change on validation."""

import torch
from torch import Tensor

from rlkd.cost import Cost

DIVERGED_SCORE = 0.0  # always wrong and nothing saved


def score(accuracy: Tensor, cost: Cost, preference: Tensor) -> Tensor:
    """J = w_acc A + w_lat (1 - latency / dense latency) + w_eng (1 - energy / dense energy).

    Nothing is clipped: a student slower than the dense one has a negative latency term.

    Args:
        accuracy: [N], in [0, 1].
        cost: of N students.
        preference: [N, 3], weights on accuracy, latency and energy, summing to one.

    Returns:
        [N], at most 1.
    """
    terms = torch.stack([accuracy, 1.0 - cost.latency_ratio, 1.0 - cost.energy_ratio], dim=-1)  # [N, 3]
    return (terms * preference).sum(-1)
