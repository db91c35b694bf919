"""Evaluations during training: what is measured, by hand, and which weights are kept."""

import dataclasses

import pytest
import torch
from samples import some_policy
from torch import Tensor

from rlkd.agents.policy.controllers import RunOptions
from rlkd.agents.policy.policy import Policy, unchanged
from rlkd.agents.ppo.evaluation import FIRST_SEED, Choice, evaluate, from_table
from rlkd.envs import ControlConfig, Episodes, Scenario
from rlkd.envs.action import CONTROLS, change
from rlkd.envs.references import References
from rlkd.students import TrainConfig


def policy_for(scenario: Scenario, bias: float) -> Policy:
    """A policy that changes every control by `bias`."""
    policy = unchanged(dataclasses.replace(some_policy(), start=scenario.start, controls=scenario.config.controls))
    return dataclasses.replace(
        policy, weights={**policy.weights, "action.bias": torch.full_like(policy.weights["action.bias"], bias)}
    )


def test_an_evaluation_is_the_mean_over_scenarios_of_the_final_figures(
    goal_scenario: Scenario, other_scenario: Scenario
) -> None:
    policy = policy_for(goal_scenario, -0.3)
    found = evaluate(policy, [goal_scenario, other_scenario], num_tasks=5, iteration=7)
    rows = []
    for k, scenario in enumerate((goal_scenario, other_scenario)):
        episodes = Episodes(scenario, 5)
        episodes.reset([FIRST_SEED + k * 2**20 + i for i in range(5)])
        first = episodes.score.clone()
        action = torch.full((5, len(CONTROLS)), -0.3)
        for _ in range(scenario.config.num_windows):
            outcome = episodes.step(change(episodes.u, action, episodes.start, scenario.config.controls))
        missing = [
            max(0.0, float(floor - accuracy))
            for floor, accuracy in zip(episodes.floors[:, 0], outcome.metrics.accuracy, strict=True)
            if floor > 0
        ]
        assert missing
        met = sum(m == 0 for m in missing) / len(missing)
        saved = float((1 - outcome.cost.latency_ratio).mean())
        gain = float((outcome.score - first).mean())  # the return: rewards are changes of the score
        rows.append((float(outcome.score.mean()), met, sum(missing) / len(missing), saved, gain))
    means = [sum(column) / 2 for column in zip(*rows, strict=True)]
    assert found.iteration == 7
    assert dataclasses.astuple(found)[1:] == pytest.approx(means, abs=1e-6)
    assert evaluate(policy, [goal_scenario, other_scenario], num_tasks=5, iteration=7) == found


def test_a_diverged_student_counts_as_worst(goal_scenario: Scenario) -> None:
    task = dataclasses.replace(goal_scenario.config.task, floor_share=1.0, reference="0.5")
    config = dataclasses.replace(
        goal_scenario.config,
        task=task,
        controls=ControlConfig(learning_rate=(1e30, 1e30)),
        train=TrainConfig(max_rollbacks=0),
    )
    hot = dataclasses.replace(goal_scenario, config=config, known=References())
    found = evaluate(policy_for(hot, 0.0), [hot], num_tasks=3, iteration=0)
    assert (found.score, found.goal_met, found.latency_saving) == (-2.0, 0.0, 0.0)
    episodes = Episodes(hot, 3)
    episodes.reset([FIRST_SEED + i for i in range(3)])
    assert found.shortfall == pytest.approx(float(episodes.floors[:, 0].mean()), abs=1e-6)


def test_without_floors_every_goal_is_met(scenario: Scenario) -> None:
    found = evaluate(policy_for(scenario, 0.0), [scenario], num_tasks=2, iteration=0)
    assert (found.goal_met, found.shortfall) == (1.0, 0.0)


def considered(scenarios: tuple[Scenario, ...], biases: dict[int, float], scenario: Scenario) -> Choice:
    first = policy_for(scenario, 0.9)
    choice = Choice(scenarios, (0, 2, 3), 3, first.weights, on_evaluation=lambda e: None, options=RunOptions())
    for iteration, bias in biases.items():
        choice.consider(policy_for(scenario, bias), iteration)
    return choice


def chosen(choice: Choice) -> float:
    bias: Tensor = choice.weights["action.bias"]
    return round(float(bias[0]), 4)


def test_the_best_weights_are_kept_and_come_back(goal_scenario: Scenario) -> None:
    biases = {0: 0.0, 1: 0.1, 2: -0.4, 3: 0.4}
    choice = considered((goal_scenario,), biases, goal_scenario)
    assert [e.iteration for e in choice.evaluations] == [0, 2, 3]
    best = max(choice.evaluations, key=lambda e: e.score)
    assert len({e.score for e in choice.evaluations}) == 3
    assert chosen(choice) == biases[best.iteration]
    assert from_table(choice.table()) == choice.evaluations
    part = considered((goal_scenario,), {0: 0.0}, goal_scenario)
    again = considered((goal_scenario,), {}, goal_scenario)
    state = part.training_state()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in choice.training_state().items()}
    again.load_training_state(state)
    for iteration in (1, 2, 3):
        again.consider(policy_for(goal_scenario, biases[iteration]), iteration)
    assert again.evaluations == choice.evaluations
    assert chosen(again) == chosen(choice)
    with pytest.raises(ValueError, match="4 evaluations; at most 3"):
        again.load_training_state({**state, "count": torch.tensor([4])})


def test_a_later_iteration_must_do_better(goal_scenario: Scenario) -> None:
    choice = considered((goal_scenario,), {0: 0.0}, goal_scenario)
    equal = policy_for(goal_scenario, 0.0)
    equal.weights["hidden.0.bias"][:] += 1.0  # another policy that acts alike
    choice.consider(equal, 2)
    assert choice.evaluations[0].score == choice.evaluations[1].score
    assert not torch.equal(choice.weights["hidden.0.bias"], equal.weights["hidden.0.bias"])


def test_without_validation_scenarios_the_last_weights_are_kept(goal_scenario: Scenario) -> None:
    choice = considered((), {0: 0.0, 1: 0.1, 3: 0.4}, goal_scenario)
    assert chosen(choice) == 0.4
    assert choice.evaluations == []
    assert choice.table().shape == (0, 6)
