import dataclasses

import pytest
import torch
from planned import network_plan

from rlkd.envs import CONTROLS, OBSERVATIONS, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.schedule import (
    CLIP,
    EXIT,
    FACTS,
    STATE,
    ControlPlan,
    exit_position,
    fixed_plan,
    phase_inputs,
    split_outputs,
    to_settings,
)

SEEDS = [2**60 + i for i in range(4)]
PLAN = network_plan((0.0, 0.5), 2)


def observations(count: int) -> torch.Tensor:
    return torch.rand(count, len(OBSERVATIONS), generator=torch.Generator().manual_seed(3))


def test_a_fixed_plan_has_its_settings_in_equal_parts() -> None:
    plan = fixed_plan(torch.arange(27).reshape(3, 9) / 27)
    held = plan.begin(5)
    windows = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0])
    assert torch.equal(plan.now(held, windows, 6), plan.settings[[0, 0, 1, 2, 2]])
    assert torch.equal(plan.revise(held, observations(5), windows, 6), held)


def test_outputs_become_settings_by_hand() -> None:
    outputs = torch.zeros(1, 2 * 8 + 4)
    outputs[0, :16] = torch.tensor([0.25, 0.75] * 8).logit()
    outputs[0, 16] = 0.0  # the middle of the range in which an exit decides
    kinds = {0: 0.0, 1: 1.0, 2: 0.5}
    for kind, position in kinds.items():
        outputs[0, 17:] = torch.eye(3)[kind]
        scalars, inner, choice = split_outputs(outputs)
        settings = to_settings(scalars, exit_position(inner, choice))  # [1, 2, 9]
        assert settings[0, :, EXIT].tolist() == [position] * 2
        others = [i for i in range(9) if i != EXIT]
        expected = torch.tensor([0.25, 0.75] * 4)
        torch.testing.assert_close(settings[0, 0, others], expected)
        torch.testing.assert_close(settings[0, 1, others], expected)


def test_the_first_network_sees_the_task_alone_and_later_ones_the_training_too() -> None:
    before = observations(3)
    other_state, other_fact, other_preference = before.clone(), before.clone(), before.clone()
    other_state[:, [OBSERVATIONS.index(name) for name in STATE]] += 0.1
    other_fact[:, OBSERVATIONS.index(FACTS[0])] += 0.1
    other_preference[:, OBSERVATIONS.index("preference_accuracy")] += 0.1
    first, second = PLAN.networks
    assert torch.equal(first.decide(before), first.decide(other_state))
    assert not torch.equal(second.decide(before), second.decide(other_state))
    for network in PLAN.networks:
        assert not torch.equal(network.decide(before), network.decide(other_fact))
        assert not torch.equal(network.decide(before), network.decide(other_preference))
    assert first.decide(before).shape == (3, 2, 9)
    assert second.decide(before).shape == (3, 1, 9)


def test_figures_are_clipped_so_that_a_strange_student_is_as_the_strangest_known() -> None:
    first, seen = PLAN.networks[0], observations(1)
    column = OBSERVATIONS.index("latency_saving_exit")
    place = phase_inputs(0).index("latency_saving_exit")
    limit = first.mean[place] + CLIP * first.deviation[place]
    far, farther = seen.clone(), seen.clone()
    far[0, column], farther[0, column] = limit + 1.0, limit + 100.0
    assert torch.equal(first.decide(far), first.decide(farther))


def test_students_follow_what_networks_decide_when_phases_begin(scenario: Scenario) -> None:
    planned = dataclasses.replace(scenario, plan=PLAN)  # 4 windows: phases begin at 0 and 2
    episodes = Episodes(planned, 4)
    seen = episodes.reset(SEEDS)
    at_start = PLAN.networks[0].decide(seen)  # [4, 2, 9]
    for window in range(2):
        assert torch.equal(episodes.start, at_start[:, 0]), window
        seen = episodes.step(episodes.start).observation
    revised = PLAN.networks[1].decide(seen)[:, 0]
    assert not torch.equal(revised, at_start[:, 1])
    for window in range(2, 4):
        assert torch.equal(episodes.start, revised), window
        episodes.step(episodes.start)


def test_a_student_that_begins_anew_leaves_the_plans_of_the_others_alone(scenario: Scenario) -> None:
    episodes = Episodes(dataclasses.replace(scenario, plan=PLAN), 4)
    episodes.reset(SEEDS)
    for _ in range(3):
        episodes.step(episodes.start)
    before = episodes.start
    seen = episodes.reset([2**60 + 9], torch.tensor([2]))
    stay = [0, 1, 3]
    assert torch.equal(episodes.start[stay], before[stay])
    assert torch.equal(episodes.start[2], PLAN.networks[0].decide(seen)[2, 0])


def test_rows_that_begin_a_phase_at_different_times_are_revised_each_in_its_own() -> None:
    held, seen = PLAN.begin(3), observations(3)
    held = PLAN.revise(held, seen, torch.tensor([0.0, 2.0, 1.0]), 4)
    torch.testing.assert_close(held[0], PLAN.networks[0].decide(seen)[0])
    torch.testing.assert_close(held[1, 1:], PLAN.networks[1].decide(seen)[1])
    assert torch.equal(held[1, 0], PLAN.settings[0])
    assert torch.equal(held[2], PLAN.settings)


@pytest.mark.parametrize("num_windows", [1, 2, 12, 100])
def test_phases_begin_at_their_share_of_any_horizon(num_windows: int) -> None:
    plan = ControlPlan((0.0, 1 / 6, 2 / 3), torch.zeros(3, 9))
    begins = [plan.begins(k, num_windows) for k in range(3)]
    assert begins == {1: [0, 0, 1], 2: [0, 0, 1], 12: [0, 2, 8], 100: [0, 17, 67]}[num_windows]


def test_every_control_is_named_once() -> None:
    assert CONTROLS[EXIT] == "exit_threshold"
    assert set(FACTS) | set(STATE) <= set(OBSERVATIONS)
