import dataclasses

import numpy as np
import pytest
import torch

from rlkd.agents.controllers import hold_start, published, run, schedule
from rlkd.agents.search import SearchConfig, StaticSettings, search_static
from rlkd.envs import OBSERVATIONS, ControlConfig, EnvConfig, World, build_world
from rlkd.envs.action import decode, published_setting


def test_schedule_goes_from_hot_and_dense_to_cold_and_sparse() -> None:
    config, start = ControlConfig(), torch.zeros(2, 9)
    first, last = (decode(schedule(config, 5)(start, start, w), config, 10) for w in (0, 4))
    assert first.temperature.tolist() == pytest.approx([5.0, 5.0])
    assert last.temperature.tolist() == pytest.approx([1.0, 1.0])
    assert (float(first.unit_keep[0]), float(last.unit_keep[0])) == pytest.approx((0.8, 0.3))
    assert float(last.weights[0, 0] / last.weights[0, 1]) == pytest.approx(0.5 / 0.3, rel=1e-4)


def test_static_controllers_hold() -> None:
    start = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hold_start(start, start, 7), start)
    config = ControlConfig()
    assert torch.equal(published(config)(start, start, 2), published_setting(config).expand(3, -1))


def test_the_same_seeds_give_the_same_results_however_many_run_together(world: World) -> None:
    seeds = [2**60 + i for i in range(6)]
    one, again = (run(world, hold_start, seeds, world.config.task) for _ in range(2))
    np.testing.assert_array_equal(one.score, again.score)
    parts = run(world, hold_start, seeds, world.config.task, num_parallel=2)
    np.testing.assert_allclose(one.score, parts.score, atol=5e-3)
    np.testing.assert_array_equal(one.macs_ratio, parts.macs_ratio)


def test_only_test_and_validation_can_be_final(world: World) -> None:
    with pytest.raises(ValueError, match="split: got 'train'"):
        run(world, hold_start, [1], world.config.task, final_split="train")


def test_selection_never_reads_the_test_split(world: World) -> None:
    labels = world.data.labels.clone()
    labels[world.data.splits["test"]] = 0
    blind = dataclasses.replace(world, data=dataclasses.replace(world.data, labels=labels))
    config = SearchConfig(3, 4, 2, 4)
    one, two = (search_static(w, config, torch.Generator().manual_seed(1)) for w in (world, blind))
    assert torch.equal(one.terms, two.terms)


def test_diverged_students_count_as_worst(config: EnvConfig) -> None:
    hot = build_world(dataclasses.replace(config, controls=ControlConfig(learning_rate=(1e30, 1e30))))
    results = run(hot, hold_start, [1, 2, 3], hot.config.task)
    assert results.diverged.all()
    assert results.score.tolist() == results.accuracy.tolist() == [0.0] * 3
    assert results.macs_ratio.tolist() == [1.0] * 3


def test_best_static_setting_follows_the_preference() -> None:
    static = StaticSettings(
        torch.stack([torch.zeros(9), torch.ones(9)]), torch.tensor([[0.9, 0.0, 0.0], [0.7, 0.5, 0.5]])
    )
    # 0.9 w against 0.7 w + 0.5 (1 - w): the first wins above w = 5/7
    wanted = torch.tensor([[0.8, 0.15, 0.05], [0.6, 0.3, 0.1]])
    assert static.best(wanted)[:, 0].tolist() == [0.0, 1.0]
    observation = torch.zeros(2, len(OBSERVATIONS))
    first = OBSERVATIONS.index("preference_accuracy")
    observation[:, first : first + 3] = wanted
    assert static.controller()(observation, torch.zeros(2, 9), 0)[:, 0].tolist() == [0.0, 1.0]


def test_search_repeats_counts_its_cost_and_knows_the_published_setting(world: World) -> None:
    windows: list[int] = []
    config = SearchConfig(num_settings=3, tasks_per_setting=4, num_finalists=2, tasks_per_finalist=5)
    one = search_static(world, config, torch.Generator().manual_seed(4), windows.append)
    two = search_static(world, config, torch.Generator().manual_seed(4))
    assert torch.equal(one.positions, two.positions)
    assert torch.equal(one.terms, two.terms)
    assert sum(windows) == config.num_trainings * world.config.num_windows == (12 + 10) * 4
    alone = search_static(world, SearchConfig(1, 2, 1, 2), torch.Generator().manual_seed(0))
    assert torch.equal(alone.positions[0], published_setting(world.config.controls))
