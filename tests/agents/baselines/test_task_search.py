import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.agents.baselines.recipes import RECIPES
from rlkd.agents.baselines.task_search import (
    Sampler,
    TaskSearch,
    Trials,
    cost_of,
    hypervolume,
    search_fronts,
    search_tasks,
)
from rlkd.agents.policy.controllers import RunOptions
from rlkd.data import Preference
from rlkd.envs import Scenario
from rlkd.envs.episodes import Episodes
from rlkd.students import TrainConfig

SEEDS = (2**60 + 1, 2**60 + 2)
FIRST = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.8, 0.6, 0.3, 0.7, 0.0, 0.0, 1.0])
NOTHING = torch.zeros(1)
places = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def quick(scenario: Scenario) -> Scenario:
    """Two windows of three steps."""
    config = dataclasses.replace(scenario.config, num_windows=2, train=TrainConfig(steps_per_window=3))
    return dataclasses.replace(scenario, config=config)


def searched(
    scenario: Scenario, sampler: Sampler, recipe: str, num_trials: int, seeds: tuple[int, ...] = SEEDS
) -> Trials:
    tasks = scenario.config.task.with_preference(Preference(0.6))
    return search_tasks(
        scenario,
        seeds,
        tasks,
        search=TaskSearch(sampler, RECIPES[recipe], num_trials),
        first=FIRST,
        seed=3,
    )


