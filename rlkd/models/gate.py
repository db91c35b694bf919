"""Exit gates of a student: one small trained decision for each early exit, in place of a confidence threshold.

A gate reads the exit's class probabilities and the logarithm of the largest one. It begins as the threshold START.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.errors import UserError

START = 0.8  # the confidence at which an untrained gate lets a sample leave
SLOPE = 1.0  # of its logit, for each unit of log confidence; small, so that some hundred updates can change a decision


@dataclass(frozen=True)
class GateConfig:
    """The student's own exit gates, trained by the reward that leaving is expected to bring (off by default)."""

    enabled: bool = False
    """Whether gates decide who leaves early wherever the exit control is at neither of its ends."""
    alpha: float = 1.0
    """Weight of the distillation loss beside the expected reward."""
    beta_start: float = 0.1
    """Weight of the expected reward at first."""
    beta_end: float = 0.3
    """Its highest weight."""
    beta_step: float = 0.05
    """How much it rises every steps_per_rise updates."""
    steps_per_rise: int = 1000
    """Updates of the student between two rises."""

    def check(self) -> None:
        """Raise UserError for impossible weights."""
        if not (0 < self.alpha < math.inf and 0 <= self.beta_start <= self.beta_end < math.inf):
            raise UserError(
                f"student.gate: got alpha {self.alpha:g}, beta_start {self.beta_start:g}, beta_end {self.beta_end:g}; "
                "allowed: alpha above 0, 0 <= beta_start <= beta_end"
            )
        if not 0 <= self.beta_step < math.inf or self.steps_per_rise < 1:
            raise UserError(
                f"student.gate: got beta_step {self.beta_step:g}, steps_per_rise {self.steps_per_rise}; "
                "allowed: at least 0, at least 1"
            )

    def beta(self, num_updates: Tensor) -> Tensor:
        """Return the weight of the expected reward after `num_updates`, in the same shape."""
        rises = torch.div(num_updates, self.steps_per_rise, rounding_mode="floor")
        return (self.beta_start + self.beta_step * rises).clamp_max(self.beta_end)


class ExitGate(nn.Linear):
    """Decides from the logits of an exit which samples leave there: those whose gate logit is at least 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes + 1, 1)

    @torch.no_grad()
    def stand_for(self, threshold: float) -> None:
        """Decide exactly as the confidence `threshold` does (0 < threshold <= 1)."""
        self.weight.zero_()
        self.weight[0, -1] = SLOPE
        self.bias.fill_(-SLOPE * math.log(threshold))

    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits [B] of leaving, for the exit's logits [B, C]."""
        # classes first, as in losses.hard_label.log_probabilities
        log_p = F.log_softmax(logits.transpose(-1, -2).contiguous(), dim=-2)  # [C, B]
        seen = torch.cat([log_p.exp(), log_p.amax(-2, keepdim=True)], dim=-2)  # [C + 1, B]
        return (self.weight @ seen)[0] + self.bias  # [B]
