"""Attention transfer: match where teacher and student are active (Zagoruyko & Komodakis 2017)."""

from torch import Tensor


def attention_transfer(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared distance of the normalised attention maps.

    Formula: (1/B) sum_b || Q_S,b - Q_T,b ||_2^2 (the squared form of the paper's equation 2).

    Args:
        student_map: [B, P], rows of unit norm.
        teacher_map: [B, P], rows of unit norm, without gradient.

    Returns:
        A scalar in [0, 2] (maps are not negative).
    """
    return (student_map - teacher_map.detach()).square().sum(-1).mean()
