import dataclasses

from rlkd.agents.benchmark import bench
from rlkd.envs import EnvConfig
from rlkd.students import TrainConfig


def test_bench_measures_every_way_and_its_shares_add_up(config: EnvConfig) -> None:
    quick = dataclasses.replace(config, train=TrainConfig(2, 8))
    result = bench(quick, num_students=4, num_rounds=1, say=print)
    assert len(result["updates_per_s"]) == 3
    assert all(row["low"] <= row["median"] <= row["high"] for row in result["updates_per_s"].values())
    assert len(result["ratio_of_lock_step"]) == 2
    first = result["updates_per_s"]["lock-step population of 4"]["median"]
    for name, ratio in result["ratio_of_lock_step"].items():
        assert abs(ratio - first / result["updates_per_s"][name]["median"]) < 1e-9
    assert abs(sum(result["step_share"].values()) - 1) < 1e-9
