import dataclasses

import pytest
import torch

from rlkd.agents.baselines.schedules import to_plan
from rlkd.agents.baselines.search import SearchConfig, Shortlist, search_plans
from rlkd.envs import OBSERVATIONS, Scenario
from rlkd.envs.action import published_setting
from rlkd.envs.episodes import Episodes

SMALL = SearchConfig(num_settings=6, tasks_per_setting=4, num_finalists=2, tasks_per_finalist=5)


def test_the_best_plan_follows_the_preference(scenario: Scenario) -> None:
    static = Shortlist(torch.stack([torch.zeros(9), torch.ones(9)]), torch.tensor([[0.9, 0.0, 0.0], [0.7, 0.5, 0.5]]))
    # 0.9 w against 0.7 w + 0.5 (1 - w): the first wins above w = 5/7
    wanted = torch.tensor([[0.8, 0.15, 0.05], [0.6, 0.3, 0.1]])
    assert static.best(wanted)[:, 0].tolist() == [0.0, 1.0]
    observation = torch.zeros(2, len(OBSERVATIONS))
    first = OBSERVATIONS.index("preference_accuracy")
    observation[:, first : first + 3] = wanted
    assert static.controller()(observation, Episodes(scenario, 2), 0)[:, 0].tolist() == [0.0, 1.0]


def test_search_repeats_counts_its_cost_and_tries_the_published_setting_first(scenario: Scenario) -> None:
    windows: list[int] = []
    one = search_plans([scenario], SMALL, torch.Generator().manual_seed(4), windows.append)
    two = search_plans([scenario], SMALL, torch.Generator().manual_seed(4))
    assert torch.equal(one.points, two.points)
    assert torch.equal(one.terms, two.terms)
    assert sum(windows) == SMALL.num_trainings * scenario.config.num_windows == (24 + 10) * 4
    alone = search_plans([scenario], SearchConfig(1, 2, 1, 2), torch.Generator().manual_seed(0))
    assert torch.equal(alone.points[0], published_setting(scenario.config.controls))


def test_search_never_reads_the_test_split(scenario: Scenario) -> None:
    labels = scenario.data.labels.clone()
    labels[scenario.data.splits["test"]] = 0
    blind = dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, labels=labels))
    one, two = (search_plans([w], SMALL, torch.Generator().manual_seed(1)) for w in (scenario, blind))
    assert torch.equal(one.terms, two.terms)


def test_search_improves_on_its_first_setting(scenario: Scenario) -> None:
    config = SearchConfig(num_settings=25, tasks_per_setting=8, num_finalists=3, tasks_per_finalist=8)
    found = search_plans([scenario], config, torch.Generator().manual_seed(2))
    first = search_plans([scenario], SearchConfig(1, 8, 1, 8), torch.Generator().manual_seed(2))
    wanted = torch.tensor([[0.6, 0.3, 0.1]])
    assert float((wanted @ found.terms.T).max()) > float((wanted @ first.terms.T).max()) + 0.05


def test_plans_go_from_the_first_setting_to_the_last() -> None:
    point = torch.cat([torch.zeros(9), torch.ones(9)])
    assert to_plan(point, "linear", 5)[:, 3].tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert to_plan(point, "cosine", 5)[:, 3].tolist() == pytest.approx([0.0, 0.1464, 0.5, 0.8536, 1.0], abs=1e-4)
    assert torch.equal(to_plan(torch.full((2, 9), 0.3), "static", 4), torch.full((2, 4, 9), 0.3))
