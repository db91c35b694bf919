"""Divergences over a whole vocabulary without logits of the whole batch, for teachers in memory.

Logits [M, V] of student and teacher are computed from the last hidden states chunk by chunk, in the forward pass, and
their gradients at once; only gradients of hidden states and of the head are kept. The idea is that of fused linear
cross entropy (Liger Kernel, Hsu et al. 2024, https://arxiv.org/abs/2410.10989), here in plain PyTorch and for the
answers of a teacher instead of labels.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward", "reverse", "js"]


def _forward(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student), summed; log-probabilities [m, V]."""
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def _reverse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(student || teacher), summed; log-probabilities [m, V]."""
    return F.kl_div(teacher, student, reduction="sum", log_target=True)


def _jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of the KL divergences of both from their mixture, summed; log-probabilities [m, V]."""
    mixture = torch.logaddexp(student, teacher) - math.log(2.0)
    return 0.5 * (_forward(mixture, student) + _forward(mixture, teacher))


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": _forward,
    "reverse": _reverse,
    "js": _jensen_shannon,
}


def chunked_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    chunk_size: int = 16,
) -> Tensor:
    """Return T^2 times the mean divergence of softened answers over M positions, [].

    loss = T^2 / M sum_m D(softmax(z_t / T), softmax(z_s / T)), z = hidden @ head.T

    Args:
        student_hidden: [M, D], of the positions that count; gradients flow.
        student_head: [V, D]; gradients flow.
        teacher_hidden: [M, E]; no gradients.
        teacher_head: [V, E]; no gradients.
        temperature: T.
        kind: `forward` KL(teacher || student), `reverse` KL(student || teacher), or `js`, Jensen-Shannon.
        chunk_size: positions whose logits exist at once.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, or a chunk without a position.
    """
    shapes = [tuple(t.shape) for t in (student_hidden, student_head, teacher_hidden, teacher_head)]
    (m, d), (v, d_head), (m_teacher, e), (v_teacher, e_head) = shapes
    if (m, v) != (m_teacher, v_teacher) or (d, e) != (d_head, e_head):
        raise ValueError(
            f"chunked_divergence: got student_hidden, student_head, teacher_hidden, teacher_head of shapes {shapes}; "
            "allowed: [M, D], [V, D], [M, E], [V, E]"
        )
    if kind not in DIVERGENCES:
        raise ValueError(f"kind: got {kind!r}; allowed: {', '.join(DIVERGENCES)}")
    if chunk_size < 1 or not temperature > 0:
        raise ValueError(f"got chunk_size {chunk_size}, temperature {temperature:g}; allowed: at least 1, above 0")
    given = (student_hidden, student_head, teacher_hidden, teacher_head)
    loss: Tensor = _Chunked.apply(*given, temperature, kind, chunk_size)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        temperature: float,
        kind: Divergence,
        chunk_size: int,
    ) -> Tensor:
        """Compute the loss and both gradients."""
        hidden, head = student_hidden.detach(), student_head.detach()
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = torch.zeros((), dtype=torch.float64)
        scale = temperature**2 / len(hidden)
        for begin in range(0, len(hidden), chunk_size):
            rows = slice(begin, begin + chunk_size)
            answers = (teacher_hidden.detach()[rows] @ teacher_head.detach().T).div_(temperature)  # [m, V]
            answers = answers.log_softmax(-1)
            with torch.enable_grad():
                logits = (hidden[rows] @ head.T).requires_grad_()  # [m, V]
                loss = DIVERGENCES[kind]((logits / temperature).log_softmax(-1), answers) * scale
                (grad,) = torch.autograd.grad(loss, logits)
            total += loss.detach().double().cpu()
            grad_hidden[rows] = grad @ head
            grad_head.addmm_(grad.T, hidden[rows])
        ctx.gradients = [grad_hidden, grad_head]  # given away once: a second reference would cost a copy of the head
        return total.to(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        (upstream,) = grads
        if not ctx.gradients:
            raise RuntimeError("chunked_divergence: its gradients were used already; compute the loss again")
        grad_head, grad_hidden = ctx.gradients.pop(), ctx.gradients.pop()
        return grad_hidden.mul_(upstream), grad_head.mul_(upstream), None, None, None, None, None
