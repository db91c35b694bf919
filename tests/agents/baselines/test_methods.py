import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from rlkd.agents.baselines.methods import (
    METHODS,
    SWITCHES,
    Request,
    build_methods,
    mean_controls,
    total_trainings,
)
from rlkd.agents.baselines.pbt import PBTConfig
from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.evaluation.held_out import asked_goals, held_out_seeds, run_methods, stream_seed
from rlkd.agents.policy.controllers import Results, RunOptions, hold_start, run
from rlkd.agents.policy.policy import Policy, actor_shapes
from rlkd.data import Preference
from rlkd.envs import CONTROLS, OBSERVATIONS, Scenario
from rlkd.envs.action import published_setting
from rlkd.envs.episodes import Episodes
from rlkd.envs.references import References
from rlkd.errors import UserError
from rlkd.students import TrainConfig
from rlkd.workers import IN_PROCESS
from rlkd.workers.processes import ProcessWorkers

SEEDS = (2**60 + 1, 2**60 + 2)
SEARCH = SearchConfig(num_settings=2, tasks_per_setting=2, num_finalists=2, tasks_per_finalist=3)
DEAR = ("pbt", "mtkd_rl", "policy_mtkd_rl")  # tested on their own
CHEAP = [name for name, m in METHODS.items() if m.trainings_per_task <= 10 and name not in DEAR]


def policy_of(scenario: Scenario, seed: int = 0) -> Policy:
    """Nobody trained it."""
    g = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=g) for name, shape in actor_shapes(8).items()}
    spread = torch.ones(len(OBSERVATIONS))
    start = torch.full((12,), 0.5) + 0.1 * seed
    return Policy(weights, 0 * spread, spread, start, scenario.config.controls)


@pytest.fixture(scope="module")
def asked(scenario: Scenario) -> Request:
    """Two windows of one step, looked at on 50 samples, floors in shares of a stated accuracy."""
    task = dataclasses.replace(scenario.config.task, reference="0.5")
    config = dataclasses.replace(scenario.config, num_windows=2, train=TrainConfig(1, 8), task=task)
    splits = {name: index if name == "train" else index[:50] for name, index in scenario.data.splits.items()}
    policy = policy_of(scenario)
    quick = dataclasses.replace(
        scenario, config=config, start=policy.start, data=dataclasses.replace(scenario.data, splits=splits)
    )
    blind = policy_of(scenario, 1)
    return Request(quick, task.with_keep(0.9), SEEDS, SEARCH, 5, lambda n: None, policy=policy, blind=blind)


def table_of(names: list[str], asked: Request, **changes: object) -> dict[str, Results]:
    request = dataclasses.replace(asked, found={}, **changes)  # type: ignore[arg-type]
    (table,) = run_methods(names, request, asked_goals(asked.scenario.config.task, (0.9,), ())).values()
    return table


def begun(asked: Request, num_students: int = 2) -> tuple[torch.Tensor, Episodes]:
    episodes = Episodes(asked.scenario, num_students, asked.tasks)
    return episodes.reset([2**60 + 1 + i for i in range(num_students)]), episodes


@pytest.mark.slow
def test_every_method_runs_under_a_floor_and_its_trainings_are_counted(asked: Request) -> None:
    windows: list[int] = []
    table = table_of(CHEAP, asked, on_window=windows.append)
    assert list(table) == CHEAP
    for name, results in table.items():
        assert results.score.shape == (2,), name
        assert np.isfinite(results.score).all(), name
        assert results.floor.tolist() == pytest.approx([0.45, 0.45])
        assert not results.diverged.any(), name
    assert sum(windows) == 2 * total_trainings(CHEAP, 2, SEARCH)


@pytest.mark.parametrize(
    ("names", "by_hand"),
    [
        (["dense", "annealed"], 2 * 2),
        (["constant", "ctkd", "hypergradient"], 10 + 3 * 2),
        (["nncf"], 10 + 10 + 2),  # beginning with the best constant setting
        (["random_10", "random_25", "tpe_10"], 10 + (25 + 10) * 2 + 3 * 2),
        (["open_loop", "mean_action"], 128 + 2 * 2),
    ],
)
def test_trainings_by_hand(names: list[str], by_hand: int) -> None:
    assert SEARCH.num_trainings == 10
    assert total_trainings(names, 2, SEARCH) == by_hand


