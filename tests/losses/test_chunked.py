"""Losses block by block of the vocabulary: values and gradients of the plain form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.chunked import TERMS, Divergence, Head, chunked_divergence, chunked_losses
from rlkd.losses.registry import TERMS as REGISTERED

NAMES: dict[Divergence, str] = {"forward": "kl", "reverse": "reverse_kl", "js": "js"}


def heads(dtype: torch.dtype = torch.float64) -> tuple[Head, Head, Tensor]:
    """Student with a bias, teacher of another width, and targets: 7 positions, a vocabulary of 11."""
    g = torch.Generator().manual_seed(0)
    shapes = ((7, 4), (11, 4), (11,), (7, 5), (11, 5))
    tensors = [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    return Head(*tensors[:3]), Head(*tensors[3:]), torch.randint(11, (7,), generator=g)


def plain(student: Head, teacher: Head, targets: Tensor, temperature: float, kind: Divergence) -> tuple[Tensor, Tensor]:
    """The same from whole logits, term by term."""
    z = student.hidden @ student.weight.T + (0 if student.bias is None else student.bias)
    p, q = (teacher.hidden @ teacher.weight.T / temperature).softmax(-1), (z / temperature).softmax(-1)
    mixture = (p + q) / 2
    terms = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "js": 0.5 * (p * (p / mixture).log() + q * (q / mixture).log()),
    }
    return F.cross_entropy(z, targets), temperature**2 * terms[kind].sum(-1).mean()


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("block", [1, 3, 11, 100])
def test_values_and_gradients_are_those_of_the_plain_form(kind: Divergence, block: int) -> None:
    student, teacher, targets = heads()
    given = [tensor for tensor in student if tensor is not None]
    expected = plain(student, teacher, targets, 2.0, kind)
    got = chunked_losses(student, teacher, targets, temperature=2.0, kind=kind, block=block)
    for a, b in zip(got, expected, strict=True):
        assert float(a.detach()) == pytest.approx(float(b.detach()), abs=1e-12)
    for weights in ((3.0, 0.0), (0.0, -2.0), (0.5, 4.0)):  # asked for three times, of one forward pass
        wanted = torch.autograd.grad(weights[0] * expected[0] + weights[1] * expected[1], given, retain_graph=True)
        own = torch.autograd.grad(weights[0] * got[0] + weights[1] * got[1], given, retain_graph=True)
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TERMS)
def test_the_divergence_is_the_registered_term_of_whole_logits(kind: Divergence) -> None:
    student, teacher, _ = heads(torch.float32)
    z = student.hidden @ student.weight.T + student.bias  # type: ignore[operator]
    term = REGISTERED[NAMES[kind]]
    expected = term.function(z, teacher.hidden @ teacher.weight.T, 3.0)
    loss = chunked_divergence(student, teacher, temperature=3.0, kind=kind, block=4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (a,), (b,) = (torch.autograd.grad(value, student.weight) for value in (loss, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_by_hand() -> None:
    # the teacher answers (3/4, 1/4), the student (1/2, 1/2)
    teacher = Head(torch.ones(1, 1), torch.tensor([[math.log(3.0)], [0.0]]))
    student = Head(torch.ones(1, 1), torch.zeros(2, 1))
    entropy, divergence = chunked_losses(student, teacher, torch.tensor([1]), temperature=1.0)
    assert float(divergence) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert float(entropy) == pytest.approx(math.log(2.0), abs=1e-6)


def test_hidden_states_in_bfloat16_keep_their_type_and_the_head_its_own() -> None:
    student, teacher, targets = heads(torch.float32)
    half = student.hidden.detach().bfloat16().requires_grad_()
    loss = sum(chunked_losses(Head(half, student.weight), teacher, targets, temperature=1.0))
    grads = torch.autograd.grad(loss, (half, student.weight))  # type: ignore[arg-type]
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    exact = sum(chunked_losses(Head(student.hidden, student.weight), teacher, targets, temperature=1.0))
    (wanted,) = torch.autograd.grad(exact, student.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(grads[1], wanted, rtol=0.05, atol=0.02)


def test_a_frozen_head_and_the_teacher_get_no_gradient() -> None:
    student, teacher, targets = heads()
    frozen = Head(student.hidden, student.weight.detach())
    teacher = Head(teacher.hidden.requires_grad_(), teacher.weight)
    sum(chunked_losses(frozen, teacher, targets, temperature=1.0)).backward()  # type: ignore[union-attr]
    assert teacher.hidden.grad is None
    assert frozen.hidden.grad is not None


def test_shapes_that_do_not_fit_are_named() -> None:
    two = Head(torch.ones(2, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"of shapes \[\(2, 3\), \(5, 4\)"):
        chunked_divergence(Head(torch.ones(2, 3), torch.ones(5, 4)), two)
    with pytest.raises(ValueError, match=r"M >= 1"):
        chunked_divergence(Head(torch.ones(0, 3), torch.ones(5, 3)), Head(torch.ones(0, 3), torch.ones(5, 3)))
    with pytest.raises(ValueError, match="kind"):
        chunked_divergence(two, two, kind="chi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block 0"):
        chunked_divergence(two, two, block=0)
