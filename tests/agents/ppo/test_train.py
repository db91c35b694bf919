import dataclasses

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecEnv

from rlkd.agents.policy.policy import HIDDEN, policy_from_sb3
from rlkd.agents.ppo.evaluation import Evaluation
from rlkd.agents.ppo.train import (
    BLIND,
    Learned,
    Listeners,
    PPOConfig,
    Rollout,
    hide,
    new_agent,
    observation_figures,
    train,
)
from rlkd.envs import CONTROLS, OBSERVATIONS, DistillationVectorEnv, Scenario
from rlkd.envs.observation import TABLE
from rlkd.envs.references import References
from rlkd.envs.sb3 import SB3VecEnv, standardise
from rlkd.errors import UserError

SIZES = {"num_students": 6, "num_tasks": 8, "batch_size": 8, "num_epochs": 2, "hidden": 8, "num_evaluation_tasks": 4}
CONFIG = PPOConfig(**SIZES, num_iterations=3, evaluate_every=2)
Log = list[tuple[str, Rollout | Evaluation]]


def environment(scenario: Scenario) -> tuple[VecEnv, np.ndarray, np.ndarray]:
    mean, deviation = observation_figures([scenario], 6, 0)
    return SB3VecEnv([DistillationVectorEnv(6, scenario=scenario)], mean, deviation, 0), mean, deviation


def trained(
    scenarios: list[Scenario], validation: tuple[Scenario, ...] = (), config: PPOConfig = CONFIG, seed: int = 5
) -> tuple[Learned, Log]:
    log: Log = []

    learned = train(
        scenarios,
        config,
        seed,
        listeners=Listeners(
            lambda n: None,
            lambda rollout, logger: log.append(("rollout", rollout)),
            lambda evaluation: log.append(("evaluation", evaluation)),
        ),
        validation=validation,
    )
    return learned, log


def test_the_untrained_policy_holds_the_start_and_equals_sb3s_actor(scenario: Scenario) -> None:
    env, mean, deviation = environment(scenario)
    agent = new_agent(env, CONFIG, scenario.config.num_windows, 0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(20, len(OBSERVATIONS), generator=generator)

    def actions() -> np.ndarray:
        policy = policy_from_sb3(
            agent.policy.state_dict(), mean, deviation, start=scenario.start, controls=scenario.config.controls
        )
        return policy.act(seen).numpy()

    assert np.array_equal(actions(), np.zeros((20, len(CONTROLS))))
    for parameter in agent.policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    unknown = np.zeros(len(OBSERVATIONS), dtype=bool)
    scaled = standardise(seen.numpy(), mean, deviation, unknown=unknown)
    expected, _ = agent.predict(scaled, deterministic=True)
    np.testing.assert_allclose(actions(), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_training_repeats_and_moves_the_policy(goal_scenario: Scenario) -> None:
    (one, log), (two, _) = trained([goal_scenario]), trained([goal_scenario])
    for name, tensor in one.policy.weights.items():
        assert torch.equal(tensor, two.policy.weights[name]), name
    assert one.policy.weights["action.weight"].abs().max() > 0
    assert torch.equal(one.policy.start, goal_scenario.start)
    rollouts = [entry for kind, entry in log if isinstance(entry, Rollout)]
    assert [r.num_trainings for r in rollouts] == [6, 12, 18]
    assert {"score", "accuracy", "return", "goal_met", "shortfall", "action/exit_first"} <= set(rollouts[0].figures)
    assert one.evaluations == []
    # nor does it matter whether references are known already
    anew, _ = trained([dataclasses.replace(goal_scenario, known=References())])
    assert all(torch.equal(tensor, anew.policy.weights[name]) for name, tensor in one.policy.weights.items())


@pytest.mark.slow
def test_the_iteration_that_does_best_on_the_validation_scenarios_is_returned(
    goal_scenario: Scenario, other_scenario: Scenario
) -> None:
    learned, log = trained([goal_scenario], (other_scenario,))
    assert [kind for kind, _ in log] == ["evaluation", "rollout", "rollout", "evaluation", "rollout", "evaluation"]
    assert [entry for kind, entry in log if kind == "evaluation"] == learned.evaluations
    assert [e.iteration for e in learned.evaluations] == [0, 2, 3]
    assert learned.best is not None
    assert learned.best.score == max(e.score for e in learned.evaluations)
    last, _ = trained([goal_scenario])  # evaluations change nothing of the training
    is_last = all(torch.equal(t, last.policy.weights[name]) for name, t in learned.policy.weights.items())
    assert is_last == (learned.best.iteration == 3)


def test_groups_that_are_hidden_read_zero(goal_scenario: Scenario) -> None:
    blind = dataclasses.replace(CONFIG, hidden_groups=BLIND, num_iterations=1)
    policy = trained([goal_scenario], config=blind)[0].policy
    hidden = [OBSERVATIONS.index(name) for group in BLIND for name in TABLE[group]]
    shown = [i for i in range(len(OBSERVATIONS)) if i not in hidden]
    assert (policy.deviation[hidden] == HIDDEN).all()
    assert (policy.deviation[shown] < 10).all()
    seen = torch.rand(4, len(OBSERVATIONS), generator=torch.Generator().manual_seed(0))
    other = seen.clone()
    other[:, hidden] = 1 - other[:, hidden]
    assert torch.equal(policy.act(seen), policy.act(other))
    other[:, shown] = 1 - other[:, shown]
    assert not torch.equal(policy.act(seen), policy.act(other))
    assert "margin" not in [OBSERVATIONS[i] for i in shown]
    assert {"progress", "has_floor", "teacher_margin", "control_unit_keep"} <= {OBSERVATIONS[i] for i in shown}
    ones = np.ones(len(OBSERVATIONS), dtype=np.float32)
    np.testing.assert_array_equal(hide(ones, ()), ones)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PPOConfig(hidden_groups=("margins",)), "ppo.hidden_groups: got 'margins'; allowed: time, margin"),
        (PPOConfig(evaluate_every=0), "ppo.evaluate_every: got 0; allowed: at least 1"),
        (PPOConfig(num_evaluation_tasks=0), "ppo.num_evaluation_tasks: got 0"),
        (PPOConfig(num_tasks=0), "ppo.num_tasks: got 0"),
        (PPOConfig(gamma=1.5), "ppo.gamma: got 1.5"),
    ],
)
def test_an_impossible_agent_is_refused(config: PPOConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.check()


@pytest.mark.slow
def test_an_agent_learns_from_scenarios_in_turn(goal_scenario: Scenario, other_scenario: Scenario) -> None:
    learned, log = trained([goal_scenario, other_scenario])
    assert learned.policy.weights["action.weight"].isfinite().all()
    rollouts = [entry for kind, entry in log if isinstance(entry, Rollout)]
    assert [r.num_trainings for r in rollouts] == [12, 24, 36]
    alone, _ = trained([goal_scenario])
    assert not torch.equal(alone.policy.weights["action.weight"], learned.policy.weights["action.weight"])
