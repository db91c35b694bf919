"""Every cost limit holds in every window, whatever the controller asks for."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkd.data.distribution import COSTS, TaskGoal
from rlkd.envs import Scenario
from rlkd.envs.action import CONTROLS, EXIT_KINDS, NUM_CONTROLS, decode, exit_kind, published_setting, with_exit_kind
from rlkd.envs.episodes import Episodes
from rlkd.envs.limits import KEPT, largest_cost, must_leave_first, within_limits
from rlkd.models import StudentConfig, build_student

INF = math.inf
KINDS = list(range(NUM_CONTROLS - len(EXIT_KINDS), NUM_CONTROLS))
units = st.lists(st.floats(0, 1, width=32), min_size=NUM_CONTROLS, max_size=NUM_CONTROLS)


def some_units(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, NUM_CONTROLS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(len(COSTS)), ids=COSTS)
def test_settings_are_moved_until_the_cost_fits_and_no_further(scenario: Scenario, index: int) -> None:
    u = with_exit_kind(some_units(24), "never")
    limits = torch.full((24, len(COSTS)), INF)
    small = u.clone()
    small[:, [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]] = 0.0
    least = largest_cost(small, scenario, at_first=False).ratios[:, index]
    limits[:, index] = torch.linspace(float(least.max()) * 1.05, 0.9, 24)
    moved = within_limits(u, limits, scenario)
    before, after = (largest_cost(x, scenario, at_first=False).ratios[:, index] for x in (u, moved))
    assert (after <= limits[:, index]).all()
    fitted = before <= limits[:, index]
    assert fitted.any()
    assert not fitted.all()
    assert torch.equal(moved[fitted], u[fitted])
    others = [i for i, name in enumerate(CONTROLS) if name not in ("feature_keep", "unit_keep")]
    assert torch.equal(moved[:, others], u[:, others])
    assert (after[~fitted] > 0.6 * limits[~fitted, index]).all()  # not lowered more than the bisection's steps


def test_limits_hold_where_kept_units_are_rounded_up(scenario: Scenario) -> None:
    template = build_student(StudentConfig(widths=(48, 48), exits=(1,), unit_multiple=16), (8, 8), 10)
    rounded = dataclasses.replace(scenario, template=template)
    u = with_exit_kind(some_units(24), "never")
    limits = torch.full((24, len(COSTS)), INF)
    limits[:, COSTS.index("size")] = 0.5
    moved = within_limits(u, limits, rounded)
    size, plain = (largest_cost(moved, s, at_first=False).size_ratio for s in (rounded, scenario))
    assert (size <= 0.5).all()
    assert (size > plain).any()  # rounding costs something, which the limit counts
    students = rounded.students(24)
    controls = decode(moved, rounded.config.controls, 10)
    students.set_controls(controls)
    kept = torch.stack([mask.sum(-1) for mask in students.masks()[1:]])
    assert (kept % 16 == 0).all()


def test_without_limits_nothing_moves(scenario: Scenario) -> None:
    u = some_units(5)
    assert within_limits(u, torch.full((5, 4), INF), scenario) is u
    assert not must_leave_first(u, torch.full((5, 4), INF), scenario).any()


def test_a_limit_that_only_the_first_exit_meets_sends_all_samples_there(scenario: Scenario) -> None:
    u = some_units(6, seed=1)
    u[:, [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]] = 0.0
    end, first = (largest_cost(with_exit_kind(u, "never"), scenario, at_first=at).latency_ratio for at in (False, True))
    limits = torch.full((6, 4), INF)
    limits[:, 0] = (end.min() + first.max()) / 2
    moved = within_limits(some_units(6, seed=2), limits, scenario)
    assert (exit_kind(moved) == EXIT_KINDS.index("first")).all()
    assert must_leave_first(moved, limits, scenario).all()
    assert (largest_cost(moved, scenario, at_first=True).latency_ratio <= limits[:, 0]).all()


def test_every_window_is_within_the_limits_even_below_the_floor(scenario: Scenario) -> None:
    """A floor of 1 is missed by every student, so that the kind `first` would fall back to the end if it might."""
    u = published_setting(scenario.config.controls)[None].clone()
    u[:, [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]] = 0.0
    end, first = (float(largest_cost(u, scenario, at_first=at).latency_ratio) for at in (False, True))
    goals = [
        TaskGoal((0.0, 0.75, 0.25), keep=1.0, latency_limit=(end + first) / 2),
        TaskGoal((0.0, 0.75, 0.25), keep=1.0, energy_limit=0.3, macs_limit=0.25, size_limit=0.2),
        TaskGoal((1.0, 0.0, 0.0), macs_limit=0.5),
    ]
    for goal in goals:
        tasks = scenario.config.task.with_goal(goal, "1.0")
        own = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=tasks))
        episodes = Episodes(own, 3)
        episodes.reset([1, 2, 3])
        limits = torch.tensor(goal.limits)
        for window in range(2):
            asked = some_units(3, seed=window)
            asked[:, KINDS] = torch.eye(3)  # one of each kind
            outcome = episodes.step(asked)
            assert (outcome.cost.ratios <= limits + 1e-6).all(), (goal, window)
        assert (episodes.evaluate("test")[1].ratios <= limits + 1e-6).all()


def limited(scenario: Scenario, limit: float) -> Scenario:
    """The same scenario, all of whose tasks have this latency limit."""
    task = scenario.config.task.with_goal(TaskGoal((1.0, 0.0, 0.0), latency_limit=limit), "0.5")
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(units, st.floats(0.0, 1.3))
def test_what_acts_never_costs_more_than_a_limit_that_can_be_met(
    scenario: Scenario, values: list[float], limit: float
) -> None:
    episodes = Episodes(limited(scenario, limit), 2)
    episodes.reset([3, 4])
    u = torch.tensor([values] * 2)
    episodes.u = within_limits(u, episodes.limits, scenario)
    _, cost, _ = episodes._settle()
    small = published_setting(scenario.config.controls)[None]
    small[:, KEPT] = 0.0
    least = float(largest_cost(small, scenario, at_first=True).latency_ratio)
    assert (cost.latency_ratio <= max(limit, least) + 1e-6).all()  # else the cheapest that there is
    others = [i for i in range(NUM_CONTROLS) if i not in (*KEPT, *KINDS)]
    assert torch.equal(episodes.u[:, others], u[:, others])
    assert (episodes.u[:, KEPT] <= u[:, KEPT]).all()
    # moving twice moves no further, unless the limit chose another kind of exit, which is cheaper
    same = exit_kind(episodes.u) == exit_kind(u)
    again = within_limits(episodes.u, episodes.limits, scenario)
    torch.testing.assert_close(again[same], episodes.u[same])


@pytest.mark.parametrize("num_students", [1, 3])
def test_the_credited_setting_is_the_projected_one(scenario: Scenario, num_students: int) -> None:
    episodes, seeds = Episodes(limited(scenario, 0.4), num_students), list(range(num_students))
    first = episodes.reset(seeds)
    start = scenario.start.expand(num_students, -1)
    projected = within_limits(start, episodes.limits, scenario)
    assert torch.equal(first[:, -NUM_CONTROLS:], projected)  # the start fits from the beginning
    outcome = episodes.step(start)
    assert torch.equal(episodes.u, projected)
    assert not torch.equal(episodes.u, start)
    assert torch.equal(outcome.observation[:, -NUM_CONTROLS:], projected)
    assert (outcome.cost.latency_ratio <= 0.4).all()
    # a training under the projected setting is the same training
    again = Episodes(limited(scenario, 0.4), num_students)
    again.reset(seeds)
    assert torch.equal(again.step(projected).observation, outcome.observation)