def test_trainings_of_the_dear_ones() -> None:
    assert total_trainings(["random_100", "tpe_linear_100", "tpe_linear_50"], 3, SEARCH) == 10 + 200 * 3 + 3 * 3
    assert total_trainings(["pbt", "cosine"], 3, SEARCH) == 10 + 10 + 32 * (8 + 32) + 2 * 3
    assert PBTConfig().num_trainings == 1280
    spent = {n: METHODS[n].trainings_per_task for n in ("tpe_25", "random_100", "tpe_two_phase_50", "pbt", "nncf")}
    assert spent == {"tpe_25": 25, "random_100": 100, "tpe_two_phase_50": 50, "pbt": 1, "nncf": 1}


def test_a_policy_is_asked_for_by_name(asked: Request) -> None:
    without = dataclasses.replace(asked, policy=None, blind=None, found={})
    for name, method in METHODS.items():
        for need in ("policy", "blind"):
            if need in method.needs:
                with pytest.raises(UserError, match=f"{name} needs a (blind )?policy; give its folder with --{need}"):
                    build_methods(["dense", name], without)
    with pytest.raises(UserError, match="mtkd_rl needs several teachers"):
        build_methods(["mtkd_rl"], asked)
    assert set(build_methods(["constant", "ctkd"], without)) == {"constant", "ctkd"}


def test_the_blind_policy_begins_with_its_own_start(asked: Request) -> None:
    assert asked.blind is not None
    other = dataclasses.replace(asked.scenario, start=asked.blind.start)
    by_hand = run(other, asked.blind.controller(), SEEDS, asked.tasks, options=RunOptions(asked.guard))
    np.testing.assert_array_equal(table_of(["blind"], asked)["blind"].score, by_hand.score)


@pytest.mark.parametrize("name", SWITCHES)
def test_without_a_control_it_is_as_constant_and_the_others_are_the_policys(asked: Request, name: str) -> None:
    built = build_methods(["policy", f"without_{name}", "constant"], asked)
    observation, episodes = begun(asked)
    full, rest, constant = (controller(observation, episodes, 0) for controller in built.values())
    off = [i for i, control in enumerate(CONTROLS) if control in SWITCHES[name]]
    on = [i for i in range(12) if i not in off]
    assert torch.equal(rest[:, off], constant[:, off])
    assert torch.equal(rest[:, on], full[:, on])
    assert not torch.equal(full[:, off], rest[:, off])


def test_blind_schedules_are_the_policys_mean_controls(asked: Request) -> None:
    built = build_methods(["open_loop", "mean_action", "start"], asked)
    controls = mean_controls(asked)  # [2, 12]
    assert not torch.allclose(controls[0], controls[1], atol=1e-3)
    observation, episodes = begun(asked)
    for window in range(2):
        for seen in (observation, 0 * observation):
            torch.testing.assert_close(built["open_loop"](seen, episodes, window), controls[window].expand(2, 12))
            torch.testing.assert_close(built["mean_action"](seen, episodes, window), controls.mean(0).expand(2, 12))
            assert torch.equal(built["start"](seen, episodes, window), asked.scenario.start.expand(2, 12))
    # in the first window a policy sees what a reset shows: its mean over as many tasks of the same goal
    many, fresh = begun(asked, 100)
    mean = build_methods(["policy"], asked)["policy"](many, fresh, 0).mean(0)
    torch.testing.assert_close(mean, controls[0], atol=0.05, rtol=0)


def test_a_random_policy_moves_within_a_step_of_the_controls_now(asked: Request) -> None:
    observation, episodes = begun(asked)
    controller = build_methods(["random_policy"], asked)["random_policy"]
    one, two = (controller(observation, episodes, 0) for _ in range(2))
    assert not torch.equal(one, two)
    moved = (torch.stack([one, two]) - episodes.u)[..., :-3]
    assert moved.abs().max() <= asked.scenario.config.controls.step + 1e-6
    again = build_methods(["random_policy"], asked)["random_policy"](observation, episodes, 0)
    assert torch.equal(one, again)