@pytest.mark.parametrize(("sampler", "recipe"), [("random", "constant"), ("tpe", "constant"), ("tpe", "linear")])
def test_the_first_trials_are_the_search_of_a_smaller_budget(quick: Scenario, sampler: Sampler, recipe: str) -> None:
    # TPE draws at random at first and uses its model from the 11th trial on
    small, large = searched(quick, sampler, recipe, 11), searched(quick, sampler, recipe, 13)
    assert torch.equal(small.points, large.points[:, :11])
    for name in ("score", "accuracy", "latency_ratio", "energy_ratio"):
        np.testing.assert_array_equal(getattr(small, name), getattr(large, name)[:, :11])
    # every task begins with the best known setting and is then searched for itself
    assert torch.allclose(large.points[:, 0], FIRST.repeat(RECIPES[recipe].num_axes // 12))
    assert not torch.equal(large.points[0, 1], large.points[1, 1])
    assert large.points.shape == (2, 13, RECIPES[recipe].num_axes)


def test_scores_are_those_of_the_preference(quick: Scenario) -> None:
    found = searched(quick, "random", "constant", 3)
    by_hand = 0.6 * found.accuracy + 0.3 * (1 - found.latency_ratio) + 0.1 * (1 - found.energy_ratio)
    np.testing.assert_allclose(found.score, by_hand, atol=1e-6)
    assert cost_of(np.array([0.4]), np.array([0.8])).tolist() == pytest.approx([0.5])


def test_a_search_never_reads_the_test_split(quick: Scenario) -> None:
    labels = quick.data.labels.clone()
    labels[quick.data.splits["test"]] = 0
    blind = dataclasses.replace(quick, data=dataclasses.replace(quick.data, labels=labels))
    one, two = (searched(w, "tpe", "constant", 11) for w in (quick, blind))
    np.testing.assert_array_equal(one.score, two.score)
    assert torch.equal(one.points, two.points)
    fronts = [
        search_fronts(w, SEEDS, w.config.task.with_preference(Preference(0.6)), num_trials=3, first=FIRST, seed=0)
        for w in (quick, blind)
    ]
    np.testing.assert_array_equal(fronts[0].accuracy, fronts[1].accuracy)
    assert torch.equal(fronts[0].points, fronts[1].points)


def test_the_best_is_taken_of_the_budget_and_ties_go_to_the_earlier(quick: Scenario) -> None:
    points = torch.arange(2 * 4).reshape(2, 4, 1) * torch.ones(12) / 8
    score = np.array([[0.5, 0.7, 0.7, 0.9], [0.6, 0.1, 0.2, 0.3]])
    trials = Trials(SEEDS, RECIPES["constant"], points, score, score, score, score)
    episodes = Episodes(quick, 2)
    episodes.reset(SEEDS)

    def chosen(budget: int) -> list[int]:
        return (8 * trials.best(budget)(NOTHING, episodes, 1)[:, 0]).int().tolist()

    assert [chosen(b) for b in (1, 2, 3, 4)] == [[0, 4], [1, 4], [1, 4], [3, 4]]


@pytest.mark.slow
def test_the_model_finds_better_settings_than_chance(quick: Scenario) -> None:
    seeds = tuple(2**60 + i for i in range(4))
    random, model = (searched(quick, sampler, "constant", 22, seeds) for sampler in ("random", "tpe"))
    # the first ten are drawn at random by both; what the model proposes afterwards is better on average
    assert model.score[:, 10:].mean() > random.score[:, 10:].mean() + 0.03


def test_fronts_are_searched_for_accuracy_and_low_cost(quick: Scenario) -> None:
    windows: list[int] = []
    tasks, seeds = quick.config.task.with_preference(Preference(0.6)), tuple(2**60 + i for i in range(4))
    small = search_fronts(quick, seeds, tasks, num_trials=11, first=FIRST, seed=3)
    found = search_fronts(
        quick, seeds, tasks, num_trials=22, first=FIRST, seed=3, options=RunOptions(on_window=windows.append)
    )
    assert torch.equal(small.points, found.points[:, :11])
    assert sum(windows) == 4 * 22 * 2
    assert torch.allclose(found.points[:, 0], FIRST.expand(4, 12))
    # the model's proposals against the first ten, which are drawn at random
    gain = found.accuracy - cost_of(found.latency_ratio, found.energy_ratio)
    assert gain[:, 10:].mean() > gain[:, 1:10].mean() + 0.05


def area(some: list[tuple[int, int]], **reference: float) -> float:
    """Of points (accuracy, cost) in eighths."""
    accuracy, cost = (np.array([p[i] / 8 for p in some]) for i in (0, 1))
    return hypervolume(accuracy, cost, **reference)


def test_hypervolume_by_hand() -> None:
    accuracy, cost = np.array([0.9, 0.6]), np.array([0.5, 0.2])
    # 0.6 from cost 0.2 to 0.5, then 0.9 to 1
    assert hypervolume(accuracy, cost) == pytest.approx(0.3 * 0.6 + 0.5 * 0.9)
    assert hypervolume(accuracy, cost, worst_accuracy=0.5) == pytest.approx(0.3 * 0.1 + 0.5 * 0.4)
    assert hypervolume(accuracy, cost, worst_cost=0.4) == pytest.approx(0.2 * 0.6)
    assert hypervolume(np.array([0.8]), np.array([0.25])) == pytest.approx(0.6)
    assert hypervolume(np.array([0.8, 0.9]), np.array([1.0, 1.3])) == 0.0
    assert hypervolume(np.array([0.4]), np.array([0.2]), worst_accuracy=0.5) == 0.0
    assert hypervolume(np.array([]), np.array([])) == 0.0


@settings(max_examples=80, deadline=None)
@given(places)
def test_hypervolume_is_the_number_of_dominated_cells(some: list[tuple[int, int]]) -> None:
    cells = sum(any(a > y and c <= x for a, c in some) for x in range(8) for y in range(8))
    assert area(some) == pytest.approx(cells / 64)


@settings(max_examples=60, deadline=None)
@given(places, st.data())
def test_dominated_points_order_and_repeats_change_no_hypervolume(
    some: list[tuple[int, int]], data: st.DataObject
) -> None:
    accuracy, cost = data.draw(st.sampled_from(some))
    worse = (data.draw(st.integers(0, accuracy)), data.draw(st.integers(cost, 12)))
    shuffled = data.draw(st.permutations([*some, worse, some[0]]))
    assert area(shuffled) == pytest.approx(area(some))
    assert area([*some, (5, 3)]) >= area(some) - 1e-12


def test_hypervolume_refuses_what_is_not_a_point() -> None:
    for accuracy, cost in ((np.nan, 0.5), (0.5, np.inf)):
        with pytest.raises(ValueError, match="non-finite"):
            hypervolume(np.array([0.3, accuracy]), np.array([0.3, cost]))
