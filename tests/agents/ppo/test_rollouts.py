"""Rollouts as pieces of work: the floats of SB3's own loop, whoever does them, in whatever order."""

import dataclasses
import os
import signal
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList

from rlkd.agents.policy.controllers import RunOptions
from rlkd.agents.policy.policy import Policy
from rlkd.agents.ppo.rollouts import Collector, RolloutEnv, RolloutPPO
from rlkd.agents.ppo.train import Learned, Listeners, PPOConfig, Rollout, new_agent, task_pool, train
from rlkd.envs import OBSERVATIONS, DistillationVectorEnv, Scenario
from rlkd.envs.prepare import Group, train_missing
from rlkd.envs.references import References
from rlkd.envs.sb3 import SB3VecEnv
from rlkd.workers import WorkersConfig, open_workers
from rlkd.workers.processes import ProcessWorkers

SIZES = {"num_students": 6, "num_tasks": 6, "batch_size": 8, "num_epochs": 1, "hidden": 8, "num_evaluation_tasks": 3}
CONFIG = PPOConfig(**SIZES, num_iterations=2, evaluate_every=2)


@pytest.fixture(scope="module")
def collectors(goal_scenario: Scenario, other_scenario: Scenario) -> list[Collector]:
    mean, deviation = np.zeros(len(OBSERVATIONS), dtype=np.float32), np.ones(len(OBSERVATIONS), dtype=np.float32)
    scenarios = (goal_scenario, other_scenario)
    pools = [task_pool(0, k, 6) for k in range(2)]
    train_missing([Group(s, pool, s.config.task) for s, pool in zip(scenarios, pools, strict=True)])
    return [Collector(s, pool, mean, deviation) for s, pool in zip(scenarios, pools, strict=True)]


def rollout_env(collectors: list[Collector], chunk_students: int = 128) -> RolloutEnv:
    return RolloutEnv(collectors, 6, 3, chunk_students=chunk_students, on_window=lambda n: None)


def filled(agent: PPO) -> dict[str, np.ndarray]:
    """The buffer after two rollouts without an update in between."""
    _, callback = agent._setup_learn(10_000, CallbackList([]))
    for _ in range(2):
        assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)  # type: ignore[arg-type]
    names = ("observations", "actions", "rewards", "values", "log_probs", "episode_starts", "advantages", "returns")
    arrays = {name: getattr(agent.rollout_buffer, name).copy() for name in names}
    return {**arrays, "ends": np.array([[e["r"], e["l"]] for e in agent.ep_info_buffer or ()])}


