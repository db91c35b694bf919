"""Token-level distillation: teacher's and student's next-token distributions, padding and prompt left out.

Every loss is a mean over the positions of a mask, so its size does not depend on padding or batch size. A teacher over
a large vocabulary is stored as its k largest logits and one more outcome, "any other token", with the rest of the
probability. Losses compare distributions over these k + 1 outcomes, which sum to one. Coarser outcomes can only lower a
divergence (data-processing inequality); at k = V it is the full divergence.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TopK(NamedTuple):
    """A teacher's logits, shortened."""

    values: Tensor  # [B, L, k], the largest logits
    indices: Tensor  # [B, L, k] int64, their tokens
    rest: Tensor  # [B, L], logsumexp of all other logits; -inf where k = V


def token_cross_entropy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next tokens, in nats.

    Formula: -(1/M) sum_(b,t in mask) log softmax(z_bt)[x_b,t+1].

    Args:
        logits: [B, L, V].
        tokens: [B, L] int64, the input.
        mask: [B, L - 1] of `next_token_mask`.
    """
    picked = F.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]  # [B, L - 1]
    return -masked_mean(picked, mask)


def top_k(logits: Tensor, k: int) -> TopK:
    """Return the k largest of [B, L, V] logits and the logsumexp of the others.

    Raises:
        ValueError: k is not from 1 to V.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k: got k = {k}; allowed: 1 to {logits.shape[-1]}, the vocabulary")
    values, indices = logits.topk(k, dim=-1)  # [B, L, k]
    return TopK(values, indices, rest_of(logits, indices))


def rest_of(logits: Tensor, indices: Tensor) -> Tensor:
    """Return [B, L], the logsumexp of the logits [B, L, V] whose tokens are not among `indices` [B, L, k]."""
    return logits.scatter(-1, indices, float("-inf")).logsumexp(-1)


def token_response_top_k(
    student_logits: Tensor, teacher: TopK, mask: Tensor, *, temperature: Tensor | float, reverse: bool = False
) -> Tensor:
    """Return the KL of next-token distributions at a temperature, times T squared, mean over `mask`, in nats.

    Formula: T^2 (1/M) sum_(b,t in mask) KL(p_bt || q_bt) over k + 1 outcomes, the teacher's k tokens and all others
    as one. `reverse` gives KL(q || p), which punishes mass where the teacher has none (MiniLLM, Gu et al. 2024, on
    given text rather than on samples of the student's).

    The temperature softens the k + 1 outcomes: logits of the k tokens and the logsumexp of the others, on both sides,
    are divided by T. At T = 1 the outcomes have exactly the probabilities of the full distributions. At other
    temperatures the softened tail of the full vocabulary cannot be computed from the k logits; this is a substitute.

    Args:
        student_logits: [B, L, V].
        teacher: of `top_k`, for the same [B, L].
        mask: [B, L - 1] of `next_token_mask`.
        temperature: T > 0, a scalar.
        reverse: KL(q || p).
    """
    student, indices = student_logits[:, :-1], teacher.indices[:, :-1]
    student_k, teacher_k = student.gather(-1, indices), teacher.values[:, :-1].detach()  # [B, L - 1, k]
    if (
        indices.shape[-1] < student_logits.shape[-1]
    ):  # at k = V there is no other token, and -inf would make gradients NaN
        student_k = torch.cat([student_k, rest_of(student, indices)[..., None]], -1)  # [B, L - 1, k + 1]
        teacher_k = torch.cat([teacher_k, teacher.rest[:, :-1, None].detach()], -1)  # [B, L - 1, k + 1]
    log_p, log_q = F.log_softmax(teacher_k / temperature, -1), F.log_softmax(student_k / temperature, -1)
    return masked_mean(_divergence(log_p, log_q, reverse), mask) * temperature**2


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` where `mask` (same shape) is true; 0 for a mask without a true value."""
    counted = mask.to(values.dtype)
    return (values * counted).sum() / counted.sum().clamp_min(1.0)


def _divergence(log_p: Tensor, log_q: Tensor, reverse: bool) -> Tensor:
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    return (first.exp() * (first - second)).sum(-1)  # [B, L - 1]
