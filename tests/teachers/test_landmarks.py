"""Landmarks: closed forms against plain algebra, and what they must not depend on."""

import pytest
import torch
from torch import Tensor

from rlkd.data import DataSet, Task
from rlkd.teachers.landmarks import FEW, LANDMARKS, RIDGE, landmarks

NUM_FEATURES = 12


def make_data(spread: float = 0.5) -> tuple[DataSet, Tensor, Tensor]:
    """Three classes around centres; one teacher that knows them and one that answers at random."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=g)
    features = torch.randn(3, NUM_FEATURES, generator=g)[labels] + spread * torch.randn(300, NUM_FEATURES, generator=g)
    good = 5.0 * torch.nn.functional.one_hot(labels, 3).float()
    poor = torch.randn(300, 3, generator=g)
    splits = {"train": torch.arange(150), "validation": torch.arange(150, 225), "test": torch.arange(225, 300)}
    return DataSet("made", features, labels, 3, splits), torch.stack([good, poor]), torch.stack([features, features])


def make_task(data: DataSet, count: int, teacher: int = 0, noise: float = 0.0) -> Task:
    g = torch.Generator().manual_seed(count)
    samples = torch.randperm(150, generator=g)[:count]
    flipped = torch.rand(count, generator=g) < noise
    labels = torch.where(flipped, (data.labels[samples] + 1) % 3, data.labels[samples])
    return Task(count, teacher, noise, samples, labels, (0.6, 0.3, 0.1), 0.0)


def test_they_tell_good_labels_and_good_teachers_from_poor_ones() -> None:
    data, logits, features = make_data()
    tasks = [make_task(data, 100), make_task(data, 100, teacher=1), make_task(data, 100, noise=1.0)]
    clean, poor_teacher, wrong_labels = landmarks(logits, features, data, tasks)
    by_name = LANDMARKS.index
    assert clean[by_name("labels")] > 0.9
    assert clean[by_name("teacher")] > 0.9
    assert poor_teacher[by_name("labels")] > 0.9
    assert poor_teacher[by_name("teacher")] < 0.6
    assert wrong_labels[by_name("labels")] < 0.1
    assert wrong_labels[by_name("teacher")] > 0.9
    assert wrong_labels[by_name("both")] < clean[by_name("both")]


def test_a_task_has_the_same_landmarks_alone_and_beside_longer_ones() -> None:
    data, logits, features = make_data(2.0)
    tasks = [make_task(data, 20, noise=0.4), make_task(data, 150, teacher=1), make_task(data, 61)]
    together = landmarks(logits, features, data, tasks)
    alone = torch.cat([landmarks(logits, features, data, [task]) for task in tasks])
    torch.testing.assert_close(together, alone)


def test_no_shift_scale_or_rotation_of_the_features_changes_them() -> None:
    data, logits, features = make_data(2.0)
    tasks = [make_task(data, 60, noise=0.3), make_task(data, 90, teacher=1)]
    rotation, _ = torch.linalg.qr(torch.randn(NUM_FEATURES, NUM_FEATURES, generator=torch.Generator().manual_seed(4)))
    other = 7.0 * features @ rotation + 3.0
    torch.testing.assert_close(landmarks(logits, features, data, tasks), landmarks(logits, other, data, tasks))


def test_the_first_is_ridge_regression_on_centred_features() -> None:
    data, logits, features = make_data(2.0)
    task = make_task(data, 40, noise=0.5)
    x = features[0].double() - features[0, :150].double().mean(0)
    x = torch.cat([torch.ones(300, 1), x / x[:150].square().mean().sqrt()], dim=1)
    a, y = x[task.samples], torch.nn.functional.one_hot(task.labels, 3).double()
    weights = torch.linalg.solve(a.T @ a + RIDGE * torch.eye(1 + NUM_FEATURES), a.T @ y)
    expected = ((x[150:225] @ weights).argmax(-1) == data.labels[150:225]).double().mean()
    assert landmarks(logits, features, data, [task])[0, 0] == pytest.approx(float(expected))


def test_more_directions_tell_more_and_test_samples_tell_nothing() -> None:
    data, logits, features = make_data(2.0)
    task = make_task(data, 150)
    reached = landmarks(logits, features, data, [task])[0]
    assert len(FEW) == 2
    assert reached[3] <= reached[2] + 0.1
    altered = features.clone()
    altered[:, data.splits["test"]] = 1e3
    torch.testing.assert_close(landmarks(logits, altered, data, [task])[0], reached)


def test_a_teacher_that_overflows_on_a_sample_is_no_error_here() -> None:
    data, logits, features = make_data(2.0)
    task = make_task(data, 60)
    features[0, task.samples[0], 3] = float("inf")
    logits[0, task.samples[1]] = float("nan")
    assert landmarks(logits, features, data, [task]).isfinite().all()
