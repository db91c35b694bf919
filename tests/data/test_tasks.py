import dataclasses
import hashlib
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine

from rlkd.data import Preference, Range, Task, TaskDistribution, draw_task, load_dataset
from rlkd.data.distribution import thin_classes
from rlkd.errors import UserError

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
    with pytest.raises(UserError, match=r"task\.dataset: got 'digit'.*did you mean digits"):
        TaskDistribution(dataset="digit").check()


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(UserError, match=r"got 'mnist'; allowed: breast_cancer, digits"):
        load_dataset("mnist")


def imbalanced(imbalance: float, noise: float = 0.0) -> TaskDistribution:
    return TaskDistribution(
        label_noise=Range(noise, noise), num_labels=Range(897, 897), class_imbalance=Range(imbalance, imbalance)
    )


def test_classes_are_thinned_geometrically_by_hand_worked_numbers() -> None:
    labels = torch.arange(3).repeat(16)  # [48], 16 samples a class
    stay = thin_classes(labels, torch.tensor([2, 0, 1]), imbalance=0.75)
    assert torch.bincount(labels[stay]).tolist() == [8, 4, 16]  # 16 * 0.25 ** (r / 2) for places r = 1, 2, 0
    assert stay.nonzero()[:, 0][labels[stay] == 1].tolist() == [1, 4, 7, 10]  # those drawn first
    assert torch.bincount(labels[thin_classes(labels, torch.arange(3), 1.0)]).tolist() == [16, 1, 1]
    assert thin_classes(labels, torch.arange(3), 0.0).all()
    assert thin_classes(torch.tensor([1, 1, 1]), torch.arange(3), 1.0).tolist() == [True, False, False]  # others absent


def test_an_imbalanced_task_is_a_part_of_the_balanced_one() -> None:
    for seed in range(5):
        whole = draw_task(seed, imbalanced(0.0, noise=0.3), DIGITS, 8)
        part = draw_task(seed, imbalanced(0.9, noise=0.3), DIGITS, 8)
        assert (part.teacher, part.preference, part.class_imbalance) == (whole.teacher, whole.preference, 0.9)
        given = dict(zip(whole.samples.tolist(), whole.labels.tolist(), strict=True))
        assert 10 < len(part.samples) < 0.6 * len(whole.samples)
        assert [given[s] for s in part.samples.tolist()] == part.labels.tolist()


def test_the_rarest_class_keeps_its_share_and_differs_between_tasks() -> None:
    commonest = set()
    for seed in range(10):
        whole, part = (draw_task(seed, imbalanced(i), DIGITS, 8) for i in (0.0, 0.9))
        shares = torch.bincount(part.labels, minlength=10) / torch.bincount(whole.labels, minlength=10)
        expected = [0.1 ** (place / 9) for place in range(9, -1, -1)]
        assert shares.sort().values.tolist() == pytest.approx(
            expected, abs=0.5 / 80
        )  # half a sample; classes have 80 or more
        commonest.add(int(shares.argmax()))
    assert len(commonest) > 3


def test_balanced_draws_are_those_of_the_first_release() -> None:
    digest = hashlib.sha256()
    for seed in range(200):
        task = draw_task(seed, TaskDistribution(), DIGITS, 8)
        digest.update(task.samples.numpy().tobytes() + task.labels.numpy().tobytes())
        digest.update(repr((task.teacher, task.label_noise, task.preference)).encode())
    # Taken before class_imbalance was added: published comparisons stand on these tasks.
    assert digest.hexdigest() == "02c8d00cc543002ddb7dd17858e71908c26ef67cd99960cfcd5d428462e6dbba"


def test_a_fixed_preference_keeps_the_imbalance() -> None:
    assert imbalanced(0.5).with_preference(Preference()).class_imbalance == Range(0.5, 0.5)
    with pytest.raises(UserError, match=r"task\.class_imbalance: got low 0, high 1\.5"):
        TaskDistribution(class_imbalance=Range(0.0, 1.5)).check()


def test_further_teachers_change_nothing_else() -> None:
    several = TaskDistribution(num_teachers=Range(2, 4))
    counts = set()
    for seed in range(30):
        one, more = draw_task(seed, TaskDistribution(), DIGITS, 8), draw_task(seed, several, DIGITS, 8)
        assert one.teachers == (one.teacher,)
        assert more.teacher == one.teacher == more.teachers[0]
        assert len(set(more.teachers)) == len(more.teachers)
        assert set(more.teachers) <= set(range(8))
        assert torch.equal(more.samples, one.samples)
        assert torch.equal(more.labels, one.labels)
        assert more.preference == one.preference
        counts.add(len(more.teachers))
    assert counts == {2, 3, 4}
    assert sorted(draw_task(0, TaskDistribution(num_teachers=Range(5, 5)), DIGITS, 3).teachers) == [0, 1, 2]


def test_no_teacher_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.num_teachers: got low 0, high 1"):
        TaskDistribution(num_teachers=Range(0.0, 1.0)).check()


@pytest.mark.parametrize(
    ("name", "sizes", "num_features", "num_classes"),
    [("breast_cancer", (284, 142, 143), 30, 2), ("wine", (89, 44, 45), 13, 3)],
)
def test_bundled_tables_are_cut_once_and_standardised_by_their_train_split(
    name: str, sizes: tuple[int, int, int], num_features: int, num_classes: int
) -> None:
    data = load_dataset(name)
    assert tuple(len(data.splits[split]) for split in ("train", "validation", "test")) == sizes
    assert torch.cat(list(data.splits.values())).unique().numel() == len(data.labels) == sum(sizes)
    raw = {"breast_cancer": load_breast_cancer, "wine": load_wine}[name]().data
    assert torch.equal(data.scale.apply(torch.from_numpy(raw)), data.inputs)
    assert len(data.scale.offset) == len(data.scale.divisor) == num_features
    assert data.inputs.shape == (sum(sizes), num_features)
    assert data.labels.unique().tolist() == list(range(num_classes))
    assert data.inputs[data.splits["train"]].mean(0).abs().max() < 0.1
    other = data.inputs[data.splits["test"]].mean(0).abs().max()
    assert other > data.inputs[data.splits["train"]].mean(0).abs().max()  # test samples shaped nothing