def test_a_rollout_holds_the_floats_of_sb3s_own_loop(collectors: list[Collector]) -> None:
    env = rollout_env(collectors)
    ours = new_agent(env, CONFIG, env.num_steps, 4)
    populations = [
        DistillationVectorEnv(6, scenario=c.scenario, pool=c._pool, restart_together=True) for c in collectors
    ]
    stepped = SB3VecEnv(populations, collectors[0]._mean, collectors[0]._deviation, 3)
    theirs = new_agent(stepped, CONFIG, stepped.num_steps, 4)
    theirs.collect_rollouts = lambda *a: PPO.collect_rollouts(theirs, *a)  # type: ignore[method-assign]
    for agent in (ours, theirs):  # an untrained head acts alike whatever it sees
        torch.nn.init.normal_(agent.policy.action_net.weight, std=0.5, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    first = filled(seeded(ours))
    second = filled(seeded(theirs))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    assert first["rewards"].any()
    assert len(first["ends"]) == 2 * 2 * 6


def seeded(agent: RolloutPPO) -> RolloutPPO:
    agent.set_random_seed(4)
    return agent


def test_a_student_that_ends_early_begins_anew_and_is_cut_off_with_the_others(collectors: list[Collector]) -> None:
    """An exploding learning rate; the value of what a cut-off student sees joins its last reward, as in SB3."""
    scenario = collectors[0].scenario
    wild = dataclasses.replace(
        scenario.config, controls=dataclasses.replace(scenario.config.controls, learning_rate=(1e18, 1e20))
    )
    hot = dataclasses.replace(scenario, config=wild, known=References())
    pool = task_pool(0, 0, 6)
    train_missing([Group(hot, pool, hot.config.task)])
    hot_collectors = [Collector(hot, pool, collectors[0]._mean, collectors[0]._deviation)]
    env = rollout_env(hot_collectors)
    ours = filled(seeded(new_agent(env, CONFIG, env.num_steps, 4)))
    stepped = SB3VecEnv(
        [DistillationVectorEnv(6, scenario=hot, pool=pool, restart_together=True)],
        collectors[0]._mean,
        collectors[0]._deviation,
        3,
    )
    agent = new_agent(stepped, CONFIG, stepped.num_steps, 4)
    agent.collect_rollouts = lambda *a: PPO.collect_rollouts(agent, *a)  # type: ignore[method-assign]
    theirs = filled(seeded(agent))
    assert (ours["ends"][:, 1] < scenario.config.num_windows).any()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def learned(
    scenarios: list[Scenario], validation: list[Scenario], options: RunOptions, kill: ProcessWorkers | None = None
) -> tuple[Learned, list[Rollout], int]:
    """Train from scenarios without any reference; kill a worker after the first window that is reported."""
    anew = [[dataclasses.replace(s, known=References()) for s in group] for group in (scenarios, validation)]
    rollouts: list[Rollout] = []
    counted = 0

    def on_window(num_students: int) -> None:
        nonlocal counted
        counted += num_students
        if kill is not None and len(rollouts) == 1:
            os.kill(kill.pids[counted % len(kill.pids)], signal.SIGKILL)

    now: list[Callable[[], Policy]] = []
    listeners = Listeners(on_window, lambda rollout, logger: rollouts.append(rollout), on_agent=now.append)
    done = train(anew[0], CONFIG, 5, listeners=listeners, validation=anew[1], options=options)
    return dataclasses.replace(done, policy=now[0]()), rollouts, counted  # the last policy: the best may be the first


@pytest.fixture(scope="module")
def alone(goal_scenario: Scenario, other_scenario: Scenario) -> tuple[Learned, list[Rollout], int]:
    return learned([goal_scenario, other_scenario], [other_scenario], RunOptions(num_parallel=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "kill"),
    [
        pytest.param(1, False, marks=pytest.mark.slow),
        (2, True),
        pytest.param(3, False, marks=pytest.mark.slow),
    ],
)
def test_the_policy_does_not_depend_on_the_workers(
    goal_scenario: Scenario,
    other_scenario: Scenario,
    alone: tuple[Learned, list[Rollout], int],
    num_workers: int,
    kill: bool,
) -> None:
    with ProcessWorkers(num_workers) as workers:
        options = RunOptions(num_parallel=3, workers=workers)
        other = learned([goal_scenario, other_scenario], [other_scenario], options, workers if kill else None)
    for name, tensor in alone[0].policy.weights.items():
        assert torch.equal(tensor, other[0].policy.weights[name]), name
    assert alone[0].policy.weights["action.weight"].any()
    assert alone[0].evaluations == other[0].evaluations
    assert [asdict(r) for r in alone[1]] == [asdict(r) for r in other[1]]
    assert alone[2] == other[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and files to its own shutdown
def test_nor_on_ray(
    goal_scenario: Scenario, other_scenario: Scenario, alone: tuple[Learned, list[Rollout], int]
) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'rlkd[ray]'")
    with open_workers(WorkersConfig("ray", 2)) as workers:
        options = RunOptions(num_parallel=3, workers=workers)
        other = learned([goal_scenario, other_scenario], [other_scenario], options)
    for name, tensor in alone[0].policy.weights.items():
        assert torch.equal(tensor, other[0].policy.weights[name]), name
    assert alone[0].evaluations == other[0].evaluations
    assert [asdict(r) for r in alone[1]] == [asdict(r) for r in other[1]]


def test_students_are_split_evenly_into_chunks(collectors: list[Collector]) -> None:
    assert [len(rows) for rows in rollout_env(collectors, 6)._chunks] == [6]
    assert [len(rows) for rows in rollout_env(collectors, 5)._chunks] == [3, 3]
    assert [len(rows) for rows in rollout_env(collectors, 1)._chunks] == [1] * 6
    with pytest.raises(NotImplementedError, match="collects whole rollouts"):
        rollout_env(collectors).step(np.zeros((6, 12), dtype=np.float32))
