import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlkd.agents.baselines import teacher_weights
from rlkd.agents.baselines.methods import Request, build_methods, total_trainings
from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.baselines.teacher_weights import (
    SPREAD,
    TeacherWeightsConfig,
    direction,
    learn_teacher_weights,
    weighing,
)
from rlkd.agents.evaluation.held_out import asked_goals, run_methods
from rlkd.agents.policy.controllers import Controller, RunOptions, hold_start
from rlkd.agents.policy.policy import Policy, actor_shapes
from rlkd.data import Preference, Range, TaskDistribution
from rlkd.envs import Scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.students import TrainConfig

SEARCH = SearchConfig(num_settings=2, tasks_per_setting=2, num_finalists=1, tasks_per_finalist=2)
SMALL = TeacherWeightsConfig(num_iterations=2, num_groups=2, group_size=2)


@pytest.fixture(scope="module")
def scenario(scenario: Scenario) -> Scenario:
    """Two windows of three steps, three teachers a task."""
    task = dataclasses.replace(scenario.config.task, num_teachers=Range(3, 3)).with_preference(Preference(0.6))
    config = dataclasses.replace(scenario.config, num_windows=2, train=TrainConfig(steps_per_window=3), task=task)
    return dataclasses.replace(scenario, config=config)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_direction_by_hand() -> None:
    drawn = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, 0, 0]])
    gain = torch.tensor([0.3, 0.1, 5.0, 5.2])  # advantages 0.2, -0.2, -0.2, 0.2: groups do not mix
    deviation = 0.2 * (4 / 3) ** 0.5
    expected = torch.tensor([(0.2 + 0.2) / 4, -0.4 / 4, 0.0]) / deviation
    torch.testing.assert_close(direction(drawn, gain, 2), expected)
    assert torch.equal(direction(drawn, torch.ones(4), 2), torch.zeros(3))


def test_it_finds_the_weights_that_gain_most(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    best = torch.tensor([0.5, -2.0, 3.0])
    theta: list[Tensor] = []
    monkeypatch.setattr(teacher_weights, "weighing", lambda base, given: theta.append(given))

    def gains(_: Scenario, __: object, seeds: list[int], *rest: object, **more: object) -> Tensor:
        of_task = torch.tensor([float(seed % 7) for seed in seeds])  # the same for a whole group
        return of_task - ((theta[-1] - best) / torch.tensor(SPREAD)).square().sum(-1)

    monkeypatch.setattr(teacher_weights, "_gains", gains)
    config = TeacherWeightsConfig(num_iterations=40, num_groups=64)
    found = learn_teacher_weights(scenario, config, scenario.config.task, base=hold_start, generator=generator())
    assert ((found - best) / torch.tensor(SPREAD)).abs().max() < 0.3


def test_learning_moves_the_weights_and_a_journal_remembers_them(scenario: Scenario, tmp_path: Path) -> None:
    counted: list[int] = []
    theta = learn_teacher_weights(
        scenario,
        SMALL,
        scenario.config.task,
        base=hold_start,
        generator=generator(),
        options=RunOptions(on_window=counted.append),
    )
    assert theta.shape == (3,)
    assert theta.abs().min() > 0
    assert sum(counted) == SMALL.num_trainings * scenario.config.num_windows
    first = Journal(tmp_path, False, 1)
    again = learn_teacher_weights(
        scenario, SMALL, scenario.config.task, base=hold_start, generator=generator(), options=RunOptions(journal=first)
    )
    assert torch.equal(again, theta)
    resumed, counted = Journal(tmp_path, True, 1), []
    known = learn_teacher_weights(
        scenario,
        SMALL,
        scenario.config.task,
        base=hold_start,
        generator=generator(),
        options=RunOptions(None, counted.append, resumed),
    )
    assert torch.equal(known, theta)
    assert not counted


def test_only_weights_differ_from_the_base(scenario: Scenario) -> None:
    episodes = Episodes(scenario, 2)
    observation = episodes.reset([1, 2])
    controller = weighing(hold_start, torch.tensor([1.0, 2.0, -3.0]))
    assert torch.equal(controller(observation, episodes, 0), episodes.start)
    plain = Episodes(scenario, 2)
    plain.reset([1, 2])
    weighed, mean = (e.step(e.start).telemetry.losses for e in (episodes, plain))
    assert (weighed[:, 1] != mean[:, 1]).all()  # the response loss


def test_rlkd_compare_knows_it_and_counts_what_it_costs(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.agents.baselines.methods.TeacherWeightsConfig", lambda: SMALL)
    counted: list[int] = []
    request = Request(scenario, scenario.config.task, (2**60, 2**60 + 1), SEARCH, 0, counted.append)
    names, goals = ["constant", "mtkd_rl"], asked_goals(scenario.config.task, (), (0.6,))
    (table,) = run_methods(names, request, goals).values()
    assert (table["mtkd_rl"].score != table["constant"].score).any()
    assert sum(counted) == total_trainings(names, 2, SEARCH) * scenario.config.num_windows


def test_weights_are_learned_under_what_they_are_held_with(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[Controller] = []

    def learn(*_: object, base: Controller, **__: object) -> Tensor:
        bases.append(base)
        return torch.ones(3)

    monkeypatch.setattr("rlkd.agents.baselines.methods.learn_teacher_weights", learn)
    weights = {name: torch.zeros(shape) for name, shape in actor_shapes(4).items()}
    weights["action.bias"] += 0.5
    size = len(OBSERVATIONS)
    policy = Policy(weights, torch.zeros(size), torch.ones(size), scenario.start, scenario.config.controls)
    seeds = (2**60, 2**60 + 1)
    request = Request(scenario, scenario.config.task, seeds, SEARCH, 0, lambda count: None, policy=policy)
    built = build_methods(["mtkd_rl", "policy_mtkd_rl"], request)
    episodes = Episodes(scenario, 2)
    observation = episodes.reset(seeds)
    for (name, controller), base in zip(built.items(), bases, strict=True):
        assert torch.equal(controller(observation, episodes, 0), base(observation, episodes, 0)), name
    of_constant, of_policy = (base(observation, episodes, 0) for base in bases)
    assert torch.equal(of_constant, request.tuned("constant").expand(2, -1))
    assert torch.equal(of_policy, policy.controller()(observation, episodes, 0))
    assert not torch.equal(of_constant, of_policy)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="teacher weights: got group_size 1"):
        TeacherWeightsConfig(group_size=1).check()
    assert TaskDistribution().num_teachers == Range(1.0, 1.0)
