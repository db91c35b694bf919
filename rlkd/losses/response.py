"""Knowledge in the teacher's answers: distributions over the classes, and how to weigh and soften them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.hard_label import log_probabilities
from rlkd.losses.registry import same_classes, term

EPSILON = 1e-6  # added to standard deviations


def _softened(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [C, B] at a temperature: the teacher's, without gradient, and the student's."""
    return log_probabilities(teacher_logits.detach() / temperature), log_probabilities(student_logits / temperature)


@term("kl", "response", "https://arxiv.org/abs/1503.02531")
def response(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Kullback-Leibler divergence from teacher to student at a temperature, times T squared, in nats.

    Formula: T^2 (1/B) sum_b sum_c p_bc (log p_bc - log q_bc), p = softmax(teacher / T), q = softmax(student / T)
    (Hinton, Vinyals & Dean 2015).
    The teacher is the target: its logits carry no gradient. T^2 keeps the gradient's size comparable across
    temperatures (section 2 of the paper); the mean is over samples ("batchmean"), not over elements.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    same_classes("kl", student_logits, teacher_logits)
    log_p, log_q = _softened(student_logits, teacher_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(0).mean() * temperature**2


@term("reverse_kl", "response", "https://arxiv.org/abs/2306.08543", weight=1.0)
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Kullback-Leibler divergence from student to teacher, times T squared, in nats.

    Formula: T^2 (1/B) sum_b sum_c q_bc (log q_bc - log p_bc) (MiniLLM, Gu et al. 2024). It punishes probability where
    the teacher has none.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    same_classes("reverse_kl", student_logits, teacher_logits)
    log_p, log_q = _softened(student_logits, teacher_logits, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(0).mean() * temperature**2


@term("js", "response", "https://arxiv.org/abs/2306.13649", weight=1.0)
def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Jensen-Shannon divergence of teacher and student, times T squared, in nats.

    Formula: T^2 (1/B) sum_b [KL(p_b || m_b) + KL(q_b || m_b)] / 2, m = (p + q) / 2 (GKD, Agarwal et al. 2024, at
    beta = 0.5). Without T^2 it is at most log 2.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    same_classes("js", student_logits, teacher_logits)
    log_p, log_q = _softened(student_logits, teacher_logits, temperature)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return both.sum(0).mean() / 2 * temperature**2


@term("dkd", "response", "https://arxiv.org/abs/2203.08679", weight=1.0)
def decoupled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Tensor | float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: target against the rest, and among the rest, with weights of their own.

    Formula: T^2 (alpha KL(b_p || b_q) + beta KL(p^ || q^)), mean over samples; b the binary distribution of the label
    and all other classes, p^ the softmax over the classes other than the label (Zhao et al. 2022). Weights are the
    paper's for CIFAR-100; KL itself is alpha = 1 and beta = 1 - p_label.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        labels: [B] int64.
        temperature: T > 0, a scalar.
        alpha: weight of the first part.
        beta: weight of the second part.

    Returns:
        A scalar >= 0.
    """
    same_classes("dkd", student_logits, teacher_logits)
    classes = torch.arange(student_logits.shape[-1], device=labels.device)
    is_label = (classes[:, None] == labels).to(student_logits)  # [C, B]; one_hot does not work under vmap and grad
    log_p, log_q = _softened(student_logits, teacher_logits, temperature)
    target, others = zip(*(_split(log, is_label) for log in (log_p, log_q)), strict=True)
    rest = tuple(log - other for log, other in zip((log_p, log_q), others, strict=True))  # log p^ off the label
    binary = target[0].exp() * (target[0] - target[1]) + others[0].exp() * (others[0] - others[1])  # [B]
    among = (rest[0].exp() * (rest[0] - rest[1]) * (1 - is_label)).sum(0)  # [B]
    loss: Tensor = (alpha * binary + beta * among).mean() * temperature**2
    return loss


def _split(log_p: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability [B] of the label, and of all other classes together."""
    others = (log_p - 1e4 * is_label).logsumexp(0)  # [B]
    return (log_p * is_label).sum(0), others


@term("dist", "response", "https://arxiv.org/abs/2205.10536", weight=2.0)
def dist(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Distance of correlations, of a sample's classes and of a class's samples (DIST).

    Formula: T^2 [(1/B) sum_b (1 - rho(p_b, q_b)) + (1/C) sum_c (1 - rho(p_c, q_c))], rho Pearson's correlation, rows
    and columns of the softened probabilities (Huang et al. 2022).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar in [0, 4 T^2].
    """
    same_classes("dist", student_logits, teacher_logits)
    p, q = (log.exp() for log in _softened(student_logits, teacher_logits, temperature))
    return ((1 - _correlation(p, q, 0)).mean() + (1 - _correlation(p, q, 1)).mean()) * temperature**2


def _correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Return Pearson's correlation along `dim`."""
    a, b = first - first.mean(dim, keepdim=True), second - second.mean(dim, keepdim=True)
    return F.cosine_similarity(a, b, dim=dim, eps=1e-8)


@term("standardised_kl", "response", "https://arxiv.org/abs/2403.01427", weight=9.0)
def standardised(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """KL of logits that were standardised within each sample, so that their size is not learned.

    Formula: T^2 KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)), Z(z) = (z - mean(z)) / std(z) over classes
    (Sun et al. 2024). The published weight, 9, belongs to T = 2.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    same_classes("standardised_kl", student_logits, teacher_logits)
    return response(_standard(student_logits), _standard(teacher_logits.detach()), temperature)


def _standard(logits: Tensor) -> Tensor:
    """Return logits [B, C] with mean 0 and standard deviation 1 over classes."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPSILON**2).sqrt()


@term("confidence_kl", "response", "https://arxiv.org/abs/2201.00007", weight=1.0)
def confidence_weighted(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """KL in which a sample counts as much as the teacher is sure of it.

    Formula: T^2 sum_b c_b KL_b / sum_b c_b, c_b the teacher's largest probability at T = 1 (confidence as in CA-MKD,
    Zhang et al. 2022, which weighs teachers; here it weighs samples of one teacher).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    same_classes("confidence_kl", student_logits, teacher_logits)
    confidence = log_probabilities(teacher_logits.detach()).exp().amax(0)  # [B]
    log_p, log_q = _softened(student_logits, teacher_logits, temperature)
    each = (log_p.exp() * (log_p - log_q)).sum(0)  # [B]
    return (confidence * each).sum() / confidence.sum() * temperature**2


@term("per_sample_kl", "response", "https://arxiv.org/abs/1911.07471", weight=1.0)
def per_sample_temperature(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float, spread: float = 1.0
) -> Tensor:
    """KL with a temperature for each sample: higher where the student is surer than the mean of the batch.

    Formula: (1/B) sum_b T_b^2 KL_b(T_b), T_b = max(1, T + s (mean(w) - w_b)), w_b = 1 / max_c softmax(student_b)_c
    without gradient (dynamic temperature of Wen, Lai & Qian 2021, with their confidence-weighted w; they use s = 40
    on other w).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.
        spread: s.

    Returns:
        A scalar >= 0.
    """
    same_classes("per_sample_kl", student_logits, teacher_logits)
    doubt = 1 / log_probabilities(student_logits.detach()).exp().amax(0)  # [B]
    each = (temperature + spread * (doubt.mean() - doubt)).clamp_min(1.0)[:, None]  # [B, 1]
    log_p, log_q = _softened(student_logits, teacher_logits, each)
    return ((log_p.exp() * (log_p - log_q)).sum(0) * each[:, 0].square()).mean()
