"""The population against single environments, to close tolerance, also when one student ends before the others."""

import dataclasses

import numpy as np
import pytest

from rlkd.envs import (
    CONTROLS,
    ControlConfig,
    DistillationEnv,
    DistillationVectorEnv,
    EnvConfig,
    Scenario,
    build_scenario,
)
from rlkd.envs.action import dict_action
from rlkd.students import TrainConfig

RATE = CONTROLS.index("learning_rate")


def test_vector_environment_agrees_with_single_ones_closely(double_scenario: Scenario) -> None:
    scenario, rng = double_scenario, np.random.default_rng(1)
    vector, singles = (
        DistillationVectorEnv(3, scenario=scenario),
        [DistillationEnv(scenario=scenario) for _ in range(3)],
    )
    observations, _ = vector.reset(seed=20)
    for i, env in enumerate(singles):
        np.testing.assert_allclose(env.reset(seed=20 + i)[0], observations[i], atol=1e-6)
    for _ in range(2 * scenario.config.num_windows):
        flat = rng.uniform(-1, 1, (3, len(CONTROLS))).astype(np.float32)
        observations, rewards, terminated, _, info = vector.step(dict_action(flat))
        for i, env in enumerate(singles):
            observation, reward, done, _, _ = env.step(dict_action(flat[i]))
            assert done == terminated[i]
            np.testing.assert_allclose(observation, info["final_obs"][i] if done else observations[i], atol=1e-4)
            assert reward == pytest.approx(rewards[i], abs=1e-5)
            if done:
                np.testing.assert_allclose(env.reset()[0], observations[i], atol=1e-6)


@pytest.fixture(scope="module")
def hot_scenario(config: EnvConfig) -> Scenario:
    """Learning rates up to one that breaks a student at once, so that a test can choose who diverges."""
    train = TrainConfig(max_rollbacks=0)
    return build_scenario(dataclasses.replace(config, controls=ControlConfig(learning_rate=(1e-3, 1e30)), train=train))


def held(unit_keep: float) -> np.ndarray:
    """[3, 12]: all hold the start, but for inputs and units kept."""
    actions = np.zeros((3, len(CONTROLS)), dtype=np.float32)
    actions[:, [CONTROLS.index("unit_keep"), CONTROLS.index("feature_keep")]] = unit_keep
    return actions


def episode_beside_a_diverging_student(
    scenario: Scenario, keep: float, breaks_at: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [4, 3], rewards [3, 3] and ends [3, 3] of three windows; the middle student may break in one of them."""
    vector = DistillationVectorEnv(3, scenario=scenario)
    vector.reset(seed=5)
    scores, rewards, ends = [vector.episodes.evaluate("validation")[2].numpy()], [], []
    for window in range(3):
        actions = held(keep)
        if window == breaks_at:
            actions[1, RATE] = 1.0
        _, reward, terminated, _, info = vector.step(dict_action(actions))
        if terminated.any():
            assert info["final_info"]["diverged"][1] == 1.0
            assert info["final_info"]["score"][1] == 0.0
            assert np.isfinite(info["final_obs"][1]).all()
            assert info["_task_seed"].tolist() == [False, True, False]
        scores.append(vector.episodes.evaluate("validation")[2].numpy())
        rewards.append(reward)
        ends.append(terminated)
    return np.stack(scores), np.stack(rewards), np.stack(ends)


@pytest.mark.parametrize("keep", [0.0, -0.5], ids=["dense", "pruned"])
def test_a_diverging_student_restarts_alone(hot_scenario: Scenario, keep: float) -> None:
    scores, rewards, ends = episode_beside_a_diverging_student(hot_scenario, keep, 1)
    assert ends.tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert rewards[1, 1] == pytest.approx(-scores[1, 1], abs=1e-6)  # from its score down to 0
    assert rewards[2, 1] == pytest.approx(scores[3, 1] - scores[2, 1], abs=1e-6)  # of the new episode


@pytest.mark.parametrize("keep", [0.0, -0.5], ids=["dense", "pruned"])
def test_rewards_beside_a_restarted_student_stay_what_they_were(hot_scenario: Scenario, keep: float) -> None:
    scores, rewards, _ = episode_beside_a_diverging_student(hot_scenario, keep, 1)
    calm_scores, calm_rewards, _ = episode_beside_a_diverging_student(hot_scenario, keep, None)
    np.testing.assert_array_equal(scores[:, [0, 2]], calm_scores[:, [0, 2]])
    np.testing.assert_allclose(rewards[:, [0, 2]], np.diff(scores, axis=0)[:, [0, 2]], atol=1e-6)
    np.testing.assert_array_equal(rewards[:, [0, 2]], calm_rewards[:, [0, 2]])


def test_those_who_go_on_keep_their_figures_when_another_ends(hot_scenario: Scenario) -> None:
    vector, alone = DistillationVectorEnv(3, scenario=hot_scenario), DistillationEnv(scenario=hot_scenario)
    vector.reset(seed=5)
    alone.reset(seed=5)
    actions = held(0.0)
    actions[1, RATE] = 1.0
    _, _, terminated, _, info = vector.step(dict_action(actions))
    assert terminated.tolist() == [False, True, False]
    figures = alone.step(dict_action(actions[0]))[4]
    assert info["_score"].tolist() == [True, False, True]  # as gymnasium's SyncVectorEnv reports them
    assert info["score"][0] == pytest.approx(figures["score"], abs=1e-4)
