import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.agents.baselines.methods import Request
from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.baselines.task_search import cost_of, hypervolume, search_fronts
from rlkd.agents.evaluation.front import compare_fronts, undominated
from rlkd.agents.policy.controllers import follow, run
from rlkd.agents.policy.policy import TENSORS, Policy
from rlkd.data import Preference
from rlkd.envs import OBSERVATIONS, Scenario
from rlkd.students import TrainConfig

SEEDS = (2**60 + 1, 2**60 + 2, 2**60 + 3)
WEIGHTS = (0.9, 0.3)
points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9)


def chosen(some: list[tuple[int, int]]) -> list[bool]:
    """Of points (accuracy, cost)."""
    accuracy, cost = (np.array([p[i] for p in some], dtype=np.float64) for i in (0, 1))
    kept: list[bool] = undominated(accuracy, cost).tolist()
    return kept


def test_undominated_by_hand() -> None:
    assert chosen([(9, 5), (6, 2), (5, 3), (9, 6), (8, 5)]) == [True, True, False, False, False]
    assert chosen([(1, 1)]) == [True]
    assert chosen([(3, 2), (3, 2), (2, 2)]) == [True, True, False]  # equals do not dominate each other
    assert chosen([(1, 1), (2, 2), (3, 3)]) == [True, True, True]


@settings(max_examples=80, deadline=None)
@given(points)
def test_what_is_dominated_adds_no_area_and_everything_else_has_no_better(some: list[tuple[int, int]]) -> None:
    kept = [p for p, keep in zip(some, chosen(some), strict=True) if keep]
    for a, c in some:
        assert ((a, c) in kept) != any((x >= a and y <= c and (x, y) != (a, c)) for x, y in some)

    def area(points: list[tuple[int, int]]) -> float:
        return hypervolume(np.array([a for a, _ in points]) / 4, np.array([c for _, c in points]) / 4)

    assert area(kept) == pytest.approx(area(some))


@pytest.fixture(scope="module")
def request_(scenario: Scenario) -> Request:
    """Two windows of three steps, and a policy that nobody trained."""
    config = dataclasses.replace(scenario.config, num_windows=2, train=TrainConfig(steps_per_window=3))
    quick = dataclasses.replace(scenario, config=config)
    g = torch.Generator().manual_seed(1)
    shapes = ((8, len(OBSERVATIONS)), (8,), (8, 8), (8,), (12, 8), (12,))
    weights = {name: torch.randn(shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    spread = torch.ones(len(OBSERVATIONS))
    policy = Policy(weights, 0 * spread, spread, scenario.start, scenario.config.controls)
    return Request(quick, config.task, SEEDS, SearchConfig(), 5, lambda n: None, policy=policy)


def test_fronts_of_a_small_scenario(request_: Request) -> None:
    windows: list[int] = []
    result = compare_fronts(dataclasses.replace(request_, on_window=windows.append), WEIGHTS, 4)
    assert result["num_tasks"] == 3
    assert set(result["methods"]) == {"policy", "search_4"}
    assert [m["trainings_per_task"] for m in result["methods"].values()] == [2, 4]
    assert request_.policy is not None
    tables = [
        run(request_.scenario, request_.policy.controller(), SEEDS, request_.tasks.with_preference(Preference(weight)))
        for weight in WEIGHTS
    ]
    accuracy = np.stack([t.accuracy for t in tables], axis=1)
    cost = np.stack([cost_of(t.latency_ratio, t.energy_ratio) for t in tables], axis=1)
    areas = np.array([hypervolume(a, c) for a, c in zip(accuracy, cost, strict=True)])
    method = result["methods"]["policy"]
    assert method["hypervolume"]["mean"] == pytest.approx(areas.mean(), abs=1e-6)
    assert [row["accuracy_weight"] for row in method["front"]] == list(WEIGHTS)
    assert [row["cost"] for row in method["front"]] == pytest.approx(cost.mean(0).tolist(), abs=1e-6)
    assert [row["accuracy"] for row in method["front"]] == pytest.approx(accuracy.mean(0).tolist(), abs=1e-6)
    searched = result["methods"]["search_4"]["hypervolume"]["mean"]
    difference = result["methods"]["policy"]["hypervolume"]["mean"] - searched
    assert result["paired"]["policy-search_4"]["difference"] == pytest.approx(difference, abs=1e-6)
    # 2 trainings by preference and 4 trials a task, then what is undominated again, to be read on test data
    replayed = sum(windows) / 2 - (2 + 4) * 3
    assert 3 <= replayed <= 12


def test_a_searched_front_is_read_on_test_data_at_what_validation_chose(request_: Request) -> None:
    middle = request_.tasks.with_preference(Preference(0.6))
    assert request_.policy is not None
    first = request_.policy.start
    trials = search_fronts(request_.scenario, SEEDS, middle, num_trials=4, first=first, seed=request_.seed)
    areas = []
    for row, seed in enumerate(SEEDS):
        seen = cost_of(trials.latency_ratio[row], trials.energy_ratio[row])
        best = np.flatnonzero(undominated(trials.accuracy[row], seen))
        tests = [run(request_.scenario, follow(trials.points[row, i][None]), [seed, seed], middle) for i in best]
        accuracy = np.array([t.accuracy[0] for t in tests])
        areas.append(hypervolume(accuracy, np.array([cost_of(t.latency_ratio, t.energy_ratio)[0] for t in tests])))
    found = compare_fronts(request_, WEIGHTS, 4)["methods"]["search_4"]["hypervolume"]["mean"]
    assert found == pytest.approx(np.mean(areas), abs=5e-3)


def test_fronts_need_a_policy(request_: Request) -> None:
    with pytest.raises(ValueError, match="no policy"):
        compare_fronts(dataclasses.replace(request_, policy=None), WEIGHTS, 2)
