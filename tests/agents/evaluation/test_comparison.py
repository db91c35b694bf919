import dataclasses

import numpy as np
import pytest

from rlkd.agents.evaluation.comparison import compare, csv_rows, interval, paired
from rlkd.agents.policy.controllers import Results


def results(score: list[float], met: list[bool] | None = None) -> Results:
    s = np.array(score)
    goal_met = np.ones(len(s), dtype=bool) if met is None else np.array(met)
    return Results(
        score=s,
        accuracy=s / 2,
        latency_ratio=s * 0 + 0.3,
        energy_ratio=s * 0 + 0.2,
        macs_ratio=s * 0 + 0.1,
        diverged=np.zeros(len(s), dtype=bool),
        num_rollbacks=np.arange(len(s)),
        floor=s * 0 + 0.9,
        shortfall=np.where(goal_met, 0.0, 0.2),
        goal_met=goal_met,
        goal_met_within_1_point=goal_met,
    )


def test_interquartile_mean_and_mean_by_hand() -> None:
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, -100])
    rng = np.random.default_rng(0)
    iqm, mean = interval(values, "iqm", rng), interval(values, "mean", rng)
    assert iqm["iqm"] == pytest.approx(3.5)  # 2 3 4 5 remain
    assert mean["mean"] == pytest.approx(21 / 8)
    assert iqm["ci95"][0] <= 3.5 <= iqm["ci95"][1]
    assert interval(np.ones(5), "iqm", rng)["ci95"] == [1.0, 1.0]


def test_interval_has_about_the_width_of_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = interval(values, "mean", np.random.default_rng(2))["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_paired_difference_and_ties() -> None:
    row = paired(results([2, 3, 4, 4]), results([1, 3, 5, 1]), np.random.default_rng(0))
    assert row["difference"] == pytest.approx(0.75)
    assert row["probability_of_improvement"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_pairing_is_by_task() -> None:
    hard_to_easy = np.linspace(0, 1, 64)
    policy, other = results(list(hard_to_easy + 0.01)), results(list(hard_to_easy))
    shuffled = dataclasses.replace(other, score=np.random.default_rng(0).permutation(other.score))
    tight, wide = (
        compare({"policy": policy, "constant": r}, {"policy": 1, "constant": 1}, 0) for r in (other, shuffled)
    )
    assert list(tight["paired"]) == ["policy-constant"]
    assert tight["paired"]["policy-constant"]["ci95"] == pytest.approx([0.01, 0.01])
    assert np.ptp(wide["paired"]["policy-constant"]["ci95"]) > 0.1
    assert tight["methods"]["constant"]["macs_ratio"]["iqm"] == pytest.approx(0.1)


def test_goals_are_counted_over_tasks_that_some_method_met() -> None:
    one, two = results([1, 1, 1, 1], [True, True, False, False]), results([1, 1, 1, 1], [True, False, False, True])
    entry = compare({"policy": one, "dense": two}, {"policy": 1, "dense": 1}, 0)
    assert entry["num_feasible"] == 3  # neither met the third
    assert entry["methods"]["policy"]["goal_met"] == pytest.approx(2 / 3)
    assert entry["methods"]["dense"]["goal_met_within_1_point"] == pytest.approx(2 / 3)
    assert entry["methods"]["policy"]["shortfall"] == pytest.approx(0.1)  # of all four
    none = results([1, 1], [False, False])
    impossible = compare({"policy": none}, {"policy": 1}, 0)
    assert impossible["num_feasible"] == 0
    assert impossible["methods"]["policy"]["goal_met"] is None


def test_a_table_has_one_row_a_goal_method_and_task() -> None:
    rows = csv_rows({"keep 0.98": {"policy": results([1, 2], [True, False])}}, [7, 8])
    assert [(r["goal"], r["method"], r["task_seed"], r["score"], r["goal_met"]) for r in rows] == [
        ("keep 0.98", "policy", 7, 1.0, True),
        ("keep 0.98", "policy", 8, 2.0, False),
    ]
    assert rows[0]["floor"] == pytest.approx(0.9)
