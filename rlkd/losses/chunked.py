"""Losses over a whole vocabulary without logits of the whole vocabulary, for teachers in memory.

Logits [M, V] of student and teacher are computed from the last hidden states, one block of the vocabulary at a time: in
the forward pass for the sums over the vocabulary and the losses, in the backward pass again for the gradients. Blocks
are of the vocabulary, not of positions: then every row of the head's gradient is written once. The idea is that of
fused linear cross entropy and JSD (Liger Kernel, Hsu et al. 2024, https://arxiv.org/abs/2410.10989), in plain PyTorch.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Divergence = Literal["forward", "reverse", "js"]
BLOCK = 512  # tokens of the vocabulary whose logits exist at once


class Head(NamedTuple):
    """Hidden states and the output layer that answers them."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]

    def logits(self, rows: slice) -> Tensor:
        """Return logits [M, v] of a block of the vocabulary, in float32 or wider."""
        logits = self.hidden @ self.weight[rows].to(self.hidden.dtype).T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.bias is None else logits.add_(self.bias[rows])


def _forward(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return terms of KL(teacher || student), [M, v]."""
    return log_p.exp().mul_(log_p - log_q)


def _reverse(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return terms of KL(student || teacher), [M, v]."""
    return log_q.exp().mul_(log_q - log_p)


def _student_mixture(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return terms of KL(student || mixture), [M, v]."""
    mixture = torch.logaddexp(log_q, log_p).sub_(math.log(2.0))
    return log_q.exp().mul_(log_q - mixture)


def _jensen_shannon(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return terms of the mean of the KL divergences of both from their mixture, [M, v]."""
    return _student_mixture(log_q, log_p).add_(_student_mixture(log_p, log_q)).mul_(0.5)


TERMS: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": _forward,
    "reverse": _reverse,
    "js": _jensen_shannon,
}


def chunked_divergence(
    student: Head, teacher: Head, *, temperature: float = 1.0, kind: Divergence = "forward", block: int = BLOCK
) -> Tensor:
    """Return T^2 times the mean divergence of softened answers over M positions, [].

    loss = T^2 / M sum_m D(softmax(z_t / T), softmax(z_s / T)), z = hidden @ weight.T + bias

    Args:
        student: of the positions that count; gradients flow to its tensors.
        teacher: of the same positions and vocabulary, of any width; no gradients.
        temperature: T.
        kind: `forward` KL(teacher || student), `reverse` KL(student || teacher), or `js`, Jensen-Shannon.
        block: tokens of the vocabulary whose logits exist at once.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, or a block without a token.
    """
    return chunked_losses(student, teacher, None, temperature=temperature, kind=kind, block=block)[1]


def chunked_losses(
    student: Head,
    teacher: Head,
    targets: Tensor | None,
    *,
    temperature: Tensor | float,
    kind: Divergence = "forward",
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of the targets, and `chunked_divergence`, [] each, in float32 or wider.

    Args:
        student: as of `chunked_divergence`.
        teacher: as of `chunked_divergence`.
        targets: [M] int64, the right tokens; without them the cross entropy is 0.
        temperature: T, of the divergence alone.
        kind: as of `chunked_divergence`.
        block: as of `chunked_divergence`.

    Raises:
        ValueError: as of `chunked_divergence`.
    """
    shapes = [tuple(t.shape) for t in (*student[:2], *teacher[:2])]
    if any(len(shape) != 2 for shape in shapes) or not _fit(*shapes):
        raise ValueError(
            f"chunked_losses: got hidden states and weights of student and teacher of shapes {shapes}; "
            "allowed: [M, D], [V, D], [M, E], [V, E], M >= 1"
        )
    if kind not in TERMS:
        raise ValueError(f"kind: got {kind!r}; allowed: {', '.join(TERMS)}")
    if block < 1 or not float(temperature) > 0:
        raise ValueError(f"got block {block}, temperature {float(temperature):g}; allowed: at least 1, above 0")
    frozen = Head(*(None if t is None else t.detach() for t in teacher))  # type: ignore[arg-type]
    settings = _Settings(float(temperature), kind, block)
    losses: Tensor = _Blocks.apply(*student, frozen, targets, settings)  # type: ignore[no-untyped-call]
    return losses[0], losses[1]


def _fit(
    hidden: tuple[int, ...], weight: tuple[int, ...], other: tuple[int, ...], other_weight: tuple[int, ...]
) -> bool:
    """Return whether shapes belong together."""
    same = (hidden[0], weight[0], hidden[1]) == (other[0], other_weight[0], weight[1])
    return same and other[1] == other_weight[1] and hidden[0] > 0


class _Settings(NamedTuple):
    """Settings of a loss: all that is no tensor."""

    temperature: float
    kind: Divergence
    block: int


class _Blocks(torch.autograd.Function):
    """Losses in the forward pass; logits again, and gradients, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Head,
        targets: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        """Compute both losses, [2]."""
        temperature, kind, block = settings
        student = Head(hidden, weight, bias)
        totals, picked = _sums_of(student, teacher, targets, temperature, block)
        divergence, own = torch.zeros_like(picked), torch.zeros_like(picked)  # [M], own: part that gradients need
        for rows in _blocks(len(weight), block):
            log_q, log_p = _log_probabilities(student, teacher, rows, totals, temperature)
            terms = TERMS[kind](log_q, log_p)
            divergence += terms.sum(-1)
            if kind == "js":
                own += _student_mixture(log_q, log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, totals, divergence if kind == "reverse" else own)
        ctx.teacher, ctx.settings = teacher, settings
        entropy = (totals[0] - picked).mean() if targets is not None else picked.new_zeros(())
        return torch.stack([entropy, divergence.mean() * temperature**2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the gradients of hidden states, weight and bias for the gradients [2] of the losses."""
        hidden, weight, bias, targets, totals, own = ctx.saved_tensors
        teacher, (temperature, kind, block) = ctx.teacher, ctx.settings
        student = Head(hidden, weight, bias)
        of_entropy, of_divergence = (upstream / len(hidden)).tolist()
        grad_hidden = torch.zeros(hidden.shape, dtype=totals.dtype, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for rows in _blocks(len(weight), block):
            log_q, log_p = _log_probabilities(student, teacher, rows, totals, temperature)
            grad = _gradient(log_q, log_p, own, kind).mul_(of_divergence * temperature)  # [M, v]
            if targets is not None and of_entropy:
                grad += _entropy_gradient(log_q, totals, targets, rows, temperature).mul_(of_entropy)
            del log_q, log_p
            if grad_bias is not None:
                grad_bias[rows] = grad.sum(0)
            grad = grad.to(hidden.dtype)
            grad_hidden += grad @ weight[rows].to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[rows] = grad.T @ hidden
        return (grad_hidden.to(hidden.dtype), grad_weight, grad_bias, *(None,) * 3)


def _blocks(size: int, block: int) -> Iterator[slice]:
    return (slice(begin, min(begin + block, size)) for begin in range(0, size, block))


def _sums_of(
    student: Head, teacher: Head, targets: Tensor | None, temperature: float, block: int
) -> tuple[Tensor, Tensor]:
    """Return logsumexp [3, M] of z_s, z_s / T and z_t / T over the vocabulary, and the targets' logits z_s, [M]."""
    totals, picked = None, None
    for rows in _blocks(len(student.weight), block):
        z, answers = student.logits(rows), teacher.logits(rows)  # [M, v]
        here = torch.stack([z.logsumexp(-1), (z / temperature).logsumexp(-1), answers.div_(temperature).logsumexp(-1)])
        totals = here if totals is None else torch.logaddexp(totals, here)
        picked = z.new_zeros(len(z)) if picked is None else picked
        if targets is not None:
            inside = (targets >= rows.start) & (targets < rows.stop)
            picked[inside] = z[inside].gather(1, targets[inside, None] - rows.start)[:, 0]
    assert totals is not None
    assert picked is not None
    return totals, picked


def _log_probabilities(
    student: Head, teacher: Head, rows: slice, totals: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return softened log-probabilities [M, v] of student and teacher for a block of the vocabulary."""
    log_q = student.logits(rows).div_(temperature).sub_(totals[1, :, None])
    log_p = teacher.logits(rows).div_(temperature).sub_(totals[2, :, None])
    return log_q, log_p


def _gradient(log_q: Tensor, log_p: Tensor, own: Tensor, kind: Divergence) -> Tensor:
    """Return T times the gradient [M, v] of a position's divergence by the student's logits.

    forward: q - p; reverse: q (log q - log p - KL(q || p)); js: q (log q - log m - KL(q || m)) / 2.
    """
    if kind == "forward":
        return log_q.exp().sub_(log_p.exp())
    if kind == "reverse":
        return _reverse(log_q, log_p).sub_(log_q.exp().mul_(own[:, None]))
    return _student_mixture(log_q, log_p).sub_(log_q.exp().mul_(own[:, None])).mul_(0.5)


def _entropy_gradient(log_q: Tensor, totals: Tensor, targets: Tensor, rows: slice, temperature: float) -> Tensor:
    """Return the gradient [M, v] of a position's cross entropy by the logits: q at T = 1, less 1 at the target."""
    grad = ((log_q + totals[1, :, None]) * temperature).sub_(totals[0, :, None]).exp_()
    inside = ((targets >= rows.start) & (targets < rows.stop)).nonzero()[:, 0]
    grad[inside, targets[inside] - rows.start] -= 1.0
    return grad
