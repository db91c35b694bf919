"""Knowledge of students: the last exit teaches the earlier ones, and students teach each other.

Born-again networks (Furlanello et al. 2018, https://arxiv.org/abs/1805.04770) need no term: the student of one
generation is the teacher of the next, under `kl` (`rlkd.teachers.several.chain`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkd.losses.registry import term
from rlkd.losses.response import response


@term("self_distillation", "self", "https://arxiv.org/abs/1905.08094", weight=0.3)
def self_distillation(exit_logits: Sequence[Tensor], temperature: Tensor | float) -> Tensor:
    """KL from the student's last exit to each earlier one, times T squared: the student is its own teacher.

    Formula: (1/(E-1)) sum_{e<E} T^2 KL(softmax(z_E / T) || softmax(z_e / T)) (Zhang et al. 2019, equation 2); 0 for a
    student without early exits. The last exit gets no gradient.

    Args:
        exit_logits: one [B, C] an exit, the last exit last.
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    *early, last = exit_logits
    if not early:
        return last.sum() * 0.0
    return torch.stack([response(z, last, temperature) for z in early]).mean()


@term("mutual", "self", "https://arxiv.org/abs/1706.00384", weight=1.0)
def mutual(student_logits: Tensor, peer_logits: Tensor) -> Tensor:
    """KL from another student in training, at T = 1: two students that learn together teach each other.

    Formula: (1/B) sum_b KL(softmax(z_peer) || softmax(z)) (deep mutual learning, Zhang et al. 2018). With more than two
    students, take the mean over the peers. Students of a lock-step population do not see each other: a plain loop that
    trains both gives this signal.

    Args:
        student_logits: [B, C].
        peer_logits: [B, C], without gradient.

    Returns:
        A scalar >= 0.
    """
    return response(student_logits, peer_logits, 1.0)
