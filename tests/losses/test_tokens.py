"""Token-level terms on numbers worked by hand, and masks that must make padding and prompt invisible."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data.examples import next_token_mask
from rlkd.losses.tokens import (
    rest_of,
    token_cross_entropy,
    token_response_top_k,
    top_k,
)

# (1/2, 1/4, 1/8, 1/8) and (1/4, 1/4, 1/4, 1/4)
P = torch.tensor([0.5, 0.25, 0.125, 0.125])
TEACHER, STUDENT = P.log().repeat(1, 3, 1), torch.zeros(1, 3, 4)
ALL = torch.tensor([[True, True]])
FORWARD = 0.5 * math.log(2) + 0.0 + 2 * 0.125 * math.log(0.5)
REVERSE = 0.25 * math.log(0.5) + 0.0 + 2 * 0.25 * math.log(2)


def token_response(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float, reverse: bool = False
) -> Tensor:
    """The full divergence, written as the formula reads: T^2 times the mean of KL(p || q), or of KL(q || p)."""
    p, q = ((z[:, :-1] / temperature).softmax(-1) for z in (teacher_logits.detach(), student_logits))
    first, second = (q, p) if reverse else (p, q)
    divergences = F.kl_div(second.log(), first, reduction="none").sum(-1)[mask]
    return divergences.mean() * temperature**2 if mask.any() else divergences.sum()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mask_counts_real_next_tokens_after_the_prompt() -> None:
    attention = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])  # padded right, padded left
    prompt = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    assert next_token_mask(attention).int().tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert next_token_mask(attention, prompt).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_divergences_by_hand() -> None:
    assert token_response(STUDENT, TEACHER, ALL, 1.0).item() == pytest.approx(FORWARD, rel=1e-5)
    assert token_response(STUDENT, TEACHER, ALL, 1.0, reverse=True).item() == pytest.approx(REVERSE, rel=1e-5)


def test_temperature_squared_by_hand() -> None:
    # at T = 2, logits twice as large soften to the same P
    assert token_response(STUDENT, 2 * TEACHER, ALL, 2.0).item() == pytest.approx(4 * FORWARD, rel=1e-5)


def test_top_two_by_hand() -> None:
    # outcomes: 1/2, 1/4, rest 1/4 against 1/4, 1/4, rest 1/2
    shortened = top_k(TEACHER, 2)
    assert shortened.indices[0, 0].tolist() == [0, 1]
    assert shortened.rest[0, 0].item() == pytest.approx(math.log(0.25))
    forward = 0.5 * math.log(2) + 0.0 + 0.25 * math.log(0.5)
    backward = 0.25 * math.log(0.5) + 0.0 + 0.5 * math.log(2)
    assert token_response_top_k(STUDENT, shortened, ALL, temperature=1.0).item() == pytest.approx(forward, rel=1e-5)
    assert token_response_top_k(STUDENT, shortened, ALL, temperature=1.0, reverse=True).item() == pytest.approx(
        backward, rel=1e-5
    )


def test_dropping_the_tail_would_give_another_number() -> None:
    # renormalised over the two tokens: (2/3, 1/3) against (1/2, 1/2)
    dropped = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    value = token_response_top_k(STUDENT, top_k(TEACHER, 2), ALL, temperature=1.0).item()
    assert abs(value - dropped) > 0.1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_kept_is_the_full_divergence(reverse: bool, temperature: float) -> None:
    student, teacher = random(2, 5, 7), random(2, 5, 7, seed=1)
    mask = next_token_mask(torch.ones(2, 5))
    full = token_response(student, teacher, mask, temperature, reverse)
    torch.testing.assert_close(
        token_response_top_k(student, top_k(teacher, 7), mask, temperature=temperature, reverse=reverse), full
    )


def test_fewer_outcomes_never_diverge_more() -> None:
    student, teacher = random(2, 5, 9), random(2, 5, 9, seed=1)
    mask = next_token_mask(torch.ones(2, 5))
    values = [token_response_top_k(student, top_k(teacher, k), mask, temperature=1.0).item() for k in range(1, 10)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(token_response(student, teacher, mask, 1.0).item(), rel=1e-5)


def test_padding_and_prompt_change_nothing_and_get_no_gradient() -> None:
    student, teacher = random(2, 6, 5).requires_grad_(), random(2, 6, 5, seed=1)
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    prompt = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    mask = next_token_mask(attention, prompt)
    tokens = torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(2))
    losses = [
        token_response(student, teacher, mask, 2.0),
        token_response(student, teacher, mask, 2.0, reverse=True),
        token_response_top_k(student, top_k(teacher, 2), mask, temperature=2.0),
        token_cross_entropy(student, tokens, mask),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        touched = gradient.abs().sum(-1) > 0  # [B, L]
        assert touched[:, :-1].tolist() == mask.tolist()
        assert not touched[:, -1].any()
    changed = teacher.clone()
    changed[0, 4:] = 99.0
    torch.testing.assert_close(token_response(student, changed, mask, 2.0), losses[0])


def test_the_mean_is_over_counted_positions() -> None:
    # the second position agrees with the teacher: counting it halves the mean
    student = torch.stack([STUDENT[0, 0], TEACHER[0, 0], STUDENT[0, 0]])[None]
    one = torch.tensor([[True, False]])
    assert token_response(student, TEACHER, one, 1.0).item() == pytest.approx(FORWARD, rel=1e-5)
    assert token_response(student, TEACHER, ALL, 1.0).item() == pytest.approx(FORWARD / 2, rel=1e-5)
    assert token_response(student, TEACHER, ~ALL, 1.0).item() == 0.0


def test_cross_entropy_by_hand() -> None:
    value = token_cross_entropy(TEACHER, torch.tensor([[3, 0, 2]]), ALL)
    assert value.item() == pytest.approx((math.log(2) + math.log(8)) / 2, rel=1e-5)


def test_the_teacher_gets_no_gradient_and_k_is_checked() -> None:
    teacher = random(1, 3, 4).requires_grad_()
    student = random(1, 3, 4, seed=1).requires_grad_()
    shortened = [token_response_top_k(student, top_k(teacher, k), ALL, temperature=1.0) for k in (2, 4)]
    (token_response(student, teacher, ALL, 1.0) + shortened[0] + shortened[1]).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    with pytest.raises(ValueError, match="1 to 4"):
        top_k(teacher, 5)
    assert rest_of(TEACHER, top_k(TEACHER, 4).indices)[0, 0].item() == -math.inf
