"""Scenarios that take turns before stable-baselines3: whole episodes, truncated laggards, and resumed states."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig, DistillationVectorEnv, EnvConfig, Scenario
from rlkd.envs.action import published_setting
from rlkd.envs.observation import SAVINGS
from rlkd.envs.references import References
from rlkd.envs.sb3 import SB3VecEnv, make_sb3_env, standardise
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig

NO_MEAN, NO_SCALE = np.zeros(len(OBSERVATIONS), np.float32), np.ones(len(OBSERVATIONS), np.float32)
RATE, PROGRESS = CONTROLS.index("learning_rate"), OBSERVATIONS.index("progress")


def populations(*scenarios: Scenario, num_students: int = 3) -> list[DistillationVectorEnv]:
    pools = [[100 * k + i for i in range(4)] for k in range(len(scenarios))]
    return [
        DistillationVectorEnv(num_students, scenario=s, pool=pool, restart_together=True)
        for s, pool in zip(scenarios, pools, strict=True)
    ]


def environment(*scenarios: Scenario, num_students: int = 3) -> SB3VecEnv:
    return SB3VecEnv(populations(*scenarios, num_students=num_students), NO_MEAN, NO_SCALE, 5)


def actions(window: int, num_students: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(window).uniform(-1, 1, (num_students, len(CONTROLS))).astype(np.float32)


def test_a_rollout_has_one_whole_episode_of_every_scenario(goal_scenario: Scenario, other_scenario: Scenario) -> None:
    env = environment(goal_scenario, other_scenario)
    plain = populations(goal_scenario, other_scenario)
    first = [p.reset(seed=5 + 3 * k)[0] for k, p in enumerate(plain)]  # student i of population k: seed + k N + i
    lengths = [s.config.num_windows for s in (goal_scenario, other_scenario)]
    assert env.num_steps == sum(lengths) == 7
    seen = env.reset()
    np.testing.assert_allclose(seen, first[0].clip(-5, 5), atol=1e-6)
    waiting, step = list(first), 0
    for _ in range(2):
        for turn, length in enumerate(lengths):
            np.testing.assert_allclose(seen, waiting[turn].clip(-5, 5), atol=1e-6)
            total = np.zeros(3)
            for window in range(length):
                seen, rewards, dones, infos = env.step(actions(step))
                waiting[turn], raw, *_ = plain[turn].step_flat(actions(step))
                np.testing.assert_allclose(rewards, raw, atol=1e-6)
                total += raw
                assert dones.tolist() == [window == length - 1] * 3
                assert env.unit_controls.shape == (3, len(CONTROLS))
                step += 1
            for info, expected in zip(infos, total, strict=True):
                assert info["scenario"] == turn
                assert info["episode"]["l"] == length
                assert info["episode"]["r"] == pytest.approx(expected, abs=1e-5)
                assert info["terminal_observation"][PROGRESS] == 1.0
                assert not info["TimeLimit.truncated"]
                assert {"accuracy", "has_floor", "goal_met", "shortfall"} <= set(info["student"])
    assert seen[:, PROGRESS].tolist() == [0.0] * 3


def test_tasks_come_from_the_pool_and_goals_are_drawn_anew(goal_scenario: Scenario) -> None:
    env = environment(goal_scenario)
    env.reset()
    tasks = []
    for step in range(3 * env.num_steps):
        if step % env.num_steps == 0:
            tasks += env.envs[0].episodes.tasks
        env.step(actions(step))
    assert {task.seed for task in tasks} <= set(range(4))
    assert len({task.goal_seed for task in tasks}) == len(tasks) == 9
    by_seed = [task for task in tasks if task.seed == tasks[0].seed]
    assert len(by_seed) > 1
    assert all(torch.equal(task.labels, by_seed[0].labels) for task in by_seed)
    assert len({(task.keep, task.preference, task.latency_limit) for task in by_seed}) == len(by_seed)


def wild(scenario: Scenario) -> Scenario:
    """The same scenario with learning rates at which a student diverges at once."""
    controls = ControlConfig(learning_rate=(1e-3, 1e30))
    config = dataclasses.replace(scenario.config, controls=controls, train=TrainConfig(max_rollbacks=0))
    return dataclasses.replace(scenario, config=config, start=published_setting(controls), known=References())


def test_a_student_that_began_late_is_cut_off_when_the_others_end(scenario: Scenario, other_scenario: Scenario) -> None:
    env = environment(wild(scenario), other_scenario)
    env.reset()
    calm = np.zeros((3, len(CONTROLS)), np.float32)
    breaking = calm.copy()
    breaking[1, RATE] = 1.0
    env.step(calm)
    _, _, dones, infos = env.step(breaking)
    assert dones.tolist() == [False, True, False]
    assert infos[1]["student"]["diverged"] == 1.0
    assert not infos[1]["TimeLimit.truncated"]
    env.step(calm)
    seen, _, dones, infos = env.step(calm)
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, True, False]
    assert [info["episode"]["l"] for info in infos] == [4, 2, 4]
    assert infos[1]["terminal_observation"][PROGRESS] == 0.5
    # the next scenario's turn has begun, and in the next turn of this one all begin together
    assert seen[:, PROGRESS].tolist() == [0.0] * 3
    assert env.envs[0].episodes.window.tolist() == [0.0] * 3
    assert infos[0]["scenario"] == 0
    for _ in range(other_scenario.config.num_windows):
        seen, _, dones, infos = env.step(calm)
    assert dones.all()
    assert infos[0]["scenario"] == 1


@pytest.mark.parametrize("stop", [2, 4, 5, 9])
def test_a_restored_environment_goes_on_to_the_same_bytes(
    goal_scenario: Scenario, other_scenario: Scenario, stop: int
) -> None:
    one, two = (environment(goal_scenario, other_scenario) for _ in range(2))
    one.reset()
    for step in range(stop):
        one.step(actions(step))
    state = {name: tensor.clone() for name, tensor in one.training_state().items()}
    two.reset()
    two.load_training_state(state)
    for step in range(stop, stop + one.num_steps + 1):
        first, second = one.step(actions(step)), two.step(actions(step))
        for a, b in zip(first[:3], second[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        for mine, other in zip(first[3], second[3], strict=True):
            assert mine.keys() == other.keys()
            if "student" in mine:
                assert mine["student"] == other["student"]
                assert mine["episode"]["r"] == other["episode"]["r"]
    for name, tensor in one.training_state().items():
        assert torch.equal(tensor, two.training_state()[name]), name


def test_observations_are_standardised_and_clipped() -> None:
    mean, deviation = np.array([1.0, 0.0], np.float32), np.array([2.0, 1e30], np.float32)
    given = np.array([[2.0, 1.0], [100.0, -1.0]], np.float32)
    found = standardise(given, mean, deviation, unknown=np.array([False, False]))
    np.testing.assert_allclose(found, [[0.5, 0.0], [5.0, 0.0]], atol=1e-6)
    assert (standardise(given, mean, deviation, unknown=np.array([True, False]))[:, 0] == 0.0).all()


def test_agents_read_nothing_from_savings_that_a_student_has_no_control_for(config: EnvConfig) -> None:
    whole = dataclasses.replace(config, student=StudentConfig(widths=(8, 8), exits=()))
    count = len(OBSERVATIONS)
    env = make_sb3_env(whole, num_students=2, scale=(np.full(count, 0.3, np.float32), np.ones(count, np.float32)))
    columns = [OBSERVATIONS.index(name) for name in SAVINGS]
    first = env.reset()
    second = env.step(np.zeros((2, len(CONTROLS)), np.float32))[0]
    for observation in (first, second):
        assert (observation[:, columns] == 0.0).all()
        assert np.abs(observation).sum() > 0.0
