"""Several teachers as one: weights for each teacher and sample, a trained gate, and chains of teachers.

Weights are [K, B] for K teachers and B samples, columns that sum to one; `combine` applies them to any signal, so they
serve teachers of any architecture whose signals have one shape. A lock-step population weighs its teachers by
`rlkd.students.fusion`, whose weights an agent learns (MTKD-RL, Yang et al. 2025).
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model")


def combine(signals: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over teachers, [B, *any].

    Args:
        signals: [K, B, *any], of the teachers.
        weights: [K, B].

    Raises:
        ValueError: there is not one weight for each teacher and sample.
    """
    if weights.shape != signals.shape[:2]:
        raise ValueError(
            f"combine: signals has shape {list(signals.shape)} and weights {list(weights.shape)}; weights must be "
            "[K, B]: expand those that are the same for all samples"
        )
    return (signals * weights.reshape(*weights.shape, *(1,) * (signals.ndim - 2))).sum(0)


def mean_weights(teacher_logits: Tensor) -> Tensor:
    """Return equal weights [K, B] for logits [K, B, C]."""
    k, b, _ = teacher_logits.shape
    return teacher_logits.new_full((k, b), 1 / k)


def confidence_weights(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return weights that are larger for teachers that are surer of the label (CA-MKD).

    Formula: w_k = (1 - exp(CE_k) / sum_j exp(CE_j)) / (K - 1), sample by sample (Zhang, Chen & Wang 2022,
    https://arxiv.org/abs/2201.00007, equation 4, with exp(CE) bounded where a probability is 0).

    Args:
        teacher_logits: [K, B, C], K at least 2.
        labels: [B] int64.

    Raises:
        ValueError: there is one teacher alone.
    """
    k = len(teacher_logits)
    if k < 2:
        raise ValueError("confidence_weights: got 1 teacher; allowed: at least 2, for one teacher needs no weight")
    picked = labels.expand(k, -1)[..., None]  # [K, B, 1]
    log_p = F.log_softmax(teacher_logits.detach(), -1).gather(-1, picked)[..., 0]  # [K, B]
    doubt = (-log_p).clamp_max(20.0).softmax(0)  # exp(CE_k) over its sum
    return (1 - doubt) / (k - 1)


class TeacherGate(nn.Module):
    """A trained gate: weights of the teachers from what all of them answer to a sample.

    Formula: w = softmax(W [log p_1, ..., log p_K] + b), trained by the cross entropy of the mixture sum_k w_k p_k (a
    mixture of experts, Jacobs et al. 1991, https://doi.org/10.1162/neco.1991.3.1.79, whose experts stay fixed). It
    begins as the plain mean.

    Args:
        num_teachers: K.
        num_classes: C.
    """

    def __init__(self, num_teachers: int, num_classes: int) -> None:
        super().__init__()
        self.gate = nn.Linear(num_teachers * num_classes, num_teachers)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, teacher_logits: Tensor) -> Tensor:
        """Return weights [K, B] for logits [K, B, C]."""
        log_p = F.log_softmax(teacher_logits.detach(), -1)
        weights: Tensor = self.gate(log_p.transpose(0, 1).flatten(1)).softmax(-1).T
        return weights

    def loss(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of the mixture for logits [K, B, C] and labels [B], a scalar."""
        log_p = F.log_softmax(teacher_logits.detach(), -1)  # [K, B, C]
        mixed = (self(teacher_logits).clamp_min(1e-12).log()[..., None] + log_p).logsumexp(0)  # [B, C]
        return F.nll_loss(mixed, labels)


def chain(teacher: Model, students: Iterable[Model], teach: Callable[[Model, Model], object]) -> Model:
    """Train a chain in which each student is the teacher of the next, and return the last.

    With students of falling size these are teacher assistants (Mirzadeh et al. 2020, https://arxiv.org/abs/1902.03393);
    with students of one architecture, the generations of born-again networks (Furlanello et al. 2018,
    https://arxiv.org/abs/1805.04770).

    Args:
        teacher: of the first student.
        students: in the order of their training.
        teach: trains its first argument by its second.
    """
    for student in students:
        teach(student, teacher)
        teacher = student
    return teacher
