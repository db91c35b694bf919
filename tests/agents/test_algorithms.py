import pytest

from rlkd.agents.algorithms import AgentConfig, Algorithm, train_other
from rlkd.agents.policy.controllers import run
from rlkd.agents.policy.sb3 import check_same_actions, policy_from_sb3
from rlkd.agents.ppo.train import Listeners, PPOConfig, Rollout
from rlkd.envs import Scenario
from rlkd.errors import UserError

CONFIG = PPOConfig(
    num_students=4,
    num_tasks=4,
    batch_size=8,
    num_epochs=1,
    hidden=8,
    num_evaluation_tasks=3,
    num_iterations=2,
    evaluate_every=1,
)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["a2c", "sac", pytest.param("recurrent_ppo"), pytest.param("tqc")])
def test_another_algorithm_learns_and_acts(
    algorithm: Algorithm, goal_scenario: Scenario, other_scenario: Scenario
) -> None:
    if algorithm in ("recurrent_ppo", "tqc"):
        pytest.importorskip("sb3_contrib", reason="the extra rl is not installed: pip install 'rlkd[rl]'")
    rollouts: list[Rollout] = []
    policy, evaluations = train_other(
        [goal_scenario],
        CONFIG,
        AgentConfig(algorithm),
        0,
        listeners=Listeners(lambda n: None, lambda rollout, logger: rollouts.append(rollout)),
        validation=[other_scenario],
    )
    assert [(r.iteration, r.num_trainings) for r in rollouts] == [(1, 4), (2, 8)]
    assert {"return", "score", "action/temperature"} <= set(rollouts[-1].figures)
    assert [e.iteration for e in evaluations] == [0, 1, 2]
    assert policy.agent.num_timesteps == 2 * 4 * goal_scenario.config.num_windows
    tasks = goal_scenario.config.task
    results = [run(goal_scenario, policy.controller(), range(3), tasks, final_split="validation") for _ in range(2)]
    assert (results[0].score == results[1].score).all()
    if algorithm == "a2c":
        seen = goal_scenario.start.new_zeros(5, len(policy.mean)).numpy()
        assert check_same_actions(policy.agent, policy_from_sb3(policy.agent), seen) < 1e-5  # type: ignore[arg-type]


def test_impossible_values_are_refused() -> None:
    with pytest.raises(UserError, match="agent: got learning_rate 0"):
        AgentConfig(learning_rate=0.0).check()
