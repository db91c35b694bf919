import dataclasses

import pytest

from rlkd.agents.benchmark import bench
from rlkd.envs import EnvConfig
from rlkd.students import TrainConfig


def test_bench_measures_every_way_and_its_shares_add_up(config: EnvConfig) -> None:
    quick = dataclasses.replace(config, train=TrainConfig(2, 8))
    result = bench(quick, num_students=4, num_rounds=1, say=print)
    assert len(result["updates_per_s"]) == 4
    assert all(row["low"] <= row["median"] <= row["high"] for row in result["updates_per_s"].values())
    for lock_step, ratios in result["ratio"].items():
        assert set(ratios) == {"one-student loop", "SubprocVecEnv, 2 processes"}
        for name, ratio in ratios.items():
            medians = (result["updates_per_s"][way]["median"] for way in (lock_step, name))
            assert ratio == pytest.approx(next(medians) / next(medians))
    assert abs(sum(result["step_share"].values()) - 1) < 1e-9
