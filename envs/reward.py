"""The score J of a student under its goal; the reward is the change of J on validation."""

import torch
from torch import Tensor

from rlkd.cost import Cost

KAPPA = 10.0  # score lost a unit of accuracy below the floor: one point costs 0.1
MAX_PENALTY = 2.0  # 20 points below the floor; more would drown what the other controls do


def score(accuracy: Tensor, cost: Cost, preference: Tensor, floor: Tensor) -> Tensor:
    """[N], J of N students with these costs; see `weighed`."""
    return weighed(accuracy, cost.latency_ratio, cost.energy_ratio, preference, floor=floor)


def weighed(
    accuracy: Tensor, latency_ratio: Tensor, energy_ratio: Tensor, preference: Tensor, *, floor: Tensor
) -> Tensor:
    """J = w_acc A + w_lat (1 - latency / dense) + w_eng (1 - energy / dense) - min(2, 10 max(0, floor - A)).

    The savings are not clipped: a student slower than the dense one has a negative latency term.

    Args:
        accuracy: [N], in [0, 1].
        latency_ratio: [N], to the dense student.
        energy_ratio: [N], to the dense student.
        preference: [N, 3], weights on accuracy, latency and energy, summing to one.
        floor: [N], least accuracy that meets the goal; 0 for no floor.

    Returns:
        [N], at most 1.
    """
    terms = torch.stack([accuracy, 1.0 - latency_ratio, 1.0 - energy_ratio], dim=-1)  # [N, 3]
    penalty = (KAPPA * (floor - accuracy).clamp_min(0.0)).clamp_max(MAX_PENALTY)  # [N]
    return (terms * preference).sum(-1) - penalty


def worst_score(floor: Tensor) -> Tensor:
    """[N], J of a diverged student: always wrong, and nothing saved."""
    return -(KAPPA * floor).clamp_max(MAX_PENALTY)
