import dataclasses

import numpy as np
import pytest
import torch
from planned import network_plan
from rlkd.envs.schedule import fixed_plan

from rlkd.agents.baselines.methods import (
    METHODS,
    NEED_POLICY,
    SEARCHES,
    SWITCHES,
    Request,
    _preference,
    build_methods,
    mean_positions,
    num_trainings,
    total_trainings,
)
from rlkd.agents.baselines.pbt import PBTConfig
from rlkd.agents.baselines.search import SearchConfig, Shortlist
from rlkd.agents.baselines.task_search import search_tasks
from rlkd.agents.evaluation.held_out import held_out_seeds, run_methods, stream_seed
from rlkd.agents.policy.controllers import hold_start, run
from rlkd.agents.policy.policy import TENSORS, Policy
from rlkd.data import Preference
from rlkd.envs import CONTROLS, OBSERVATIONS, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.errors import UserError
from rlkd.students import TrainConfig

SEEDS = (2**60 + 1, 2**60 + 2)
SEARCH = SearchConfig(num_settings=3, tasks_per_setting=2, num_finalists=2, tasks_per_finalist=3)
CHEAP = [name for name in METHODS if SEARCHES.get(name, ("", "", 10))[2] == 10]


@pytest.fixture(scope="module")
def asked(scenario: Scenario) -> Request:
    """Two windows of one step, looked at on 50 samples, and a policy that nobody trained."""
    config = dataclasses.replace(scenario.config, num_windows=2, train=TrainConfig(1, 8))
    splits = {name: index if name == "train" else index[:50] for name, index in scenario.data.splits.items()}
    g = torch.Generator().manual_seed(0)
    shapes = ((8, len(OBSERVATIONS)), (8,), (8, 8), (8,), (9, 8), (9,))
    weights = {name: torch.randn(shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    static = Shortlist(torch.tensor([[0.7] * 9, [0.4] * 9]), torch.tensor([[0.9, 0.1, 0.1], [0.6, 0.8, 0.8]]))
    spread = torch.ones(len(OBSERVATIONS))
    plan = fixed_plan(torch.full((1, 9), 0.5))
    policy = Policy(weights, 0 * spread, spread, plan, static, config.controls)
    quick = dataclasses.replace(
        scenario, config=config, plan=plan, data=dataclasses.replace(scenario.data, splits=splits)
    )
    tasks = config.task.with_preference(Preference(0.6))
    return Request(quick, tasks, SEEDS, static, policy, SEARCH, 5, lambda n: None)


def begun(asked: Request, num_students: int = 2) -> tuple[torch.Tensor, Episodes]:
    episodes = Episodes(asked.scenario, num_students, asked.tasks)
    return episodes.reset([2**60 + 1 + i for i in range(num_students)]), episodes


def test_every_method_runs_and_its_trainings_are_counted(asked: Request) -> None:
    windows: list[int] = []
    table = run_methods(CHEAP, dataclasses.replace(asked, on_window=windows.append), (0.6,))[0.6]
    assert list(table) == CHEAP
    for name, results in table.items():
        assert results.score.shape == (2,), name
        assert np.isfinite(results.score).all(), name
        assert not results.diverged.any(), name
    tuned = 2 * SEARCH.num_trainings  # linear and cosine
    assert sum(windows) == 2 * (total_trainings(CHEAP, 2) + tuned)
    assert len({tuple(results.score) for results in table.values()}) > len(CHEAP) / 2


@pytest.mark.parametrize(
    ("names", "by_hand"),
    [
        (["static", "published", "ctkd"], 3 * 2),
        (["random_10", "random_25", "tpe_10"], (25 + 10) * 2 + 3 * 2),
        (["linear"], 2),  # found once for all preferences: 3 * 2 + 2 * 3 more
        (["open_loop", "mean_action"], 128 + 2 * 2),
    ],
)
def test_trainings_by_hand(asked: Request, names: list[str], by_hand: int) -> None:
    windows: list[int] = []
    run_methods(names, dataclasses.replace(asked, on_window=windows.append), (0.6,))
    assert total_trainings(names, 2) == by_hand
    assert sum(windows) == 2 * (by_hand + SEARCH.num_trainings * ("linear" in names))


def test_trainings_of_the_dear_ones() -> None:
    assert total_trainings(["random_100", "tpe_linear_100", "tpe_linear_50"], 3) == 200 * 3 + 3 * 3
    assert total_trainings(["pbt", "cosine"], 3) == 32 * (8 + 32) + 2 * 3
    assert PBTConfig().num_trainings == 1280
    assert {name: num_trainings(name) for name in ("tpe_25", "random_100", "tpe_linear_10", "pbt", "static")} == {
        "tpe_25": 25,
        "random_100": 100,
        "tpe_linear_10": 10,
        "pbt": 1,
        "static": 1,
    }
    assert set(SEARCHES) | set(NEED_POLICY) <= set(METHODS)


def test_a_policy_is_asked_for_by_name(asked: Request) -> None:
    blind = dataclasses.replace(asked, policy=None)
    for name in NEED_POLICY:
        with pytest.raises(UserError, match=f"{name} needs a policy"):
            build_methods(["static", name], blind)
    assert set(build_methods(["static", "ctkd"], blind)) == {"static", "ctkd"}


@pytest.mark.parametrize("name", SWITCHES)
def test_without_a_control_it_is_as_static_and_the_others_are_the_policys(asked: Request, name: str) -> None:
    built = build_methods(["policy", f"without_{name}", "static"], asked)
    observation, episodes = begun(asked)
    full, rest, static = (controller(observation, episodes, 0) for controller in built.values())
    off = [CONTROLS.index(control) for control in SWITCHES[name]]
    on = [i for i in range(9) if i not in off]
    assert torch.equal(rest[:, off], static[:, off])
    assert torch.equal(rest[:, on], full[:, on])
    assert not torch.equal(full[:, off], rest[:, off])


def test_blind_methods_replay_the_policys_mean_schedule(asked: Request) -> None:
    built = build_methods(["open_loop", "mean_action"], asked)
    positions = mean_positions(asked)  # [2, 9]
    assert not torch.allclose(positions[0], positions[1], atol=1e-3)
    thrifty = dataclasses.replace(asked, tasks=asked.tasks.with_preference(Preference(0.3)))
    assert not torch.allclose(positions, mean_positions(thrifty), atol=1e-2)  # of that preference's policy
    observation, episodes = begun(asked)
    for window in range(2):
        for seen in (observation, 0 * observation):
            position = built["open_loop"](seen, episodes, window)
            torch.testing.assert_close(position, positions[window].expand(2, 9))
            held = built["mean_action"](seen, episodes, window)
            torch.testing.assert_close(held, positions.mean(0).expand(2, 9))
    # in the first window a policy sees what a reset shows: its mean over as many tasks of the same preference
    many, fresh = begun(asked, 100)
    mean = build_methods(["policy"], asked)["policy"](many, fresh, 0).mean(0)
    torch.testing.assert_close(mean, positions[0], atol=0.05, rtol=0)


def test_a_plan_at_the_start_is_never_revised(asked: Request) -> None:
    policy = dataclasses.replace(asked.policy, plan=network_plan((0.0, 0.5), 2))
    planned = dataclasses.replace(asked, policy=policy, scenario=dataclasses.replace(asked.scenario, plan=policy.plan))
    built = build_methods(["plan", "plan_at_start"], planned)
    observation, episodes = begun(planned)
    first = {name: controller(observation, episodes, 0) for name, controller in built.items()}
    assert torch.equal(first["plan"], first["plan_at_start"])
    outcome = episodes.step(first["plan"])
    decided = policy.plan.networks[0].decide(observation)  # [2, 2, 9]
    assert torch.equal(built["plan_at_start"](outcome.observation, episodes, 1), decided[:, 1])
    assert not torch.equal(built["plan"](outcome.observation, episodes, 1), decided[:, 1])


def test_a_random_policy_moves_within_a_step_of_the_start(asked: Request) -> None:
    observation, episodes = begun(asked)
    controller = build_methods(["random_policy"], asked)["random_policy"]
    one, two = (controller(observation, episodes, 0) for _ in range(2))
    assert not torch.equal(one, two)
    assert (torch.stack([one, two]) - 0.5).abs().max() <= asked.scenario.config.controls.step
    again = build_methods(["random_policy"], asked)["random_policy"](observation, episodes, 0)
    assert torch.equal(one, again)


def test_budgets_of_one_search_are_its_first_trials(asked: Request) -> None:
    built = build_methods(["random_25", "random_10"], asked)
    observation, episodes = begun(asked)
    torch.testing.assert_close(_preference(asked), torch.tensor([[0.6, 0.3, 0.1]]))
    first = asked.static.points[1]  # 0.68 under (0.6, 0.3, 0.1), the other 0.58
    alone = search_tasks(asked.scenario, SEEDS, asked.tasks, "random", "static", 25, first, asked.seed)
    for name, controller in built.items():
        position = controller(observation, episodes, 1)
        assert torch.equal(position, alone.best(SEARCHES[name][2])(observation, episodes, 1)), name
    assert (alone.score.argmax(1) >= 10).any()  # else both budgets would end alike


def test_every_method_has_a_random_source_of_its_own(asked: Request) -> None:
    sources = [asked.generator(name).initial_seed() for name in METHODS]
    assert len(set(sources)) == len(METHODS)
    other = dataclasses.replace(asked, seed=asked.seed + 1)
    assert not set(sources) & {other.generator(name).initial_seed() for name in METHODS}


def test_each_preference_is_scored_as_such_on_the_same_tasks(asked: Request) -> None:
    tables = run_methods(["static", "published"], asked, (0.9, 0.3))
    assert list(tables) == [0.9, 0.3]
    for weight, table in tables.items():
        for results in table.values():
            cost = 0.75 * results.latency_ratio + 0.25 * results.energy_ratio
            by_hand = weight * results.accuracy + (1 - weight) * (1 - cost)
            np.testing.assert_allclose(results.score, by_hand, atol=1e-6)
    # what does not look at the preference trains the same students
    np.testing.assert_array_equal(tables[0.9]["published"].accuracy, tables[0.3]["published"].accuracy)
    # and the shortlist's plan follows it: the first is better for 0.9, the second, which prunes more, for 0.3
    assert (tables[0.9]["static"].macs_ratio > tables[0.3]["static"].macs_ratio).all()


def test_held_out_tasks_repeat_and_are_apart_from_training(asked: Request) -> None:
    seeds = held_out_seeds(3, 50)
    assert seeds == held_out_seeds(3, 50)
    assert seeds[:10] == held_out_seeds(3, 10)
    assert len(set(seeds) | set(held_out_seeds(4, 50))) == 100
    assert min(seeds) >= 2**60
    assert max(seeds) * 3 + 2 < 2**63  # a task's generators take three seeds each
    streams = [stream_seed(seed, stream) for seed in range(5) for stream in range(1, 7)]
    assert len(set(streams)) == 30


def test_tuned_exits_are_never_worse_on_validation_and_reach_the_table(asked: Request) -> None:
    plain, tuned = (
        run(asked.scenario, hold_start, SEEDS, asked.tasks, final_split="validation", tune_exit=t)
        for t in (False, True)
    )
    assert (tuned.score >= plain.score).all()
    table = run_methods(["static"], asked, (0.6,), tune_exit=True)[0.6]["static"]
    by_hand = run(asked.scenario, asked.static.controller(), SEEDS, asked.tasks, tune_exit=True)
    np.testing.assert_array_equal(table.score, by_hand.score)
