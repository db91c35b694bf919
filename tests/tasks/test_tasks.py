import pytest
import torch

from rlkd.errors import UserError
from rlkd.tasks import Preference, Range, TaskDistribution, draw_task, load_dataset

DIGITS = load_dataset("digits")


def test_splits_are_disjoint_and_complete() -> None:
    sizes = {name: len(index) for name, index in DIGITS.splits.items()}
    assert sizes == {"train": 897, "validation": 450, "test": 450}
    assert torch.cat(list(DIGITS.splits.values())).sort().values.tolist() == list(range(1797))


def test_the_same_seed_draws_the_same_task() -> None:
    first, second = (draw_task(11, TaskDistribution(), DIGITS, 8) for _ in range(2))
    assert torch.equal(first.samples, second.samples)
    assert torch.equal(first.labels, second.labels)
    assert first.preference == second.preference
    assert not torch.equal(first.samples, draw_task(12, TaskDistribution(), DIGITS, 8).samples)


def test_samples_come_from_the_train_split_without_repetition() -> None:
    train = set(DIGITS.splits["train"].tolist())
    for seed in range(20):
        samples = draw_task(seed, TaskDistribution(), DIGITS, 8).samples.tolist()
        assert set(samples) <= train
        assert len(set(samples)) == len(samples)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_label_noise_replaces_that_share_by_other_classes(rate: float) -> None:
    distribution = TaskDistribution(label_noise=Range(rate, rate), num_labels=Range(897, 897))
    task = draw_task(0, distribution, DIGITS, 8)
    wrong = (task.labels != DIGITS.labels[task.samples]).float().mean().item()
    assert wrong == pytest.approx(rate, abs=0.0 if rate in (0.0, 1.0) else 0.06)
    assert set(task.labels.tolist()) <= set(range(10))


def test_a_fixed_preference_leaves_the_other_draws_alone() -> None:
    free, fixed = TaskDistribution(), TaskDistribution().with_preference(Preference(0.9))
    for seed in range(5):
        a, b = draw_task(seed, free, DIGITS, 8), draw_task(seed, fixed, DIGITS, 8)
        assert torch.equal(a.samples, b.samples)
        assert torch.equal(a.labels, b.labels)
        assert a.teacher == b.teacher
        assert b.preference == pytest.approx((0.9, 0.075, 0.025))


def test_preference_weights() -> None:
    assert Preference().weights() == pytest.approx((0.6, 0.3, 0.1))
    assert Preference(2, 1, 1).weights() == pytest.approx((0.5, 0.25, 0.25))
    assert Preference(1.0).weights() == (1.0, 0.0, 0.0)
    for bad in (Preference(-0.1), Preference(1.5), Preference(0, 0, 0), Preference(float("nan"))):
        with pytest.raises(UserError, match="preference"):
            bad.weights()


def test_impossible_distributions_are_named() -> None:
    with pytest.raises(UserError, match=r"task\.label_noise: got low 0\.5, high 0\.2"):
        TaskDistribution(label_noise=Range(0.5, 0.2)).check()
    with pytest.raises(UserError, match=r"task\.dataset: got 'digit'.*did you mean 'digits'"):
        TaskDistribution(dataset="digit").check()


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(UserError, match=r"got 'mnist'; allowed: digits"):
        load_dataset("mnist")
