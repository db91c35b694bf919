"""Knowledge in the teacher's answers: the softened distribution (Hinton, Vinyals & Dean 2015)."""

from torch import Tensor

from rlkd.losses.hard_label import log_probabilities


def response(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Kullback-Leibler divergence from teacher to student at a temperature, times T squared, in nats.

    Formula: T^2 (1/B) sum_b sum_c p_bc (log p_bc - log q_bc), p = softmax(teacher / T), q = softmax(student / T).
    The teacher is the target: its logits carry no gradient. T^2 keeps the gradient's size comparable across
    temperatures (section 2 of the paper); the mean is over samples ("batchmean"), not over elements.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: T > 0, a scalar.

    Returns:
        A scalar >= 0.
    """
    log_p = log_probabilities(teacher_logits.detach() / temperature)  # [C, B]
    log_q = log_probabilities(student_logits / temperature)  # [C, B]
    return (log_p.exp() * (log_p - log_q)).sum(0).mean() * temperature**2
