import dataclasses
from unittest.mock import patch

import pytest
import torch

from rlkd.agents.evaluation.benchmark import Way, bench, whole_training
from rlkd.envs import EnvConfig, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.students import TrainConfig


@pytest.mark.slow
def test_bench_measures_every_way_and_its_shares_add_up(config: EnvConfig) -> None:
    quick = dataclasses.replace(config, train=TrainConfig(2, 8))
    result = bench(quick, num_students=4, num_rounds=1)
    assert len(result["updates_per_s"]) == 4
    assert all(row["low"] <= row["median"] <= row["high"] for row in result["updates_per_s"].values())
    for lock_step, ratios in result["ratio"].items():
        assert set(ratios) == {"one-student loop", "SubprocVecEnv, 2 processes"}
        for name, ratio in ratios.items():
            medians = (result["updates_per_s"][way]["median"] for way in (lock_step, name))
            assert ratio == pytest.approx(next(medians) / next(medians))
    assert abs(sum(result["step_share"].values()) - 1) < 1e-9
    for row in result["updates_per_s"].values():
        assert row["trainings_per_s"] == pytest.approx(row["median"] / (2 * config.num_windows))


def test_a_whole_training_goes_from_reset_to_the_end(scenario: Scenario) -> None:
    episodes = Episodes(scenario, 3)
    whole_training(episodes)
    assert episodes._window.tolist() == [scenario.config.num_windows] * 3
    way = Way(3, 2, 1, lambda: None, windows_per_step=4)
    with patch("rlkd.agents.evaluation.benchmark._window_s", lambda step, num_windows: 0.5):
        assert way.updates_per_s(steps_per_window=15) == 3 * 4 * 15 / 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_bench_measures_populations_on_a_gpu(config: EnvConfig) -> None:
    quick = dataclasses.replace(config, train=TrainConfig(2, 8, device="cuda"))
    result = bench(quick, num_students=4, num_rounds=1, device_students=[3, 5])
    assert list(result["updates_per_s"])[-2:] == ["lock-step, cuda, 3 students", "lock-step, cuda, 5 students"]
