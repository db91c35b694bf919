import dataclasses

import numpy as np
import pytest

from rlkd.agents.evaluation.comparison import compare, interval, paired
from rlkd.agents.policy.controllers import Results


def results(score: list[float]) -> Results:
    s = np.array(score)
    never, times = np.zeros(len(s), dtype=bool), np.arange(len(s))
    return Results(s, s / 2, s * 0 + 0.3, s * 0 + 0.2, s * 0 + 0.1, never, times)


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
    ours, theirs = results(list(hard_to_easy + 0.01)), results(list(hard_to_easy))
    shuffled = dataclasses.replace(theirs, score=np.random.default_rng(0).permutation(theirs.score))
    tight, wide = (compare({"policy": ours, "static": r}, {"policy": 1, "static": 1}, 0) for r in (theirs, shuffled))
    assert list(tight["paired"]) == ["policy-static"]
    assert tight["paired"]["policy-static"]["ci95"] == pytest.approx([0.01, 0.01])
    assert np.ptp(wide["paired"]["policy-static"]["ci95"]) > 0.1
    assert tight["methods"]["static"]["macs_ratio"]["iqm"] == pytest.approx(0.1)