def test_what_several_methods_share_is_found_once(asked: Request) -> None:
    windows: list[int] = []
    request = dataclasses.replace(asked, found={}, on_window=windows.append)
    build_methods(["constant", "ctkd", "fewer_features", "random_10"], request)
    assert sum(windows) == 2 * (SEARCH.num_trainings + 10 * 2)


def test_every_purpose_has_a_random_source_of_its_own(asked: Request) -> None:
    sources = [asked.generator(name).initial_seed() for name in METHODS]
    assert len(set(sources)) == len(METHODS)
    other = dataclasses.replace(asked, seed=asked.seed + 1)
    assert not set(sources) & {other.generator(name).initial_seed() for name in METHODS}


def test_each_goal_is_scored_as_such_on_the_same_tasks(asked: Request) -> None:
    goals = asked_goals(asked.scenario.config.task, (0.5, 1.2), (0.9,))
    assert [goal.name for goal in goals] == ["keep 0.5", "keep 1.2", "accuracy weight 0.9"]
    request = dataclasses.replace(asked, guard=None)
    tables = run_methods(["dense"], request, goals)
    lax, strict, weighed = (tables[goal.name]["dense"] for goal in goals)
    np.testing.assert_array_equal(lax.accuracy, strict.accuracy)  # the same students
    for floor, results in ((0.25, lax), (0.6, strict)):
        saved = 1 - 0.75 * results.latency_ratio - 0.25 * results.energy_ratio
        by_hand = saved - np.minimum(2.0, 10 * np.maximum(0.0, floor - results.accuracy))
        np.testing.assert_allclose(results.score, by_hand, atol=1e-5)
    assert weighed.floor.tolist() == [0.0, 0.0]
    assert weighed.goal_met.all()
    np.testing.assert_allclose(weighed.score, 0.9 * weighed.accuracy, atol=0.1)


def test_dense_is_the_published_setting(asked: Request) -> None:
    observation, episodes = begun(asked)
    u = build_methods(["dense"], asked)["dense"](observation, episodes, 1)
    assert torch.equal(u, published_setting(asked.scenario.config.controls).expand(2, -1))


def test_held_out_tasks_repeat_and_are_apart_from_training(asked: Request) -> None:
    seeds = held_out_seeds(3, 50)
    assert seeds == held_out_seeds(3, 50)
    assert seeds[:10] == held_out_seeds(3, 10)
    assert len(set(seeds) | set(held_out_seeds(4, 50))) == 100
    assert min(seeds) >= 2**60
    assert max(seeds) * 3 + 2 < 2**63  # a task's generators take three seeds each
    streams = [stream_seed(seed, stream) for seed in range(5) for stream in range(1, 7)]
    assert len(set(streams)) == 30


def test_tuned_exits_are_never_worse_on_validation(asked: Request) -> None:
    tasks = asked.scenario.config.task.with_preference(Preference(0.6))
    plain, tuned = (
        run(asked.scenario, hold_start, SEEDS, tasks, final_split="validation", tune_exit=t) for t in (False, True)
    )
    assert (tuned.score >= plain.score).all()


@pytest.mark.slow
def test_a_comparison_with_its_searches_does_not_depend_on_the_workers(asked: Request) -> None:
    """Searches of recipes, per-task searches, controllers that learn on the way, and the policy."""
    names = ["policy", "constant", "nncf", "cubic", "open_loop", "ctkd", "hypergradient", "tpe_10", "random_10"]
    tables = []
    for num_workers in (0, 2):
        fresh = dataclasses.replace(asked.scenario, known=References())  # references are trained again
        with ProcessWorkers(num_workers) if num_workers else contextlib.nullcontext(IN_PROCESS) as workers:
            tables.append(table_of(names, asked, scenario=fresh, workers=workers))
    alone, shared = tables
    for name in names:
        for field in dataclasses.fields(Results):
            a, b = (getattr(table[name], field.name) for table in (alone, shared))
            np.testing.assert_array_equal(a, b, err_msg=f"{name}: {field.name}")
    assert len({tuple(alone[name].score) for name in names}) > 4  # the methods differ
