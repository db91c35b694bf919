"""Training of a student's own exit gates, shared by the lock-step population and the solo student."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkd.losses.exit_gate import exit_rewards, expected_reward
from rlkd.models import ChainStudent, GateConfig, Masks, Outputs

ExitCost = Callable[[Tensor], Tensor]
"""From kept units [N, G] to [N, E, 2]: latency and energy ratio of samples that all leave at one exit."""


class Stakes(NamedTuple):
    """What leaving is worth to N students during one window."""

    accuracy_weight: Tensor  # [N]
    exit_cost: Tensor  # [N, E], by the preference
    beta: Tensor  # [N]


class GateTraining:
    """The reward's part of a gated student's loss.

    Args:
        config: of the gates.
        exit_cost: of the students.
        num_students: N.
    """

    def __init__(self, config: GateConfig, exit_cost: ExitCost, num_students: int) -> None:
        self._config, self._exit_cost = config, exit_cost
        self._preference = torch.zeros(num_students, 3)

    def reset(self, rows: Tensor, preferences: Sequence[tuple[float, float, float]]) -> None:
        """Set the preferences that reward the students at `rows` from now on."""
        self._preference[rows] = torch.tensor(preferences, dtype=self._preference.dtype)

    def stakes(self, masks: Masks, num_updates: Tensor) -> Stakes:
        """Under masks [N, G] a group, after num_updates [N]; a window keeps the beta that it begins with."""
        kept = torch.stack([mask.sum(-1) for mask in masks], dim=-1)  # [N, G]
        cost = (self._exit_cost(kept) * self._preference[:, None, 1:]).sum(-1)  # [N, E]
        return Stakes(self._preference[:, 0], cost, self._config.beta(num_updates))

    def loss(self, distillation: Tensor, outputs: Outputs, labels: Tensor, stakes: Stakes) -> Tensor:
        """alpha * distillation - beta * E[R] of one student, whose stakes have no leading dimension."""
        rewards = exit_rewards(outputs.logits, labels, stakes.accuracy_weight, stakes.exit_cost)  # [E, B]
        return self._config.alpha * distillation - stakes.beta * expected_reward(outputs.gates, rewards)


def gate_training(student: ChainStudent, exit_cost: ExitCost | None, num_students: int) -> GateTraining | None:
    """None for a student without gates.

    Raises:
        ValueError: it has gates, and the cost of leaving is not given.
    """
    if not student.gate.enabled:
        return None
    if exit_cost is None:
        raise ValueError("exit_cost: got None for a student with exit gates; give what leaving at each exit costs")
    return GateTraining(student.gate, exit_cost, num_students)
