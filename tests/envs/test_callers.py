"""What callers give the environments: helpers of Gymnasium and stable-baselines3, and values that are none."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from rlkd.envs import CONTROLS, ENV_ID, FLAT_ENV_ID, DistillationVectorEnv, EnvConfig, Scenario
from rlkd.envs.action import dict_action
from rlkd.envs.sb3 import make_sb3_env

IDS = (ENV_ID, FLAT_ENV_ID)
HOLD = np.zeros(len(CONTROLS), np.float32)


def made(scenario: Scenario, env_id: str) -> gymnasium.Env[Any, Any]:
    """One student, without Gymnasium's own wrappers, which would see some of the mistakes first."""
    return gymnasium.make(env_id, scenario=scenario).unwrapped


def action_for(env_id: str, flat: np.ndarray) -> Any:
    return dict_action(flat) if env_id == ENV_ID else flat


@pytest.mark.parametrize("env_id", IDS)
def test_make_vec_env_of_sb3_makes_steps_and_warns_of_nothing(scenario: Scenario, env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_vec_env(env_id, n_envs=2, seed=4, env_kwargs={"scenario": scenario})
    assert env.reset().shape == (2, *env.observation_space.shape)  # type: ignore[misc]
    for _ in range(scenario.config.num_windows):
        _, rewards, dones, infos = env.step([action_for(env_id, HOLD)] * 2)  # type: ignore[arg-type]
    assert dones.all()
    assert np.isfinite(rewards).all()
    assert infos[0]["episode"]["l"] == scenario.config.num_windows  # Monitor's own record


@pytest.mark.slow
def test_ppo_by_the_id_alone_learns_and_is_evaluated() -> None:
    agent = PPO("MlpPolicy", FLAT_ENV_ID, n_steps=4, batch_size=4, n_epochs=1, seed=0, device="cpu")
    agent.learn(4)
    mean, deviation = evaluate_policy(agent, agent.get_env(), n_eval_episodes=1)  # type: ignore[arg-type]
    assert np.isfinite([mean, deviation]).all()


@pytest.mark.slow
def test_helpers_take_the_flat_environment(scenario: Scenario) -> None:
    env = gymnasium.make(FLAT_ENV_ID, scenario=scenario)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        sb3_check_env(env)
    for wrapper in (RecordEpisodeStatistics, Monitor):
        counted = wrapper(gymnasium.make(FLAT_ENV_ID, scenario=scenario))
        counted.reset(seed=1)
        total = 0.0
        for _ in range(scenario.config.num_windows):
            _, reward, terminated, _, info = counted.step(HOLD)
            total += float(reward)
        assert terminated
        assert info["episode"]["l"] == scenario.config.num_windows
        assert float(info["episode"]["r"]) == pytest.approx(total, abs=1e-5)
    normed = VecNormalize(make_vec_env(FLAT_ENV_ID, n_envs=2, env_kwargs={"scenario": scenario}))
    assert np.isfinite(normed.reset()).all()  # type: ignore[arg-type]


def test_evaluate_policy_counts_whole_episodes(scenario: Scenario, config: EnvConfig) -> None:
    small: dict[str, Any] = {
        "n_steps": 2,
        "batch_size": 4,
        "policy_kwargs": {"net_arch": [8, 8]},
        "seed": 0,
        "device": "cpu",
    }
    single = make_vec_env(FLAT_ENV_ID, n_envs=2, env_kwargs={"scenario": scenario})  # has Monitors already
    lock_step = VecMonitor(make_sb3_env(config, num_students=2, num_windows=3, train={"steps_per_window": 2}))
    for watched, length in ((single, scenario.config.num_windows), (lock_step, 3)):
        agent = PPO("MlpPolicy", watched, **small)
        returns, lengths = evaluate_policy(agent, watched, n_eval_episodes=2, return_episode_rewards=True)
        assert lengths == [length] * 2
        assert np.isfinite(returns).all()


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_vector_environments_of_both_ids_agree(scenario: Scenario, env_id: str, mode: str) -> None:
    reference = DistillationVectorEnv(2, scenario=scenario)
    env = VectorStatistics(gymnasium.make_vec(env_id, num_envs=2, vectorization_mode=mode, scenario=scenario))
    np.testing.assert_array_equal(env.reset(seed=5)[0], reference.reset(seed=np.int64(5))[0])  # type: ignore[arg-type]
    changes = np.random.default_rng(0).uniform(-1, 1, (2, len(CONTROLS))).astype(np.float32)
    seen, rewards, *_ = env.step(action_for(env_id, changes))
    expected, expected_rewards, *_ = reference.step_flat(changes)
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    np.testing.assert_allclose(rewards, expected_rewards, atol=1e-5)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("control", ["weight_response", "temperature", "learning_rate"])
def test_a_number_that_is_none_names_its_control(scenario: Scenario, env_id: str, value: float, control: str) -> None:
    flat = np.zeros((3, len(CONTROLS)), np.float64)
    flat[2, CONTROLS.index(control)] = value
    env = made(scenario, env_id)
    env.reset(seed=0)
    with np.errstate(over="ignore"):
        with pytest.raises(ValueError, match=f"action: {control} is -?(nan|inf); allowed: finite numbers"):
            env.step(action_for(env_id, flat[2]))
        population = gymnasium.make_vec(env_id, num_envs=3, scenario=scenario)
        population.reset(seed=0)
        with pytest.raises(ValueError, match=f"action: {control} of student 2 is"):
            population.step(action_for(env_id, flat))
    assert np.isfinite(env.step(action_for(env_id, HOLD))[0]).all()  # nothing of it was kept


@pytest.mark.parametrize("env_id", IDS)
def test_a_step_without_an_episode_asks_for_a_reset(scenario: Scenario, env_id: str) -> None:
    env = made(scenario, env_id)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset first"):
        env.step(action_for(env_id, HOLD))
    env.reset(seed=0)
    for _ in range(scenario.config.num_windows):
        _, _, terminated, _, _ = env.step(action_for(env_id, HOLD))
    assert terminated
    with pytest.raises(gymnasium.error.ResetNeeded, match="after every episode"):
        env.step(action_for(env_id, HOLD))
    env.reset()
    env.step(action_for(env_id, HOLD))
    with pytest.raises(gymnasium.error.ResetNeeded):
        gymnasium.make_vec(env_id, num_envs=2, scenario=scenario).step(action_for(env_id, np.stack([HOLD, HOLD])))


@pytest.mark.parametrize("env_id", IDS)
def test_arguments_that_cannot_be_used_are_refused(scenario: Scenario, env_id: str) -> None:
    for words in ({"config": {"num_windows": 3}}, {"scenario": EnvConfig()}, {"render_mode": "rgb_array"}):
        for make in (gymnasium.make, gymnasium.make_vec):
            with pytest.raises(TypeError, match=f"{next(iter(words))}: got .*; allowed: "):
                make(env_id, **words)  # type: ignore[operator]
    with pytest.raises(ValueError, match="num_envs: got 0"):
        gymnasium.make_vec(env_id, num_envs=0, scenario=scenario)
    for env in (made(scenario, env_id), gymnasium.make_vec(env_id, num_envs=2, scenario=scenario)):
        with pytest.raises(ValueError, match="options: got num_windows; allowed: none"):
            env.reset(options={"num_windows": 3})  # type: ignore[attr-defined]
        env.reset(seed=1, options={})  # type: ignore[attr-defined]


def test_an_action_of_another_form_is_refused(scenario: Scenario) -> None:
    env, flat = made(scenario, ENV_ID), made(scenario, FLAT_ENV_ID)
    env.reset(seed=0), flat.reset(seed=0)
    whole = dict_action(HOLD)
    for action, words in (
        (HOLD, "got ndarray; allowed: a mapping with loss_weights"),
        ({k: v for k, v in whole.items() if k != "temperature"}, "temperature is missing"),
        ({**whole, "temperature": HOLD}, r"temperature has shape \(12,\); allowed: \(1,\)"),
        ({**whole, "tempreature": HOLD[:1]}, "got tempreature; allowed: loss_weights"),
    ):
        with pytest.raises(ValueError, match=words):
            env.step(action)
    for shape in ((11,), (1,), (), (1, 12)):
        with pytest.raises(ValueError, match=r"got shape .*; allowed: \(1, 12\)"):
            flat.step(np.zeros(shape, np.float32))
