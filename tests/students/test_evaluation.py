"""Metrics by hand: three samples, two exits, two classes."""

import math

import pytest
import torch
from torch import Tensor

from rlkd.losses.hard_label import log_probabilities
from rlkd.students import Metrics
from rlkd.students.evaluation import exits_by_class, summarise


def logits_of(probabilities: list[float]) -> Tensor:
    """[1, B, 2] logits that give class 0 these probabilities."""
    p = torch.tensor(probabilities)
    return torch.stack([p, 1 - p], dim=-1).log()[None]


EARLY, LATE, TEACHER, LABELS = [0.9, 0.6, 0.2], [0.3, 0.4, 0.7], [0.75, 0.25, 0.75], torch.tensor([0, 1, 0])


def metrics_at(threshold: float) -> Metrics:
    masks = (torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    scores = (torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[4.0, 0.0]]))
    exits = (logits_of(EARLY), logits_of(LATE))
    teacher = log_probabilities(logits_of(TEACHER))
    return summarise(exits, LABELS, teacher, torch.tensor([threshold]), masks, scores)


@pytest.mark.parametrize(
    ("threshold", "accuracy", "early_rate", "agreement"),
    [
        (0.5, 1 / 3, 1.0, 1 / 3),  # all leave early with answers 0 0 1; labels and teacher say 0 1 0
        (0.7, 2 / 3, 2 / 3, 2 / 3),  # confidences 0.9, 0.6, 0.8: the second goes on; answers 0 1 1
        (1.0, 2 / 3, 0.0, 2 / 3),  # all go on and answer 1 1 0
    ],
)
def test_answers_come_from_the_exit_a_sample_leaves_at(
    threshold: float, accuracy: float, early_rate: float, agreement: float
) -> None:
    m = metrics_at(threshold)
    assert float(m.accuracy) == pytest.approx(accuracy)
    assert m.exit_rates[0].tolist() == pytest.approx([early_rate, 1 - early_rate])
    assert float(m.agreement) == pytest.approx(agreement)


def test_every_exit_is_judged_on_all_samples() -> None:
    m = metrics_at(0.7)
    assert m.exit_accuracy[0].tolist() == pytest.approx([1 / 3, 2 / 3])
    early = -(math.log(0.9) + math.log(0.4) + math.log(0.2)) / 3
    late = -(math.log(0.3) + math.log(0.6) + math.log(0.7)) / 3
    assert m.exit_loss[0].tolist() == pytest.approx([early, late], rel=1e-5)
    assert m.kept.tolist() == [[2.0, 1.0]]
    assert m.spread[0].tolist() == pytest.approx([1.0, 0.5])


def test_divergence_is_from_the_teacher_to_the_last_exit() -> None:
    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    expected = sum(kl(p, q) for p, q in zip(TEACHER, LATE, strict=True)) / 3
    assert float(metrics_at(0.7).divergence) == pytest.approx(expected, rel=1e-5)


def test_patience_lets_a_sample_leave_where_exits_agree() -> None:
    # answers of three exits: 0 0 1, 1 0 0, 0 1 1; none is confident enough, the last exit is the third
    exits = tuple(logits_of(p) for p in ([0.6, 0.4, 0.6], [0.6, 0.6, 0.4], [0.4, 0.6, 0.4]))
    masks = (torch.ones(1, 3), torch.ones(1, 2))
    teacher = log_probabilities(logits_of(TEACHER))

    def rates(threshold: float, patience: int) -> list[float]:
        m = summarise(exits, LABELS, teacher, torch.tensor([threshold]), masks, masks, patience)
        return [round(r, 3) for r in m.exit_rates[0].tolist()]

    assert rates(0.9, 0) == [0.0, 0.0, 1.0]
    assert rates(0.9, 2) == [0.0, 0.333, 0.667]  # the first sample: 0 and 0
    assert rates(0.9, 3) == [0.0, 0.0, 1.0]
    assert rates(1.0, 2) == [0.0, 0.0, 1.0]  # none leaves early
    assert rates(0.5, 2) == [1.0, 0.0, 0.0]  # all leave at once


def test_gates_decide_in_place_of_confidence_except_at_the_ends() -> None:
    masks = (torch.ones(1, 3), torch.ones(1, 2))
    exits, teacher = (logits_of(EARLY), logits_of(LATE)), log_probabilities(logits_of(TEACHER))
    gates = (torch.tensor([[-0.1, 0.0, 0.1]]),)

    def at(threshold: float) -> tuple[list[float], float]:
        m = summarise(exits, LABELS, teacher, torch.tensor([threshold]), masks, masks, gates=gates)
        return [round(r, 3) for r in m.exit_rates[0].tolist()], float(m.accuracy)

    # the second and the third leave, though the first alone is confident: answers 1 0 1, labels 0 1 0
    assert at(0.85) == ([0.667, 0.333], 0.0)
    assert at(0.5)[0] == [1.0, 0.0]
    assert at(1.0)[0] == [0.0, 1.0]


def test_exit_statistics_class_by_class() -> None:
    # at 0.7 samples 0 and 2 (both of class 0) leave early, with answers 0 and 1; sample 1 goes on and answers 1
    exits = (logits_of(EARLY)[0], logits_of(LATE)[0])
    by_class = exits_by_class(exits, LABELS, torch.tensor([0.7]))
    assert by_class.num_samples.tolist() == [2, 1]
    assert by_class.exit_rates.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert by_class.accuracy.tolist() == [0.5, 1.0]
    never = exits_by_class(exits, LABELS, torch.tensor([1.0]))
    assert never.exit_rates.tolist() == [[0.0, 1.0]] * 2
    assert never.accuracy.tolist() == [0.5, 1.0]  # answers 1 1 0
    absent = exits_by_class(exits, torch.tensor([0, 0, 0]), torch.tensor([0.5]))
    assert absent.num_samples.tolist() == [3, 0]
    assert absent.exit_rates[1].tolist() == [0.0, 0.0]


def test_patience_counts_in_the_statistics_of_classes() -> None:
    exits = tuple(logits_of(p)[0] for p in ([0.6, 0.4, 0.6], [0.6, 0.6, 0.4], [0.4, 0.6, 0.4]))
    rates = exits_by_class(exits, torch.tensor([0, 1, 1]), torch.tensor([0.9]), patience=2).exit_rates
    assert rates.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # the first sample alone: answers 0 and 0
