"""The expected reward of a student's own exit gates: exact and differentiable, because there are few exits.

With REINFORCE (Williams 1992) the gate's gradient would come from sampled exits; with E exits the expectation over
the exit of a sample is a sum of E terms, without sampling noise. The loss of a student with gates is
L = alpha * distillation - beta * E[R] (`rlkd.models.GateConfig` has alpha and the schedule of beta).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.hard_label import log_probabilities


def exit_probabilities(gate_logits: Sequence[Tensor]) -> Tensor:
    """Return the probability of each exit: P_e = g_e prod_{j<e} (1 - g_j), g = sigmoid(logit); the last has the rest.

    Args:
        gate_logits: one [B] an early exit, at least one.

    Returns:
        [E, B], columns summing to one.
    """
    z = torch.stack(tuple(gate_logits))  # [E - 1, B]
    stayed = F.logsigmoid(-z).cumsum(0)  # [E - 1, B], log probability of not having left up to and with exit e
    arrived = torch.cat([torch.zeros_like(z[:1]), stayed[:-1]])  # [E - 1, B]
    return torch.cat([F.logsigmoid(z) + arrived, stayed[-1:]]).exp()


def exit_rewards(logits: Sequence[Tensor], labels: Tensor, accuracy_weight: Tensor, exit_cost: Tensor) -> Tensor:
    """Return the reward of each sample at each exit: R_e = w_acc [answer right] - cost_e.

    Args:
        logits: one [B, C] an exit.
        labels: [B] int64.
        accuracy_weight: scalar, of the student's preference.
        exit_cost: [E], w_lat latency ratio + w_eng energy ratio of a sample that leaves there.

    Returns:
        [E, B], without gradient to the logits.
    """
    right = torch.stack([log_probabilities(z).max(-2).indices == labels for z in logits])  # [E, B]
    return accuracy_weight * right - exit_cost[:, None]


def expected_reward(gate_logits: Sequence[Tensor], rewards: Tensor) -> Tensor:
    """Return the mean over samples of sum_e P_e R_e, a scalar.

    Args:
        gate_logits: one [B] an early exit.
        rewards: [E, B].
    """
    return (exit_probabilities(gate_logits) * rewards).sum(0).mean()
