from pathlib import Path

import gymnasium
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import rlkd
from rlkd.agents.policy.sb3 import check_same_actions
from rlkd.envs import EnvConfig, Scenario
from rlkd.errors import UserError


def test_gymnasium_make_takes_fields_of_the_config(profile_file: Path, config: EnvConfig) -> None:
    env = gymnasium.make("rlkd/DistillationFlat-v0", config=config, num_windows=2, train={"steps_per_window": 2})
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2] for _ in range(2)]
    assert ends == [False, True]
    envs = gymnasium.make_vec(
        "rlkd/Distillation-v0", num_envs=3, vectorization_mode="vector_entry_point", config=config, num_windows=2
    )
    assert envs.reset(seed=0)[0].shape[0] == 3
    with pytest.raises(UserError, match="did you mean num_windows"):
        rlkd.make_env(config, num_window=2)
    with pytest.raises(UserError, match="with a scenario, which has them already"):
        rlkd.make_env(scenario=env.unwrapped.scenario, num_windows=2)


@pytest.fixture(scope="module")
def own_agent(config: EnvConfig) -> PPO:
    env = rlkd.make_sb3_env(config, num_students=3, num_windows=2, train={"steps_per_window": 2})
    agent = PPO(
        "MlpPolicy",
        VecMonitor(env),
        n_steps=env.num_steps,
        batch_size=6,
        n_epochs=1,
        policy_kwargs={"net_arch": [8, 8]},
        seed=0,
    )
    return agent.learn(6)


def test_an_agent_of_ones_own_becomes_a_policy_bundle(own_agent: PPO, tmp_path: Path) -> None:
    policy = rlkd.policy_from_sb3(own_agent)
    rlkd.save_policy(policy, tmp_path / "policy", {"agent": "my own"})
    loaded = rlkd.load_policy(tmp_path / "policy")
    assert loaded.provenance == {"agent": "my own"}
    observations = np.random.default_rng(0).normal(size=(20, policy.mean.shape[0])).astype(np.float32)
    assert check_same_actions(own_agent, loaded.policy, observations) < 1e-5


def test_the_scale_of_vec_normalize_goes_into_the_policy(scenario: Scenario) -> None:
    from stable_baselines3.common.env_util import make_vec_env

    single = make_vec_env("rlkd/DistillationFlat-v0", n_envs=1, env_kwargs={"scenario": scenario})
    env = VecNormalize(single, clip_obs=5.0)
    agent = PPO(
        "MlpPolicy", env, n_steps=4, batch_size=4, n_epochs=1, policy_kwargs={"net_arch": [8, 8]}, seed=0
    ).learn(4)
    policy = rlkd.policy_from_sb3(agent)
    assert np.allclose(policy.mean, env.obs_rms.mean)
    observations = np.random.default_rng(0).normal(size=(20, policy.mean.shape[0])).astype(np.float32)
    assert check_same_actions(agent, policy, observations) < 1e-4
    env.clip_obs = 10.0
    with pytest.raises(UserError, match="clip_obs=10"):
        rlkd.policy_from_sb3(agent)


def test_other_networks_and_scenarios_are_refused(config: EnvConfig, own_agent: PPO) -> None:
    env = rlkd.make_sb3_env(config, num_students=2, num_windows=2)
    agent = PPO("MlpPolicy", env, n_steps=2, batch_size=4, policy_kwargs={"net_arch": [8, 8, 8]})
    with pytest.raises(UserError, match="two tanh layers of one width"):
        rlkd.policy_from_sb3(agent)
    with pytest.raises(UserError, match="got int; allowed: PPO or A2C"):
        rlkd.policy_from_sb3(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"got scenario 3; allowed: one of rlkd\.build_scenario"):
        rlkd.policy_from_sb3(own_agent, scenario=3)  # type: ignore[arg-type]
