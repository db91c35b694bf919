import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.policy.bundled import find_policy
from rlkd.agents.policy.controllers import EXIT_GRID, RunOptions, hold_start, run
from rlkd.data import Range
from rlkd.envs import ControlConfig, EnvConfig, Scenario, build_scenario
from rlkd.envs.action import CONTROLS, with_exit_kind
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import GuardConfig
from rlkd.envs.observation import OBSERVATIONS, SAVINGS

UNITS = CONTROLS.index("unit_keep")


def test_the_same_seeds_give_the_same_results_however_many_run_together(scenario: Scenario) -> None:
    seeds = [2**60 + i for i in range(6)]
    one, again = (run(scenario, hold_start, seeds, scenario.config.task) for _ in range(2))
    np.testing.assert_array_equal(one.score, again.score)
    parts = run(scenario, hold_start, seeds, scenario.config.task, options=RunOptions(num_parallel=2))
    np.testing.assert_allclose(one.score, parts.score, atol=5e-3)
    np.testing.assert_array_equal(one.macs_ratio, parts.macs_ratio)


def test_only_test_and_validation_can_be_final(scenario: Scenario) -> None:
    with pytest.raises(ValueError, match="split: got 'train'"):
        run(scenario, hold_start, [1], scenario.config.task, final_split="train")


def test_diverged_students_count_as_worst(config: EnvConfig) -> None:
    hot = build_scenario(dataclasses.replace(config, controls=ControlConfig(learning_rate=(1e30, 1e30))))
    results = run(hot, hold_start, [1, 2, 3], hot.config.task)
    assert results.diverged.all()  # in the third of four windows: two may be undone
    assert results.num_rollbacks.tolist() == [2, 2, 2]
    assert results.score.tolist() == results.accuracy.tolist() == [0.0] * 3
    assert results.macs_ratio.tolist() == [1.0] * 3


def test_a_diverged_student_misses_its_goal_by_the_whole_floor(config: EnvConfig) -> None:
    task = dataclasses.replace(config.task, reference="0.1").with_keep(0.5)
    hot = build_scenario(dataclasses.replace(config, task=task, controls=ControlConfig(learning_rate=(1e30, 1e30))))
    results = run(hot, hold_start, [1, 2], task)
    assert results.shortfall.tolist() == results.floor.tolist() == pytest.approx([0.05] * 2)
    assert results.score.tolist() == pytest.approx([-0.5] * 2)  # 10 a unit of accuracy, all of it missing
    assert not results.goal_met_within_1_point.any()
    # under a guard the windows before the divergence count: two that were undone left the first parameters
    assert not run(hot, hold_start, [1, 2], task, options=RunOptions(GuardConfig())).diverged.any()


def test_goals_are_those_of_the_asked_split(scenario: Scenario) -> None:
    task = scenario.config.task.with_keep(1.0)
    seeds = [2**60 + i for i in range(4)]
    dense = run(scenario, hold_start, seeds, task)  # the published setting, dense: the reference itself
    assert dense.goal_met.all()
    np.testing.assert_allclose(dense.accuracy, dense.floor, atol=1e-6)
    on_validation = run(scenario, hold_start, seeds, task, final_split="validation")
    assert not np.array_equal(dense.floor, on_validation.floor)

    def tiny(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = episodes.start.clone()
        u[:, UNITS] = 0.0
        return u

    small = run(scenario, tiny, seeds, task)
    np.testing.assert_allclose(small.shortfall, np.maximum(0.0, small.floor - small.accuracy))
    np.testing.assert_array_equal(small.goal_met_within_1_point, small.accuracy >= small.floor - 0.01 - 1e-6)
    assert not small.goal_met.any()


def test_a_latency_limit_is_part_of_the_goal(scenario: Scenario) -> None:
    task = dataclasses.replace(scenario.config.task, limit_share=1.0, latency_limit=Range(0.6, 0.6))
    results = run(scenario, hold_start, [1, 2], task)
    assert (results.latency_ratio <= 0.6 + 1e-6).all()
    assert results.goal_met.all()
    impossible = dataclasses.replace(task, latency_limit=Range(0.001, 0.001))
    assert not run(scenario, hold_start, [1, 2], impossible).goal_met.any()


def test_a_guard_ships_a_window_that_met_the_goal(scenario: Scenario) -> None:
    def collapses(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = episodes.start.clone()
        u[:, UNITS] = 0.0 if window == episodes.scenario.config.num_windows - 1 else 1.0
        return u

    task = dataclasses.replace(scenario.config.task, reference="0.5").with_keep(0.4)
    numeric = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task))
    seeds = [2**60 + i for i in range(6)]
    last, best = (
        run(numeric, collapses, seeds, task, final_split="validation", options=RunOptions(guard))
        for guard in (None, GuardConfig())
    )
    assert best.goal_met.sum() > last.goal_met.sum()
    assert (best.score >= last.score - 1e-6)[last.goal_met].all()


def test_an_exit_tuned_afterwards_is_the_best_of_the_grid_on_validation(scenario: Scenario) -> None:
    seeds = [2**60 + i for i in range(4)]

    def never_exits(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        return with_exit_kind(episodes.start, "never")

    episodes = Episodes(scenario, 4)  # the same training
    observation = episodes.reset(seeds)
    for window in range(scenario.config.num_windows):
        observation = episodes.step(never_exits(observation, episodes, window)).observation

    def scores(candidate: float) -> NDArray[np.float64]:
        """On validation when the exit is moved to `candidate` after the training."""
        episodes.set_exit(torch.full((4,), candidate))
        return episodes.evaluate("validation")[2].double().numpy()

    tuned = run(scenario, never_exits, seeds, scenario.config.task, final_split="validation", tune_exit=True)
    chance = 1.0 / scenario.data.num_classes
    best = np.max([scores(1.0), *(scores(chance + (1 - chance) * share) for share in EXIT_GRID)], axis=0)
    np.testing.assert_allclose(tuned.score, best, atol=1e-6)
    fixed = run(scenario, never_exits, seeds, scenario.config.task, final_split="validation")
    assert (tuned.score > fixed.score).any()


def test_a_policy_reads_its_training_mean_for_savings_without_a_control(config: EnvConfig) -> None:
    policy = find_policy(None).policy
    columns = [OBSERVATIONS.index(name) for name in SAVINGS]
    moved = {}
    for exits in ((), (1,)):
        student = dataclasses.replace(config.student, exits=exits)
        scenario = build_scenario(dataclasses.replace(config, student=student, controls=policy.controls), policy.start)
        episodes = Episodes(scenario, 1)
        observation = episodes.reset([1])
        other = observation.clone()
        other[:, columns] -= 0.5
        first, second = (policy.controller()(o, episodes, 0) for o in (observation, other))
        moved[exits] = not torch.equal(first, second)
    assert moved == {(): False, (1,): True}
