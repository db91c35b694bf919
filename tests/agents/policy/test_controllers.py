import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.policy.controllers import EXIT_GRID, hold_start, run
from rlkd.envs import ControlConfig, EnvConfig, Scenario, build_scenario
from rlkd.envs.action import CONTROLS
from rlkd.envs.episodes import Episodes


def test_the_same_seeds_give_the_same_results_however_many_run_together(scenario: Scenario) -> None:
    seeds = [2**60 + i for i in range(6)]
    one, again = (run(scenario, hold_start, seeds, scenario.config.task) for _ in range(2))
    np.testing.assert_array_equal(one.score, again.score)
    parts = run(scenario, hold_start, seeds, scenario.config.task, num_parallel=2)
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


def test_an_exit_tuned_afterwards_is_the_best_of_the_grid_on_validation(scenario: Scenario) -> None:
    seeds = [2**60 + i for i in range(4)]

    def never_exits(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        position = episodes.start.clone()
        position[:, CONTROLS.index("exit_threshold")] = 1.0
        return position

    def scores(candidate: float) -> NDArray[np.float64]:
        """On validation when the exit is moved to `candidate` after the same training."""
        episodes = Episodes(scenario, 4)
        observation = episodes.reset(seeds)
        for window in range(scenario.config.num_windows):
            observation = episodes.step(never_exits(observation, episodes, window)).observation
        episodes.set_exit(torch.full((4,), candidate))
        return episodes.evaluate("validation")[2].double().numpy()

    tuned = run(scenario, never_exits, seeds, scenario.config.task, final_split="validation", tune_exit=True)
    best = np.max([scores(candidate) for candidate in EXIT_GRID], axis=0)
    np.testing.assert_allclose(tuned.score, best, atol=1e-6)
    fixed = run(scenario, never_exits, seeds, scenario.config.task, final_split="validation")
    assert (tuned.score > fixed.score).any()