# Of the code before tasks had goals: teacher, noise, number of samples, their sum, the sum of the labels, preference.
BEFORE_GOALS = {
    0: (4, 0.116620, 107, 86788, 449, 0.347209),
    11: (4, 0.375931, 636, 569495, 2885, 0.674257),
    2**60 + 5: (0, 0.170211, 140, 128087, 651, 0.494992),
}


def summary(task: Task) -> tuple[int, float, int, int, int, float]:
    return (
        task.teacher,
        round(task.label_noise, 6),
        len(task.samples),
        int(task.samples.sum()),
        int(task.labels.sum()),
        round(task.preference[0], 6),
    )


@pytest.mark.parametrize("seed", BEFORE_GOALS)
def test_tasks_of_a_seed_are_those_drawn_before_there_were_goals(seed: int) -> None:
    assert summary(draw_task(seed, TaskDistribution(), DIGITS, 8)) == BEFORE_GOALS[seed]


def test_a_goal_changes_no_other_draw_and_no_other_draw_changes_a_goal() -> None:
    weights = TaskDistribution()
    floors = dataclasses.replace(weights, floor_share=0.7, limit_share=0.5)
    noisy = dataclasses.replace(floors, label_noise=Range(0.2, 0.3), num_labels=Range(100, 200))
    kinds = set()
    for seed in range(30):
        plain, goal, other = (draw_task(seed, d, DIGITS, 8) for d in (weights, floors, noisy))
        assert torch.equal(plain.samples, goal.samples)
        assert torch.equal(plain.labels, goal.labels)
        assert (plain.teacher, plain.label_noise) == (goal.teacher, goal.label_noise)
        assert (goal.keep, goal.latency_limit, goal.preference) == (other.keep, other.latency_limit, other.preference)
        assert not torch.equal(goal.labels, other.labels)
        assert sum(goal.preference) == pytest.approx(1.0)
        kinds.add((goal.keep > 0, goal.latency_limit < float("inf")))
        if goal.keep > 0:
            assert goal.preference[0] == 0.0
            assert 0.9 <= goal.keep <= 1.02
        elif goal.latency_limit < float("inf"):
            assert goal.preference == (1.0, 0.0, 0.0)
            assert 0.2 <= goal.latency_limit <= 0.8
        else:
            assert goal.preference == plain.preference
    assert kinds == {(True, False), (False, True), (False, False)}


def test_the_goal_has_a_seed_of_its_own() -> None:
    floors = TaskDistribution(floor_share=1.0)
    first, same, other = (draw_task(3, floors, DIGITS, 8, goal_seed=g) for g in (None, 3, 4))
    assert first.keep == same.keep != other.keep
    assert torch.equal(first.labels, other.labels)
    assert (first.goal_seed, other.goal_seed) == (3, 4)
    assert draw_task(9, floors, DIGITS, 8, goal_seed=4).keep == other.keep


def test_shares_of_kinds_of_goals_are_those_asked_for() -> None:
    tasks = [draw_task(s, TaskDistribution(floor_share=0.6, limit_share=0.5), DIGITS, 8) for s in range(1000)]
    floors = sum(task.keep > 0 for task in tasks) / 1000
    limits = sum(task.latency_limit < float("inf") for task in tasks) / 1000
    assert floors == pytest.approx(0.6, abs=0.05)
    assert limits == pytest.approx(0.4 * 0.5, abs=0.04)


def test_a_stated_goal_is_every_task_s() -> None:
    drawn = TaskDistribution(floor_share=0.5, limit_share=0.5)
    for seed in range(10):
        kept = draw_task(seed, drawn.with_keep(0.98), DIGITS, 8)
        assert (kept.keep, kept.latency_limit) == (0.98, float("inf"))
        assert kept.preference == pytest.approx((0.0, 0.75, 0.25))
        weighed = draw_task(seed, drawn.with_preference(Preference(0.9)), DIGITS, 8)
        assert (weighed.keep, weighed.latency_limit) == (0.0, float("inf"))
        assert weighed.preference == pytest.approx((0.9, 0.075, 0.025))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"floor_share": 1.5}, "task.floor_share: got 1.5; allowed: 0 to 1"),
        ({"limit_share": -0.1}, "task.limit_share: got -0.1"),
        ({"keep": Range(0.5, 2.5)}, "task.keep: got low 0.5, high 2.5; allowed: 0 <= low"),
        ({"latency_limit": Range(-1.0, 0.5)}, "task.latency_limit: got low -1"),
        ({"reference": "best"}, "goal.reference: got 'best'"),
    ],
)
def test_impossible_goals_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TaskDistribution(**changes).check()


def test_goals_are_independent_of_the_other_draws() -> None:
    tasks = [draw_task(seed, TaskDistribution(floor_share=1.0), DIGITS, 8) for seed in range(300)]
    keep = torch.tensor([task.keep for task in tasks])
    for other in ([task.label_noise for task in tasks], [float(len(task.samples)) for task in tasks]):
        assert abs(float(torch.corrcoef(torch.stack([keep, torch.tensor(other)]))[0, 1])) < 0.2
