"""Teachers of any data set: from poor to good, never more samples than there are, cached by what they saw."""

from dataclasses import replace

import pytest
import torch

from rlkd.data import load_dataset
from rlkd.errors import UserError
from rlkd.teachers import TeacherConfig, compute_signals, load_teachers

DATA = load_dataset("generated:difficulty=0.1,classes=4,inputs=16")


def test_teachers_of_a_generated_set_span_a_range_below_the_best_possible() -> None:
    teachers = load_teachers(TeacherConfig(num_samples=(24, 160, 2000)), DATA)
    accuracy = compute_signals(teachers, DATA).accuracy.tolist()
    assert accuracy[0] + 0.1 < accuracy[1] < accuracy[2] - 0.05
    assert 0.75 < accuracy[2] < 0.925 + 0.02  # Bayes, and two deviations of 1,000 samples


def test_more_samples_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match=r"teacher\.num_samples: got 2001; allowed: 1 to 2000, the train split of gen"):
        load_teachers(TeacherConfig(num_samples=(24, 2001)), DATA)
    with pytest.raises(UserError, match="got 898; allowed: 1 to 897, the train split of digits"):
        load_teachers(TeacherConfig(num_samples=(898,)), load_dataset("digits"))


def test_other_samples_under_the_same_name_get_other_teachers() -> None:
    config = TeacherConfig(num_samples=(40,), num_steps=2)
    (first,) = load_teachers(config, DATA)
    (other,) = load_teachers(config, replace(DATA, inputs=-DATA.inputs))
    (again,) = load_teachers(config, DATA)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
