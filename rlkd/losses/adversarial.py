"""Knowledge by a learned distance: a discriminator tells teacher from student, and the student learns to mislead it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.losses.registry import same_classes, term


def reversed_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """Return `x`; gradients that come back through it have the opposite sign (Ganin & Lempitsky 2015).

    Formula: (1 + s) stop(x) - s x. One optimizer then minimises for the discriminator and maximises for the student.
    """
    return (1 + strength) * x.detach() - strength * x


@term("adversarial", "adversarial", "https://arxiv.org/abs/1709.00513", weight=0.1)
class Discriminator(nn.Module):
    """Cross entropy of a discriminator of logits, through a reversed gradient for the student.

    Formula: -(1/2B) sum_b [log D(t_b) + log(1 - D(s_b))], D a small network with dropout-free hidden layer; the student
    climbs what D descends (Xu, Hsu & Huang 2018, without their class head, which the hard label is). Inputs of D are
    log-probabilities, so that an offset of logits tells nothing. At ln 2, D cannot tell them apart.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_classes, 32)
        self.out = nn.Linear(32, 1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the loss, a scalar >= 0, for logits [B, C]."""
        same_classes("adversarial", student_logits, teacher_logits)
        student = self._score(reversed_gradient(F.log_softmax(student_logits, -1)))  # [B]
        teacher = self._score(F.log_softmax(teacher_logits.detach(), -1))  # [B]
        return (F.softplus(-teacher).mean() + F.softplus(student).mean()) / 2

    def _score(self, log_p: Tensor) -> Tensor:
        """Return the logit [B] of being the teacher's."""
        return torch.as_tensor(self.out(F.leaky_relu(self.hidden(log_p), 0.2))[..., 0])
