"""Hand-worked numbers of feature, attention, relation and gradient terms."""

import math

import pytest
import torch
from torch import nn

from rlkd.losses import (
    CRD,
    FSP,
    MemoryCRD,
    activation_boundary,
    correlation_congruence,
    fsp,
    fsp_matrix,
    gradient_cosine,
    gradient_penalty,
    jacobian_matching,
    logit_gradient,
    loss_gradient,
    normalised_hint,
    probabilistic_transfer,
    rkd_angle,
    rkd_distance,
    sample_graph,
    similarity_preserving,
    transformer_attention,
    value_relation,
)

CORNER = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # distances 3, 4, 5
LINE = torch.tensor([[0.0], [1.0], [2.0]])  # distances 1, 2, 1


def test_normalised_hint_ignores_size_and_offset_of_channels() -> None:
    teacher = torch.tensor([[1.0, 0.0], [3.0, 2.0]])  # standardised (-1, 1) in both channels
    student = torch.tensor([[5.0, 40.0], [7.0, 20.0]])  # (-1, 1) and (1, -1)
    assert normalised_hint(student, teacher).item() == pytest.approx((0 + 0 + 4 + 4) / 4, rel=1e-4)


def test_activation_boundary() -> None:
    teacher = torch.tensor([[2.0, 0.0]])  # above, not above
    student = torch.tensor([[0.5, 0.5]])  # hinges 1 - 0.5 and 1 + 0.5
    assert activation_boundary(student, teacher).item() == pytest.approx((0.25 + 2.25) / 2)
    assert activation_boundary(torch.tensor([[1.0, -1.0]]), teacher).item() == 0.0


