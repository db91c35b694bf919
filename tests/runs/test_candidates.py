"""Limits, proposals and the front, which searches of chains and of real models share."""

import math

import optuna
import pytest

from rlkd.data import Goal
from rlkd.errors import UserError
from rlkd.runs.candidates import check_within, front_of, limits_of, propose
from rlkd.runs.search import Candidate


def made(width: int, ratio: float, accuracy: float = math.nan) -> Candidate:
    return Candidate((width,), (), (ratio, 1.0, ratio, 1.0), ratio, accuracy, ratio)


def test_the_front_is_what_no_other_candidate_beats() -> None:
    def made(accuracy: float, latency_s: float) -> Candidate:
        return Candidate((1,), (), (1.0,) * 4, latency_s, accuracy, latency_s)

    a, b, c, worse, equal = made(0.7, 1.0), made(0.8, 2.0), made(0.9, 3.0), made(0.75, 2.5), made(0.7, 1.5)
    assert front_of([worse, c, equal, a, b]) == [a, b, c]


def test_limits_stand_in_the_order_of_the_costs() -> None:
    assert limits_of(Goal(latency="3ms", size="4x"), 0.012) == (0.25, math.inf, math.inf, 0.25)


def test_limits_that_no_structure_is_within_name_the_fastest_one() -> None:
    grid = [made(8, 0.5), made(9, 0.6)]
    check_within(grid, (0.5, math.inf, math.inf, math.inf), str)
    with pytest.raises(UserError, match=r"the fastest one, widths 8, has latency 0\.500, energy 1\.000, macs 0\.500"):
        check_within(grid, (0.49, math.inf, math.inf, math.inf), lambda candidate: f"widths {candidate.widths[0]}")


def test_a_structure_is_trained_once_and_refused_ones_are_not() -> None:
    trained: list[int] = []

    def draw(trial: optuna.Trial) -> Candidate | None:
        width = trial.suggest_categorical("width", [1, 2, 3])
        return made(width, 0.1 * width) if width != 2 else None

    def train(candidate: Candidate) -> Candidate:
        trained.append(candidate.widths[0])
        return made(candidate.widths[0], candidate.latency_s, accuracy=0.5)

    seen: list[Candidate] = []
    found = propose(draw, train, first=[{"width": 3}], num_candidates=3, seed=0, on_candidate=seen.append)
    assert trained == [3, 1]  # what is enqueued comes first; there is no third structure
    assert found == seen
