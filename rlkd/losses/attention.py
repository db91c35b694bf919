"""Knowledge in where teacher and student look: activation maps, attention of transformers, value relations."""

import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.registry import same_shape, term


@term("attention_transfer", "attention", "https://arxiv.org/abs/1612.03928")
def attention_transfer(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared distance of the normalised attention maps.

    Formula: (1/B) sum_b || Q_S,b - Q_T,b ||_2^2 (the squared form of equation 2 of Zagoruyko & Komodakis 2017).

    Args:
        student_map: [B, P], rows of unit norm.
        teacher_map: [B, P], rows of unit norm, without gradient.

    Returns:
        A scalar in [0, 2] (maps are not negative).
    """
    advice = "pool both to the same positions (`rlkd.models.attention_map.attention_map`)"
    same_shape("attention_transfer", advice, student_map=student_map, teacher_map=teacher_map)
    return (student_map - teacher_map.detach()).square().sum(-1).mean()


@term("transformer_attention", "attention", "https://arxiv.org/abs/2002.10957", weight=1.0)
def transformer_attention(student_attention: Tensor, teacher_attention: Tensor) -> Tensor:
    """KL from the teacher's attention to the student's, for any number of heads and tokens.

    Formula: (1/(B L)) sum_bi KL(A_T,bi || A_S,bi), A the mean over heads (MiniLM, Wang et al. 2020, compares head by
    head; the mean allows other numbers of heads). Where lengths differ, the longer is pooled to the shorter: rows by
    the mean, columns by the sum, so that rows stay distributions.

    Args:
        student_attention: [B, H, L, L], rows sum to one.
        teacher_attention: [B, Ht, Lt, Lt].

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: a tensor is not [B, H, L, L], or the batches differ.
    """
    if student_attention.ndim != 4 or teacher_attention.ndim != 4 or len(student_attention) != len(teacher_attention):
        raise ValueError(
            f"transformer_attention: student_attention has shape {list(student_attention.shape)} and teacher_attention "
            f"{list(teacher_attention.shape)}; both must be [B, heads, L, L] of the same samples; features of a "
            "convolution have an activation map instead (`rlkd.models.attention_map.attention_map`)"
        )
    length = min(student_attention.shape[-1], teacher_attention.shape[-1])
    ours, theirs = (_pooled(a.mean(1), length) for a in (student_attention, teacher_attention.detach()))
    log_q, log_p = (a.clamp_min(1e-12).log() for a in (ours, theirs))  # [B, L, L]
    return (theirs * (log_p - log_q)).sum(-1).mean()


def _pooled(attention: Tensor, length: int) -> Tensor:
    """Return [B, L, L] of attention [B, N, N]: queries averaged, keys summed."""
    size = attention.shape[-1]
    if size == length:
        return attention
    return F.adaptive_avg_pool2d(attention[:, None], length)[:, 0] * (size / length)


@term("value_relation", "attention", "https://arxiv.org/abs/2012.15828", weight=1.0)
def value_relation(student_values: Tensor, teacher_values: Tensor) -> Tensor:
    """KL between the relations of the values of attention, token to token (MiniLM).

    Formula: (1/(B R L)) sum KL(softmax(V_T V_T^T / sqrt(d_T)) || softmax(V_S V_S^T / sqrt(d_S))) (Wang et al. 2020),
    with R relation heads, the smaller of the two numbers of heads, as MiniLMv2 regroups heads (Wang et al. 2021).

    Args:
        student_values: [B, H, L, D].
        teacher_values: [B, Ht, L, Dt].

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: the batches or lengths differ, or a width is not a multiple of R.
    """
    shapes = student_values.shape, teacher_values.shape
    if any(len(shape) != 4 for shape in shapes) or (shapes[0][0], shapes[0][2]) != (shapes[1][0], shapes[1][2]):
        raise ValueError(
            f"value_relation: student_values has shape {list(shapes[0])} and teacher_values {list(shapes[1])}; both "
            "must be [B, heads, L, D] of the same samples and tokens: resample the longer one "
            "(`rlkd.models.adapters.resample_tokens`)"
        )
    heads = min(shapes[0][1], shapes[1][1])
    log_q, log_p = (_relation(v, heads) for v in (student_values, teacher_values.detach()))  # [B, R, L, L]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _relation(values: Tensor, heads: int) -> Tensor:
    """Return log-probabilities [B, R, L, L] of scaled inner products over `heads` groups of the values' channels."""
    b, h, length, d = values.shape
    if h * d % heads:
        raise ValueError(
            f"value_relation: got {h} heads of {d} channels for {heads} relation heads; the channels, {h * d}, must be "
            "a multiple: bring them through a linear adapter (`rlkd.models.adapters`)"
        )
    grouped = values.transpose(1, 2).reshape(b, length, heads, h * d // heads).transpose(1, 2)  # [B, R, L, D']
    return F.log_softmax(grouped @ grouped.transpose(-1, -2) / grouped.shape[-1] ** 0.5, dim=-1)
