"""Hand-worked numbers of hard-label, response, adversarial and self terms."""

import math

import pytest
import torch
from torch import Tensor

from rlkd.losses import (
    Discriminator,
    confidence_weighted,
    decoupled,
    dist,
    jensen_shannon,
    label_smoothing,
    mutual,
    per_sample_temperature,
    response,
    reverse_kl,
    self_distillation,
    standardised,
)

LOG3 = math.log(3.0)
TEACHER, STUDENT = torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)  # (3/4, 1/4) and (1/2, 1/2)


def test_label_smoothing() -> None:
    # softmax (3/4, 1/4), label 0, s = 0.2: -(0.8 log 3/4) - 0.1 (log 3/4 + log 1/4)
    expected = -0.8 * math.log(0.75) - 0.1 * (math.log(0.75) + math.log(0.25))
    assert label_smoothing(TEACHER, torch.tensor([0]), 0.2).item() == pytest.approx(expected, rel=1e-6)


def test_reverse_kl() -> None:
    # KL((1/2, 1/2) || (3/4, 1/4)); T^2 = 4 with logits of twice the size
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert reverse_kl(STUDENT, TEACHER, 1.0).item() == pytest.approx(expected, rel=1e-5)
    assert reverse_kl(STUDENT, 2 * TEACHER, 2.0).item() == pytest.approx(4 * expected, rel=1e-5)


def test_jensen_shannon_lies_halfway_and_is_symmetric() -> None:
    # m = (5/8, 3/8)
    to_teacher = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    to_student = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    value = jensen_shannon(STUDENT, TEACHER, 1.0).item()
    assert value == pytest.approx((to_teacher + to_student) / 2, rel=1e-5)
    assert jensen_shannon(TEACHER, STUDENT, 1.0).item() == pytest.approx(value, rel=1e-6)
    far = jensen_shannon(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]), 1.0)
    assert far.item() == pytest.approx(math.log(2), rel=1e-6)


def test_decoupled_by_hand() -> None:
    # teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), label 0. Target: KL((1/2, 1/2) || (1/4, 3/4)).
    # Among the others: (1/2, 1/2) against (1/3, 2/3).
    teacher, student = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    target = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    among = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    value = decoupled(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=8.0).item()
    assert value == pytest.approx(target + 8 * among, rel=1e-5)
    # KL is the target part plus (1 - p_label) times the other part (equation 5 of the paper)
    whole = response(student, teacher, 1.0).item()
    assert decoupled(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=0.5).item() == pytest.approx(
        whole, rel=1e-5
    )


def test_dist_ignores_what_correlation_ignores() -> None:
    p = torch.tensor([[0.5, 1 / 3, 1 / 6], [0.125, 0.25, 0.625]]).log()
    assert dist(p, p, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    # exchanged samples: less their mean 1/3, the rows are (1, 0, -1) / 6 and (-5, -2, 7) / 24; columns of two
    # samples correlate at -1
    rho = (-5 - 7) / math.sqrt(2 * 78)
    assert dist(p.flip(0), p, 1.0).item() == pytest.approx((1 - rho) + 2, rel=1e-5)


def test_standardised_ignores_size_and_offset_of_logits() -> None:
    teacher, student = torch.tensor([[3.0, 1.0, -1.0]]), torch.tensor([[0.0, 1.0, 5.0]])
    value = standardised(student, teacher, 2.0)
    torch.testing.assert_close(standardised(student * 7 + 3, teacher * 0.5 - 2, 2.0), value, rtol=1e-4, atol=1e-5)
    z = math.sqrt(1.5)  # (3, 1, -1) standardised is (z, 0, -z)
    torch.testing.assert_close(standardised(torch.zeros(1, 3), teacher, 1.0), response(
        torch.zeros(1, 3), torch.tensor([[z, 0.0, -z]]), 1.0))  # fmt: skip


def two_samples() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[LOG3, 0.0], [0.0, math.log(9.0)]])


def test_confidence_weighs_samples() -> None:
    student, teacher = two_samples()  # teachers (3/4, 1/4) and (1/10, 9/10)
    each = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.9 * math.log(1.8) + 0.1 * math.log(0.2)]
    expected = (0.75 * each[0] + 0.9 * each[1]) / 1.65
    assert confidence_weighted(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_temperature_of_each_sample() -> None:
    # student confidences 1/2 and 3/4: w = 2 and 4/3, mean 5/3; T = 3 + (5/3 - w) = 8/3 and 10/3
    student, teacher = torch.tensor([[0.0, 0.0], [LOG3, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = (response(student[:1], teacher[:1], 8 / 3) + response(student[1:], teacher[1:], 10 / 3)) / 2
    torch.testing.assert_close(per_sample_temperature(student, teacher, 3.0), expected)


def test_self_distillation_teaches_earlier_exits_alone() -> None:
    early, last = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    value = self_distillation((early, early, last), 1.0)
    torch.testing.assert_close(value, response(STUDENT, TEACHER, 1.0))
    value.backward()
    assert last.grad is None
    assert early.grad is not None
    assert self_distillation((TEACHER,), 1.0).item() == 0.0


def test_mutual_is_kl_from_the_peer() -> None:
    torch.testing.assert_close(mutual(STUDENT, TEACHER), response(STUDENT, TEACHER, 1.0))


def test_discriminator_descends_what_the_student_climbs() -> None:
    module = Discriminator(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.hidden.weight[0, 0] = 1.0  # the score is leaky_relu(log p_0)
        module.out.weight[0, 0] = 1.0
    student = STUDENT.clone().requires_grad_()
    loss = module(student, TEACHER)
    scores = 0.2 * math.log(0.75), 0.2 * math.log(0.5)
    expected = (math.log1p(math.exp(-scores[0])) + math.log1p(math.exp(scores[1]))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert module.out.bias.grad is not None
    # descent on the student's logits raises its score: it wants to look like the teacher, whose p_0 is larger
    assert student.grad is not None
    assert student.grad[0, 0] < 0 < student.grad[0, 1]
