"""Hand-worked numbers of the metrics."""

import math

import pytest
import torch
from torch import nn

from rlkd.metrics import (
    CORRUPTIONS,
    accuracy_by_class,
    agreement,
    calibration_error,
    corrupted,
    divergence,
    fgsm,
    knowledge_coverage,
    pgd,
    tail_accuracy,
)

TEACHER = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
STUDENT = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])


def test_agreement_of_likeliest_classes() -> None:
    assert agreement(STUDENT, TEACHER) == pytest.approx(0.5)
    assert agreement(STUDENT, TEACHER, 2) == pytest.approx((0.5 + 0.5) / 2)  # {0,2} & {0,1}; {1,2} & {0,1}
    assert agreement(STUDENT, TEACHER, 5) == 1.0


def test_divergence_of_certain_opposites_is_log_two() -> None:
    far = torch.tensor([[99.0, 0.0]])
    assert divergence(far, far.flip(-1)) == pytest.approx(math.log(2), rel=1e-5)


def test_coverage_asks_only_about_what_the_teacher_knows() -> None:
    assert knowledge_coverage(STUDENT, TEACHER, torch.tensor([0, 1])) == 1.0  # the teacher is wrong on the second
    assert knowledge_coverage(STUDENT, TEACHER, torch.tensor([0, 0])) == 0.5
    assert knowledge_coverage(STUDENT, TEACHER, torch.tensor([2, 2])) == 0.0


def test_calibration_error_by_hand() -> None:
    # confidences 0.9 (right), 0.9 (wrong), 0.6 (right): bins |1 - 1.8| and |1 - 0.6|, over 3 samples
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]).log()
    assert calibration_error(logits, torch.tensor([0, 1, 0]), 10) == pytest.approx((0.8 + 0.4) / 3, rel=1e-5)


def test_accuracy_by_class_and_of_the_tail() -> None:
    labels, logits = torch.tensor([0, 0, 1, 1]), torch.eye(3)[[0, 1, 1, 1]]
    assert accuracy_by_class(logits, labels) == [0.5, 1.0, None]
    assert tail_accuracy(logits, labels, torch.tensor([0, 0, 0, 1])) == 1.0  # class 1 is rarer
    assert tail_accuracy(logits, labels, torch.tensor([0, 1])) == 0.5  # a tie: the harder one


def linear() -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]))
    return model


def test_fgsm_step_by_hand() -> None:
    # w1 - w0 = (-2, 0.5): for label 0 the loss rises to the left and up, for label 1 to the right and down
    inputs, labels = torch.tensor([[0.5, 0.5], [0.5, 0.95]]), torch.tensor([0, 1])
    moved = fgsm(linear(), inputs, labels, epsilon=0.1)
    torch.testing.assert_close(moved, torch.tensor([[0.4, 0.6], [0.6, 0.85]]))
    bounded = fgsm(linear(), torch.tensor([[0.05, 0.95]]), torch.tensor([0]), epsilon=0.1, bounds=(0.0, 1.0))
    torch.testing.assert_close(bounded, torch.tensor([[0.0, 1.0]]))


def test_pgd_walks_to_the_edge_and_no_further() -> None:
    # steps of 2.5 * 0.1 / 10 = 0.025 reach 0.1 after four; projection keeps it there
    inputs, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    torch.testing.assert_close(pgd(linear(), inputs, labels, 0.1, num_steps=1), torch.tensor([[0.4, 0.6]]))
    torch.testing.assert_close(pgd(linear(), inputs, labels, 0.1), torch.tensor([[0.4, 0.6]]))
    started = pgd(linear(), inputs, labels, 0.1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(started, torch.tensor([[0.4, 0.6]]))


def test_pgd_finds_what_one_step_misses() -> None:
    # the loss falls at first and rises behind a ridge: |x - 0.3| has its sign flip on the way
    def model(x: torch.Tensor) -> torch.Tensor:
        margin = 1 - (x[:, :1] * 4).cos() - 0.2 * x[:, 1:]
        return torch.cat([margin, torch.zeros_like(margin)], -1)

    inputs, labels = torch.tensor([[0.4, 0.0]]), torch.tensor([0])
    one, ten = (
        model(x)[0, 0].item() for x in (fgsm(model, inputs, labels, epsilon=0.6), pgd(model, inputs, labels, 0.6))
    )
    assert ten < one


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_their_strength(name: str) -> None:
    inputs = torch.rand(20, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = corrupted(name, inputs, 1.0, torch.Generator().manual_seed(1))
    sizes = [(x - inputs).square().mean().item() for x in changed]
    assert all(x.shape == inputs.shape for x in changed)
    assert sizes == sorted(sizes)
    assert sizes[0] > 0


def test_a_shift_uncovers_zeros() -> None:
    (first, _) = corrupted("shift", torch.ones(1, 4, 4), 1.0, torch.Generator())
    assert first[0, 0].tolist() == [0.0, 1.0, 1.0, 1.0]
