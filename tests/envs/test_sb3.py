"""Groups of students that share a task and are rewarded against each other."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from rlkd.envs import OBSERVATIONS, ControlConfig, DistillationVectorEnv, Scenario
from rlkd.envs.sb3 import SB3VecEnv
from rlkd.students import TrainConfig

NO_MEAN, NO_SCALE = np.zeros(len(OBSERVATIONS), np.float32), np.ones(len(OBSERVATIONS), np.float32)


def grouped(scenario: Scenario, num_students: int, group_size: int) -> SB3VecEnv:
    return SB3VecEnv([DistillationVectorEnv(num_students, scenario=scenario)], NO_MEAN, NO_SCALE, 3, group_size)


def actions(num_students: int, window: int) -> NDArray[np.float32]:
    return np.random.default_rng(window).uniform(-1, 1, (num_students, 9)).astype(np.float32)


def test_rewards_are_less_the_mean_of_the_others_of_the_group(scenario: Scenario) -> None:
    env, plain = grouped(scenario, 6, 3), DistillationVectorEnv(6, scenario=scenario)
    env.reset()
    plain.reset(seed=[3, 3, 3, 6, 6, 6])
    total = np.zeros(6)
    for window in range(scenario.config.num_windows):
        _, rewards, dones, infos = env.step(actions(6, window))
        raw = plain.step_flat(actions(6, window))[1]
        total += raw
        a, b, c, *rest = raw
        by_hand = [a - (b + c) / 2, b - (a + c) / 2, c - (a + b) / 2]
        np.testing.assert_allclose(rewards[:3], by_hand, atol=1e-6)
        assert rewards[3] == pytest.approx(rest[0] - (rest[1] + rest[2]) / 2, abs=1e-6)
        np.testing.assert_allclose(rewards.reshape(2, 3).sum(1), 0.0, atol=1e-6)
        assert np.abs(rewards).max() > 1e-3
    assert dones.all()
    # what is logged of an episode is its own return
    np.testing.assert_allclose([info["episode"]["r"] for info in infos], total, atol=1e-6)


def test_members_of_a_group_have_one_task_after_the_other_in_common(scenario: Scenario) -> None:
    env = grouped(scenario, 6, 3)
    env.reset()
    seen = []
    for _ in range(2):
        episodes = env.envs[0].episodes
        seeds = [task.seed for task in episodes.tasks]
        assert seeds[:3] == [seeds[0]] * 3
        assert seeds[3:] == [seeds[3]] * 3
        seen += [seeds[0], seeds[3]]
        for parameter in episodes.students.state_dict().values():
            assert (parameter[:3] == parameter[:1]).all()
        for _ in range(scenario.config.num_windows):
            # members that act alike learn alike: even their batches are the same
            _, rewards, _, _ = env.step(np.zeros((6, 9), np.float32))
            np.testing.assert_allclose(rewards, 0.0, atol=1e-6)
    assert len(set(seen)) == 4


def test_without_groups_rewards_and_streams_are_as_before(scenario: Scenario) -> None:
    env, plain = grouped(scenario, 3, 1), DistillationVectorEnv(3, scenario=scenario)
    np.testing.assert_allclose(env.reset(), plain.reset(seed=3)[0].clip(-5, 5), atol=1e-6)
    _, rewards, _, _ = env.step(actions(3, 0))
    np.testing.assert_allclose(rewards, plain.step_flat(actions(3, 0))[1], atol=1e-7)


def test_a_group_needs_to_divide_the_students(scenario: Scenario) -> None:
    with pytest.raises(ValueError, match="got 4 for 6 students"):
        grouped(scenario, 6, 4)


def test_a_member_that_diverges_counts_with_what_it_lost(scenario: Scenario) -> None:
    wild = ControlConfig(step=1.0, learning_rate=(1e-3, 1e30))
    config = dataclasses.replace(scenario.config, controls=wild, train=TrainConfig(max_rollbacks=0))
    env = grouped(dataclasses.replace(scenario, config=config), 2, 2)
    env.reset()
    before = env.envs[0].episodes._score.clone()
    calm = np.zeros((2, 9), np.float32)
    calm[:, -1], calm[1, -1] = -1.0, 1.0  # the learning rate: lowest, highest
    _, rewards, dones, infos = env.step(calm)
    assert dones.tolist() == [False, True]
    assert infos[1]["episode"]["r"] == pytest.approx(-float(before[1]), abs=1e-6)
    assert rewards[0] > 0
    assert rewards[1] == pytest.approx(-rewards[0], abs=1e-6)
    # it begins the task that the others come to when this one is over
    ahead = env.envs[0].episodes.tasks[1].seed
    assert ahead != env.envs[0].episodes.tasks[0].seed
    calm[1, -1] = -1.0
    for _ in range(scenario.config.num_windows - 1):
        env.step(calm)
    assert env.envs[0].episodes.tasks[0].seed == ahead
