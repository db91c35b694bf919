"""Divergences chunk by chunk: values and gradients of the plain form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.chunked import DIVERGENCES, Divergence, chunked_divergence


def plain(hidden: Tensor, head: Tensor, answers: Tensor, temperature: float, kind: Divergence) -> Tensor:
    """The same from whole logits, term by term."""
    p = (answers / temperature).softmax(-1)
    q = (hidden @ head.T / temperature).softmax(-1)
    mixture = (p + q) / 2
    terms = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "js": 0.5 * (p * (p / mixture).log() + q * (q / mixture).log()),
    }
    return temperature**2 * terms[kind].sum(-1).mean()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_value_and_gradients_are_those_of_the_plain_form(kind: Divergence, chunk_size: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 4), (11, 4), (7, 5), (11, 5))
    )
    for tensor in (hidden, head):
        tensor.requires_grad_()
    expected = plain(hidden, head, teacher_hidden @ teacher_head.T, 2.0, kind)
    wanted = torch.autograd.grad(3.0 * expected, (hidden, head))
    loss = chunked_divergence(
        hidden, head, teacher_hidden, teacher_head, temperature=2.0, kind=kind, chunk_size=chunk_size
    )
    got = torch.autograd.grad(3.0 * loss, (hidden, head))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    # the teacher answers (3/4, 1/4), the student (1/2, 1/2)
    teacher = torch.tensor([[math.log(3.0)], [0.0]])
    loss = chunked_divergence(torch.ones(1, 1), torch.zeros(2, 1), torch.ones(1, 1), teacher)
    assert float(loss) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_hidden_states_before_the_head_get_gradients() -> None:
    inputs, layer = torch.randn(5, 3), torch.nn.Linear(3, 4)
    head, teacher_hidden, teacher_head = torch.randn(6, 4), torch.randn(5, 2), torch.randn(6, 2)
    chunked_divergence(layer(inputs), head, teacher_hidden, teacher_head, chunk_size=2).backward()
    got = layer.weight.grad.clone()  # type: ignore[union-attr]
    layer.zero_grad()
    answers = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    F.kl_div((layer(inputs) @ head.T).log_softmax(-1), answers, reduction="batchmean", log_target=True).backward()
    torch.testing.assert_close(got, layer.weight.grad, rtol=0, atol=1e-6)


def test_gradients_are_given_once() -> None:
    hidden = torch.ones(2, 3, requires_grad=True)
    loss = chunked_divergence(hidden, torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"got student_hidden.*\(2, 3\), \(5, 4\)"):
        chunked_divergence(torch.ones(2, 3), torch.ones(5, 4), torch.ones(2, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="kind"):
        chunked_divergence(*(torch.ones(2, 2),) * 4, kind="chi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size 0"):
        chunked_divergence(*(torch.ones(2, 2),) * 4, chunk_size=0)
