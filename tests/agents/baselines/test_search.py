import dataclasses

import pytest
import torch

from rlkd.agents.baselines.recipes import RECIPES
from rlkd.agents.baselines.search import SearchConfig, first_settings, run_points, search_recipe, search_setting
from rlkd.agents.policy.controllers import RunOptions
from rlkd.envs import Scenario
from rlkd.envs.action import EXIT_KINDS, exit_kind, published_setting
from rlkd.envs.guard import GuardConfig
from rlkd.errors import UserError

SMALL = SearchConfig(num_settings=6, tasks_per_setting=4, num_finalists=2, tasks_per_finalist=5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
def test_search_repeats_counts_its_cost_and_tries_the_published_setting_first(scenario: Scenario) -> None:
    windows: list[int] = []
    one = search_setting([scenario], SMALL, generator(4), options=RunOptions(on_window=windows.append))
    assert torch.equal(one, search_setting([scenario], SMALL, generator(4)))
    assert sum(windows) == SMALL.num_trainings * scenario.config.num_windows == (24 + 10) * 4
    alone = search_setting([scenario], SearchConfig(1, 2, 1, 2), generator(0))
    assert torch.equal(alone, published_setting(scenario.config.controls))


def test_first_settings_have_every_kind_of_exit(scenario: Scenario) -> None:
    settings = first_settings(scenario.config.controls)
    assert sorted(exit_kind(settings).tolist()) == [kind for kind in range(len(EXIT_KINDS)) for _ in range(3)]


def test_search_never_reads_the_test_split(scenario: Scenario) -> None:
    labels = scenario.data.labels.clone()
    labels[scenario.data.splits["test"]] = 0
    blind = dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, labels=labels))
    one, two = (search_setting([s], SMALL, generator(1)) for s in (scenario, blind))
    assert torch.equal(one, two)


@pytest.mark.slow
def test_a_goal_changes_what_is_best(scenario: Scenario) -> None:
    config = SearchConfig(num_settings=9, tasks_per_setting=4, num_finalists=3, tasks_per_finalist=4)
    stated = dataclasses.replace(scenario.config.task, reference="0.9")
    numeric = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=stated))
    strict, lax = (
        search_setting([numeric], config, generator(2), tasks=[stated.with_keep(keep)]) for keep in (1.0, 0.05)
    )
    tasks = stated.with_keep(0.05)
    seeds = [1, 2, 3, 4]
    scores = [
        run_points(numeric, RECIPES["constant"], seeds, s.expand(4, -1), tasks=tasks).score.mean()
        for s in (strict, lax)
    ]
    assert scores[1] > scores[0] + 0.1


def test_several_scenarios_share_the_tasks(scenario: Scenario) -> None:
    windows: list[int] = []
    search_setting([scenario, scenario], SMALL, generator(0), options=RunOptions(on_window=windows.append))
    assert sum(windows) == SMALL.num_trainings * scenario.config.num_windows


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_searched(scenario: Scenario, name: str) -> None:
    stated = dataclasses.replace(scenario.config.task, reference="0.9").with_keep(0.9)
    point = search_recipe(
        RECIPES[name],
        [scenario],
        SearchConfig(2, 2, 1, 2),
        generator(0),
        tasks=[stated],
        options=RunOptions(GuardConfig()),
    )
    assert point.shape == (RECIPES[name].num_axes,)


def test_searches_without_a_candidate_are_refused(scenario: Scenario) -> None:
    with pytest.raises(UserError, match="search: got a number below 1"):
        search_setting([scenario], SearchConfig(num_settings=0), generator(0))
