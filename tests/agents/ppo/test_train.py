import dataclasses

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecEnv

from rlkd.agents.baselines.search import Shortlist
from rlkd.agents.policy.policy import Policy, policy_from_sb3
from rlkd.agents.ppo.train import PPOConfig, Rollout, new_agent, observation_figures, train
from rlkd.envs import OBSERVATIONS, DistillationVectorEnv, EnvConfig, Scenario, build_scenario
from rlkd.envs.sb3 import SB3VecEnv, standardise
from rlkd.models import StudentConfig

CONFIG = PPOConfig(num_students=6, num_iterations=2, batch_size=8, num_epochs=2, hidden=8)
STATIC = Shortlist(torch.zeros(1, 9), torch.zeros(1, 3))


def environment(scenario: Scenario) -> tuple[VecEnv, np.ndarray, np.ndarray]:
    mean, deviation = observation_figures([scenario], 6, 0)
    return SB3VecEnv([DistillationVectorEnv(6, scenario=scenario)], mean, deviation, 0), mean, deviation


def trained(scenario: Scenario) -> tuple[Policy, list[Rollout]]:
    rollouts: list[Rollout] = []
    policy = train([scenario], STATIC, CONFIG, 5, lambda n: None, lambda r, log: rollouts.append(r))
    return policy, rollouts


def test_the_untrained_policy_holds_the_start_and_equals_sb3s_actor(scenario: Scenario) -> None:
    env, mean, deviation = environment(scenario)
    agent = new_agent(env, CONFIG, scenario.config.num_windows, 0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(20, len(OBSERVATIONS), generator=generator)

    def ours() -> np.ndarray:
        policy = policy_from_sb3(
            agent.policy.state_dict(), mean, deviation, scenario.plan, STATIC, scenario.config.controls
        )
        return policy.act(seen).numpy()

    assert np.array_equal(ours(), np.zeros((20, 9)))
    for parameter in agent.policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    theirs, _ = agent.predict(standardise(seen.numpy(), mean, deviation), deterministic=True)
    np.testing.assert_allclose(ours(), theirs, atol=1e-5)
    assert np.abs(theirs).max() > 0.1


def test_training_repeats_and_moves_the_policy(scenario: Scenario) -> None:
    (one, rollouts), (two, _) = trained(scenario), trained(scenario)
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[name]), name
    assert one.weights["action.weight"].abs().max() > 0
    assert [r.num_trainings for r in rollouts] == [6, 12]
    assert {"score", "accuracy", "return", "num_diverged", "action/temperature"} <= set(rollouts[0].figures)


def test_sb3_adapter_reports_ends_and_returns(scenario: Scenario) -> None:
    env, mean, deviation = environment(scenario)
    first = env.reset()
    assert np.abs(first).max() <= 5.0
    total = np.zeros(6)
    for window in range(scenario.config.num_windows):
        observation, rewards, dones, infos = env.step(np.zeros((6, 9), dtype=np.float32))
        total += rewards
        assert dones.all() == (window == scenario.config.num_windows - 1)
    for i, info in enumerate(infos):
        assert abs(info["episode"]["r"] - total[i]) < 1e-5
        assert info["episode"]["l"] == scenario.config.num_windows
        progress = OBSERVATIONS.index("progress")
        terminal = info["terminal_observation"][progress] * deviation[progress] + mean[progress]
        assert abs(terminal - 1.0) < 1e-5
        again = observation[i][progress] * deviation[progress] + mean[progress]
        assert abs(again) < 1e-5  # the next episode has begun
        assert 0 <= info["student"]["accuracy"] <= 1


def test_populations_of_different_worlds_stand_side_by_side(scenario: Scenario, config: EnvConfig) -> None:
    task = dataclasses.replace(config.task, dataset="generated:classes=4,inputs=6")
    other = build_scenario(dataclasses.replace(config, task=task, student=StudentConfig(widths=(8, 8, 8), exits=(2,))))
    mean, deviation = observation_figures([scenario, other], 6, 0)
    both = SB3VecEnv([DistillationVectorEnv(2, scenario=w) for w in (scenario, other)], mean, deviation, 5)
    second = SB3VecEnv([DistillationVectorEnv(2, scenario=other)], mean, deviation, 7)  # its streams: 5 + 2, 5 + 3
    np.testing.assert_array_equal(both.reset()[2:], second.reset())
    action = np.full((4, 9), 0.3, dtype=np.float32)
    for _ in range(scenario.config.num_windows):
        (seen, rewards, dones, infos), (wanted, theirs, _, _) = both.step(action), second.step(action[2:])
        np.testing.assert_array_equal(seen[2:], wanted)
        np.testing.assert_array_equal(rewards[2:], theirs)
    assert dones.all()
    assert all("student" in info for info in infos)
    assert both.positions.shape == (4, 9)
    policy = train([scenario, other], STATIC, CONFIG, 5, lambda n: None, lambda r, log: None)
    assert policy.weights["action.weight"].isfinite().all()
    with pytest.raises(ValueError, match="4 scenarios"):
        train([scenario] * 4, STATIC, CONFIG, 5, lambda n: None, lambda r, log: None)
