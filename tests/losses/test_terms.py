import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.losses import SIGNALS, LossConfig, Objective, attention_transfer, cross_entropy, hint, response
from rlkd.models.attention_map import attention_map

LOG3 = math.log(3.0)


def test_cross_entropy_by_hand() -> None:
    # softmax(log 3, 0) = (3/4, 1/4)
    logits = torch.tensor([[LOG3, 0.0], [LOG3, 0.0]])
    expected = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


def test_response_by_hand_at_temperature_one() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): KL(p || q) = 3/4 log(3/2) + 1/4 log(1/2)
    teacher, student = torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # what swapping teacher and student would give
    value = response(student, teacher, 1.0).item()
    assert value == pytest.approx(forward, rel=1e-5)
    assert abs(value - backward) > 0.01


def test_response_carries_temperature_squared_and_the_mean_over_samples() -> None:
    # at T = 2 logits of (2 log 3, 0) soften to (3/4, 1/4); T^2 = 4; two equal samples change nothing
    teacher, student = torch.tensor([[2 * LOG3, 0.0]]).repeat(2, 1), torch.zeros(2, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert response(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_response_of_equal_answers_is_zero() -> None:
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    assert response(logits, logits, 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_response_gradient_reaches_the_student_alone() -> None:
    # d/dz_s at T: (1/B) T (q - p); by hand at T = 1, B = 1: q - p = (-1/4, 1/4)
    student, teacher = torch.zeros(1, 2, requires_grad=True), torch.tensor([[LOG3, 0.0]], requires_grad=True)
    response(student, teacher, 1.0).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]]))


def test_hint_by_hand_and_its_shape_error() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 2.0]], requires_grad=True)
    value = hint(student, teacher)
    assert value.item() == pytest.approx(2.0)  # (4 + 0) / 2
    value.backward()
    assert teacher.grad is None
    with pytest.raises(ValueError, match="adapter"):
        hint(torch.zeros(2, 3), torch.zeros(2, 4))


def test_attention_map_of_a_vector_and_of_an_image() -> None:
    vector = torch.tensor([[1.0, 1.0, 2.0, 0.0]])  # squares 1 1 4 0, pooled to (1, 2), norm sqrt 5
    torch.testing.assert_close(attention_map(vector, 2), torch.tensor([[1.0, 2.0]]) / math.sqrt(5))
    image = torch.zeros(1, 2, 2, 2)
    image[0, :, 0, 0] = torch.tensor([1.0, 2.0])  # channels are summed: 1 + 4 = 5
    image[0, 0, 1, 1] = 2.0  # 4
    expected = torch.tensor([[5.0, 0.0, 0.0, 4.0]]) / math.sqrt(41)
    torch.testing.assert_close(attention_map(image, 4), expected)


def test_attention_transfer_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0], [0.6, 0.8]], requires_grad=True)
    value = attention_transfer(student, teacher)
    assert value.item() == pytest.approx(1.0)  # (2 + 0) / 2
    value.backward()
    assert teacher.grad is None


def test_family_losses_average_the_exits() -> None:
    logits, features = (torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)), (torch.ones(1, 4),)
    teacher_logits, labels = torch.zeros(1, 2), torch.tensor([0])
    given = {
        "exit_logits": logits,
        "labels": labels,
        "temperature": torch.tensor(1.0),
        "teacher_logits": teacher_logits,
        "adapted_features": torch.tensor([[1.0]]),
        "teacher_features": torch.tensor([[3.0]]),
        "student_map": attention_map(features[0], 2),
        "teacher_map": torch.tensor([[1.0, 0.0]]),
    }
    losses = Objective(LossConfig(), frozenset(SIGNALS))(given)
    soft = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # KL((1/2, 1/2) || (3/4, 1/4)) at the first exit, 0 at the last
    half = 1 / math.sqrt(2)
    expected = [(math.log(4 / 3) + math.log(2)) / 2, soft / 2, 4.0, (half - 1) ** 2 + half**2]
    torch.testing.assert_close(losses, torch.tensor(expected))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 10.0), st.integers(1, 6), st.integers(2, 10))
def test_response_is_torchs_batchmean_times_temperature_squared(seed: int, temperature: float, b: int, c: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, b, c, generator=generator, dtype=torch.float64).unbind()
    log_q, p = F.log_softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1)
    expected = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    value = response(student, teacher, temperature)
    torch.testing.assert_close(value, expected)
    assert value.item() >= -1e-9


@pytest.mark.parametrize("shape", [(5, 48), (5, 7), (5, 8, 4, 4), (5, 3, 2, 2)], ids=str)
def test_attention_maps_have_unit_norm_or_are_empty(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    features[0] = 0.0  # a sample on which nothing is active
    maps = attention_map(features, 16)
    assert maps.shape == (5, 16)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.norm(dim=-1), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))
