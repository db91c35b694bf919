import math

import pytest
import torch

from rlkd.data.examples import Examples
from rlkd.teachers.real.several import combine_teachers
from rlkd.teachers.signals import Signals

LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
SPLITS = {"train": torch.tensor([0, 1]), "validation": torch.tensor([2, 3]), "test": torch.tensor([4, 5])}
DATA = Examples("toy", {"x": torch.zeros(6, 1)}, LABELS, 2, SPLITS)  # type: ignore[arg-type]
SURE = math.log(9.0) * torch.eye(2)[LABELS]  # 0.9 on the label
WRONG = SURE.flip(-1)


def signals() -> Signals:
    return Signals(
        SURE[None], torch.ones(1, 6, 3), torch.ones(1, 6, 2), torch.tensor([1.0]), torch.tensor([0.5]), False
    )


def test_the_mean_of_opposite_teachers_is_undecided() -> None:
    mixed = combine_teachers(signals(), [WRONG], DATA, "mean")
    torch.testing.assert_close(mixed.logits, torch.full((1, 6, 2), math.log(9.0) / 2))
    assert mixed.entropy.item() == pytest.approx(1.0)
    assert torch.equal(mixed.features, torch.ones(1, 6, 3))


def test_confidence_reads_labels_of_the_train_split_alone() -> None:
    mixed = combine_teachers(signals(), [WRONG], DATA, "confidence")
    # exp(CE) is 1 / 0.9 and 1 / 0.1, so the weights are 0.9 and 0.1
    torch.testing.assert_close(mixed.logits[0, :2], 0.9 * SURE[:2] + 0.1 * WRONG[:2])
    torch.testing.assert_close(mixed.logits[0, 2:], torch.full((4, 2), math.log(9.0) / 2))


def test_a_gate_learns_which_teacher_is_right() -> None:
    mixed = combine_teachers(signals(), [WRONG], DATA, "gate")
    assert mixed.accuracy.item() == 1.0
    assert (mixed.logits[0].argmax(-1) == LABELS).all()