def test_similarity_preserving() -> None:
    # student rows (1, 0), (0, 1): G = I. Teacher rows (1), (1): G = ones, rows of norm sqrt 2
    student, teacher = torch.eye(2), torch.ones(2, 1)
    half = 1 / math.sqrt(2)
    expected = (2 * (1 - half) ** 2 + 2 * half**2) / 4
    assert similarity_preserving(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_fsp_matrix_of_vectors_and_images() -> None:
    first, last = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    torch.testing.assert_close(fsp_matrix(first, last), torch.tensor([[[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]]))
    a, b = torch.arange(4.0).reshape(1, 1, 2, 2), torch.ones(1, 1, 1, 1)  # pooled to one position: mean 1.5
    torch.testing.assert_close(fsp_matrix(a, b), torch.tensor([[[1.5]]]))
    module = FSP(2, 2)
    with torch.no_grad():
        module.adapter.weight.copy_(torch.eye(2))
        module.adapter.bias.zero_()
    loss = module(first, last, first, last + 1)
    assert loss.item() == pytest.approx((3 * 1 + 3 * 4) / 6)
    # without forming the matrices, the same
    torch.testing.assert_close(loss, fsp(fsp_matrix(first, last), fsp_matrix(first, last + 1)))


def test_transformer_attention_of_other_heads_and_lengths() -> None:
    student = torch.full((1, 1, 2, 2), 0.5)
    teacher = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[1.0, 0.0], [0.5, 0.5]]]])  # two heads; the mean is 3/4, 1/4
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert transformer_attention(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    longer = (
        teacher.repeat_interleave(2, -1).repeat_interleave(2, -2) / 2
    )  # 4 tokens; keys are summed, queries averaged
    assert transformer_attention(student, longer).item() == pytest.approx(expected, rel=1e-5)


def test_value_relation() -> None:
    # one head, one channel, two tokens: V V^T = [[0, 0], [0, v^2]]; the second row is softmax(0, v^2)
    student = torch.zeros(1, 1, 2, 1)
    teacher = torch.tensor([0.0, math.sqrt(math.log(3.0))]).reshape(1, 1, 2, 1)  # (1/4, 3/4)
    expected = (0.0 + 0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert value_relation(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # two teacher heads of one channel become one relation head of two channels, scaled by sqrt 2
    two = torch.cat([teacher, teacher], 1)
    p = 1 / (1 + math.exp(-2 * math.log(3.0) / math.sqrt(2)))
    assert value_relation(student, two).item() == pytest.approx(
        (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)) / 2, rel=1e-4
    )
    with pytest.raises(ValueError, match="linear adapter"):
        value_relation(torch.zeros(1, 2, 2, 1), torch.zeros(1, 3, 2, 1))


def test_rkd_distance() -> None:
    # divided by the means 4 and 4/3: (3/4, 1, 5/4) against (3/4, 3/2, 3/4); huber is half the square below 1
    expected = 2 * (0 + 0.5 * 0.25 + 0.5 * 0.25) / 9
    assert rkd_distance(CORNER, LINE).item() == pytest.approx(expected, rel=1e-5)
    assert rkd_distance(7 * CORNER, CORNER).item() == pytest.approx(0.0, abs=1e-10)


def test_rkd_angle() -> None:
    # cosines at each corner of 3-4-5: 0, 3/5, 4/5. On the line: 1 at the ends, -1 in the middle
    differences = [(0 - 1) ** 2, (0.6 + 1) ** 2, (0.8 - 1) ** 2]
    huber = [d / 2 if d <= 1 else math.sqrt(d) - 0.5 for d in differences]
    assert rkd_angle(CORNER, LINE).item() == pytest.approx(2 * sum(huber) / 27, rel=1e-4)


def test_correlation_congruence() -> None:
    # unit rows at right angles have distance sqrt 2, equal rows 0
    expected = 2 * (1 - math.exp(-0.8)) ** 2 / 4
    assert correlation_congruence(torch.eye(2), torch.ones(2, 3), gamma=0.4).item() == pytest.approx(expected, rel=1e-5)


def test_probabilistic_transfer() -> None:
    # rows (2/3, 1/3) of the identity, (1/2, 1/2) of equal rows
    expected = (0.5 * math.log(0.75) + 0.5 * math.log(1.5)) * 2 / 4
    assert probabilistic_transfer(torch.eye(2), torch.ones(2, 1)).item() == pytest.approx(expected, rel=1e-4)


def test_sample_graph() -> None:
    # squared distances 9, 16, 25 over 25; 1, 4, 1 over 4, in the order 01, 02, 12
    expected = 2 * ((0.36 - 0.25) ** 2 + (0.64 - 1) ** 2 + (1 - 0.25) ** 2) / 9
    assert sample_graph(CORNER, LINE).item() == pytest.approx(expected, rel=1e-5)


def test_contrast_of_embeddings() -> None:
    module = CRD(2, 2)
    with torch.no_grad():
        for part in (module.student, module.teacher):
            part.weight.copy_(torch.eye(2))
            part.bias.zero_()
    # scores 1/0.1 on the diagonal, 0 off it
    expected = math.log1p(math.exp(-10.0))
    assert module(torch.eye(2), torch.eye(2)).item() == pytest.approx(expected, rel=1e-3)
    assert module(torch.eye(2), torch.eye(2).flip(0)).item() == pytest.approx(10 + expected, rel=1e-5)


def test_memory_bank_keeps_embeddings_and_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator)
    torch.manual_seed(0)
    module = MemoryCRD(4, 4, 6, num_negatives=5, generator=generator, size=3)
    before, samples = module.bank.clone(), torch.tensor([1, 4])
    module(features[samples], features[samples], samples)
    moved = (module.bank != before).any(-1)
    assert moved.nonzero()[:, 1].tolist() == [1, 4, 1, 4]
    torch.testing.assert_close(module.bank.norm(dim=-1), torch.ones(2, 6))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = module(features, features, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def linear() -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    return model


def test_input_gradients_of_a_linear_model_are_its_weights() -> None:
    model, inputs = linear(), torch.zeros(2, 2)
    gradients = logit_gradient(model, inputs, torch.tensor([1, 0]))
    torch.testing.assert_close(gradients, torch.tensor([[3.0, -1.0], [1.0, 2.0]]))
    # at x = 0 the softmax is (1/2, 1/2): d CE / dx for label 0 is (p - y) W = (-1/2, 1/2) W
    torch.testing.assert_close(
        loss_gradient(model, inputs, torch.tensor([0, 1])), torch.tensor([[1.0, -1.5], [-1.0, 1.5]])
    )


def test_gradient_terms_and_metric() -> None:
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    assert jacobian_matching(student, teacher).item() == pytest.approx((2 + 0) / 2)
    assert gradient_cosine(student, teacher).item() == pytest.approx(0.5)
    assert gradient_penalty(student).item() == pytest.approx((4 + 9) / 2)


def test_gradient_penalty_can_be_differentiated_by_weights() -> None:
    model, inputs = linear(), torch.zeros(1, 2)
    gradient_penalty(loss_gradient(model, inputs, torch.tensor([0]))).backward()
    # at x = 0: ||(w1 - w0) / 2||^2, derivative by w0: -(w1 - w0) / 2
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad[0], torch.tensor([-1.0, 1.5]))
