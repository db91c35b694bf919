"""What is possible before a training, and what it reached."""

import math
import re
from pathlib import Path

import pytest
import torch

from rlkd.data import Goal, Preference
from rlkd.envs import Scenario
from rlkd.envs.episodes import Episodes
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.runs.goals import (
    check_floor,
    check_limits,
    dense_accuracies,
    goal_figures,
    goal_line,
    possible_students,
    reference_accuracies,
    task_of,
    with_goal,
)
from rlkd.runs.outcome import check_goal


def asked(scenario: Scenario, **goal: float | str) -> Scenario:
    return with_goal(scenario, Goal(**goal), Preference())  # type: ignore[arg-type]


def test_the_rows_say_what_each_limit_leaves(scenario: Scenario) -> None:
    limits = torch.tensor(task_of(asked(scenario, latency=0.7, size="4x"), 0).limits)
    rows = {row.name: row for row in possible_students(scenario, limits)}
    assert list(rows) == [
        "dense",
        "dense, first exit",
        "smallest",
        "smallest, first exit",
        "latency <= 0.7",
        "size <= 0.25",
        "all limits",
    ]
    assert rows["dense"].cost.ratios[0].tolist() == pytest.approx([1.0] * 4)
    assert rows["dense"].unit_keep == rows["dense"].feature_keep == 1.0
    assert 0.6 < float(rows["latency <= 0.7"].cost.latency_ratio) <= 0.7
    assert 0.2 < float(rows["size <= 0.25"].cost.size_ratio) <= 0.25
    assert rows["all limits"].unit_keep <= min(rows[n].unit_keep for n in ("latency <= 0.7", "size <= 0.25"))
    assert (rows["smallest"].cost.ratios <= rows["all limits"].cost.ratios).all()


def test_a_floor_that_a_constant_answer_reaches_is_noted(scenario: Scenario, caplog: pytest.LogCaptureFixture) -> None:
    check_goal(asked(scenario, accuracy=0.05), Goal(accuracy=0.05), seed=0)
    assert re.search(r"note: the floor 0.0500 is not above 0.1\d{3}, the share of the commonest class", caplog.text)
    caplog.clear()
    check_goal(asked(scenario, accuracy=0.5), Goal(accuracy=0.5), seed=0)
    assert "commonest" not in caplog.text


def test_size_counts_the_parameters_that_ship(scenario: Scenario) -> None:
    dense = possible_students(scenario, torch.full((4,), math.inf))[0]
    structure = scenario.new_structure()
    held = [*structure.layers.parameters(), *structure.heads[-1].parameters()]  # an early head that is not used is cut
    assert float(dense.cost.parameters) == sum(p.numel() for p in held)


def test_a_limit_in_milliseconds_is_a_share_of_the_dense_latency(scenario: Scenario) -> None:
    dense = possible_students(scenario, torch.full((4,), math.inf))[0]
    half_ms = float(dense.cost.latency_s) * 1e3 / 2
    assert task_of(asked(scenario, latency=f"{half_ms:.9f}ms"), 0).latency_limit == pytest.approx(0.5, rel=1e-4)


def test_impossible_goals_are_named(scenario: Scenario) -> None:
    with pytest.raises(UserError, match=r"goal\.latency: got a limit of 0\.01 .* the smallest student has 0\.\d+"):
        check_limits(scenario, torch.tensor([0.01, 1.0, 1.0, 1.0]))
    check_limits(scenario, torch.tensor([0.9, 0.9, 0.9, 0.9]))
    with pytest.raises(UserError, match=r"keep: got 1\.02 of the teacher's accuracy 0\.9900, .* floor of 1\.0098"):
        check_floor(torch.tensor([1.0, 1.0098]), torch.tensor([0.98, 0.99]), 1.02, "the teacher's")
    check_floor(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0, "the teacher's")


def test_a_goal_is_met_exactly_from_its_floor_on(scenario: Scenario) -> None:
    own = asked(scenario, accuracy=0.5, macs=0.6)
    episodes = Episodes(own, 1)
    episodes.reset([4])
    cost = episodes.evaluate("test")[1]

    def met(accuracy: float, macs: float, lost: bool = False) -> tuple[bool, float]:
        cost.macs_ratio.fill_(macs)
        figures = goal_figures(episodes, (0.9, accuracy), cost, lost)
        assert figures["limits"] == {"macs": pytest.approx(0.6)}
        return figures["goal_met"], figures["shortfall"]

    assert met(0.5, 0.6) == (True, 0.0)
    assert met(0.49, 0.5) == (False, pytest.approx(0.01))
    assert met(0.9, 0.61) == (False, 0.0)
    assert met(0.9, 0.5, lost=True) == (False, 0.0)
    weights = Episodes(with_goal(scenario, Goal(), Preference()), 1)
    weights.reset([4])
    assert goal_figures(weights, (0.9, 0.9), cost, False)["goal_met"] is None


def test_the_last_line_says_what_was_reached() -> None:
    measured = {"profile_batch": 8, "batch_8": {"speedup": 2.71, "speedup_over_teacher": 3.14}}
    figures = {"accuracy": 0.912, "floor": 0.904, "goal_met": True, "shortfall": 0.0}
    assert goal_line(figures, measured) == (
        "goal met: accuracy 0.9120 on test (floor 0.9040), 2.71 times faster than the dense student, "
        "3.14 times faster than the teacher (both measured, batch 8)"
    )
    missed = {**figures, "accuracy": 0.9, "goal_met": False, "shortfall": 0.004}
    assert goal_line(missed, measured).startswith("goal missed by 0.0040: accuracy 0.9000 on test (floor 0.9040), ")
    alone = {"profile_batch": 8, "batch_8": {"speedup": 2.0}}
    assert goal_line({"accuracy": 0.9, "goal_met": None}, alone) == (
        "accuracy 0.9000 on test, 2.00 times faster than the dense student (measured)"
    )
    slow = {"profile_batch": 8, "batch_8": {"speedup": 0.5}}
    assert "2.00 times slower than the dense student" in goal_line({"accuracy": 0.9, "goal_met": None}, slow)


def test_the_dense_student_is_trained_once_and_remembered(scenario: Scenario, tmp_path: Path) -> None:
    own = asked(scenario, keep=0.98, reference="dense")
    task = task_of(own, 6)
    first = reference_accuracies(own, task, Journal(tmp_path))
    own.known.accuracy.clear()
    again = reference_accuracies(own, task, Journal(tmp_path, resume=True))
    assert torch.equal(first, again)
    assert torch.equal(own.references([task])[0, :2], first)  # episodes read the same, and train nothing
    assert 0.2 < float(first[1]) <= 1.0
    # the report of a run whose floor is a share of the teacher's accuracy trains the same dense student
    assert dense_accuracies(asked(scenario, keep=0.98), 6).tolist() == pytest.approx(first.tolist(), abs=1e-6)
