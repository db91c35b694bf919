"""Projection into a latency limit: what acts never costs more, and what acts is what is credited."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkd.data import Range
from rlkd.envs import CONTROLS, Scenario
from rlkd.envs.action import EXIT_KINDS, exit_kind, with_values
from rlkd.envs.episodes import Episodes
from rlkd.envs.limits import KEPT, within_limits

units = st.lists(st.floats(0, 1, width=32), min_size=len(CONTROLS), max_size=len(CONTROLS))
OTHERS = [i for i in range(len(CONTROLS) - len(EXIT_KINDS)) if i not in KEPT]


def limited(scenario: Scenario, limit: float) -> Scenario:
    """The same scenario, all of whose tasks have this latency limit."""
    task = dataclasses.replace(scenario.config.task, limit_share=1.0, latency_limit=Range(limit, limit))
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task))


def smallest(scenario: Scenario) -> float:
    """Latency ratio of the smallest student, all of whose samples leave at the first exit."""
    config = scenario.config.controls
    shares = torch.tensor([config.feature_keep[0], *[config.unit_keep[0]] * (len(scenario.group_sizes) - 1)])
    kept = (shares * torch.tensor(scenario.group_sizes)).round().clamp_min(1.0)
    rates = torch.eye(scenario.num_exits)[:1]
    chance = torch.tensor([1.0 / scenario.data.num_classes])
    return float(scenario.cost(kept[None], rates, chance).latency_ratio[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(units, st.floats(0.0, 1.3))
def test_what_acts_never_costs_more_than_a_limit_that_can_be_met(
    scenario: Scenario, values: list[float], limit: float
) -> None:
    episodes = Episodes(limited(scenario, limit), 2)
    episodes.reset([3, 4])
    u = torch.tensor([values] * 2)
    episodes.u = within_limits(u, episodes.latency_limit, scenario)
    _, cost, _ = episodes._settle()
    if limit >= smallest(scenario):
        assert (cost.latency_ratio <= limit + 1e-6).all()
    else:  # the cheapest that there is
        assert (cost.latency_ratio <= smallest(scenario) + 1e-6).all()
    assert torch.equal(episodes.u[:, OTHERS], u[:, OTHERS])
    assert (episodes.u[:, KEPT] <= u[:, KEPT]).all()
    # moving twice moves no further
    torch.testing.assert_close(within_limits(episodes.u, episodes.latency_limit, scenario), episodes.u)


def test_what_fits_is_left_alone_and_both_shares_go_down_together(scenario: Scenario) -> None:
    whole = scenario.start.expand(4, -1)
    limit = torch.tensor([torch.inf, 1.0, 0.6, 0.6])
    small = with_values(whole, {"unit_keep": torch.tensor([1.0, 1.0, 1.0, 0.05])}, scenario.config.controls)
    moved = within_limits(small, limit, scenario)
    assert torch.equal(moved[[0, 1, 3]], small[[0, 1, 3]])
    shift = (small - moved)[2, KEPT]
    assert float(shift[0]) == pytest.approx(float(shift[1]))
    assert float(shift[0]) > 0.05
    # a tenth of a share more would not fit
    more = moved[2:3].clone()
    more[:, KEPT] += 0.05
    assert not torch.equal(within_limits(more, limit[2:3], scenario), more)


def test_where_the_smallest_shares_cost_too_much_all_leave_at_the_first_exit(scenario: Scenario) -> None:
    moved = within_limits(scenario.start[None], torch.tensor([1e-3]), scenario)
    assert moved[0, KEPT].tolist() == [0.0, 0.0]
    assert EXIT_KINDS[int(exit_kind(moved)[0])] == "first"


@pytest.mark.parametrize("num_students", [1, 3])
def test_the_credited_setting_is_the_projected_one(scenario: Scenario, num_students: int) -> None:
    episodes = Episodes(limited(scenario, 0.4), num_students)
    first = episodes.reset(list(range(num_students)))
    controls = [-len(CONTROLS) + i for i in range(len(CONTROLS))]
    projected = within_limits(scenario.start.expand(num_students, -1), episodes.latency_limit, scenario)
    assert torch.equal(first[:, controls], projected)  # the start fits from the beginning
    u = scenario.start.expand(num_students, -1)
    outcome = episodes.step(u)
    assert torch.equal(episodes.u, within_limits(u, episodes.latency_limit, scenario))
    assert not torch.equal(episodes.u, u)
    assert torch.equal(outcome.observation[:, controls], episodes.u)
    assert (outcome.cost.latency_ratio <= 0.4).all()
    # a training under the projected setting is the same training
    again = Episodes(limited(scenario, 0.4), num_students)
    again.reset(list(range(num_students)))
    assert torch.equal(again.step(episodes.u).observation, outcome.observation)
