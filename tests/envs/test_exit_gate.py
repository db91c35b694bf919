"""Exit gates from the scenario to the student that ships."""

import dataclasses

import pytest
import torch

from rlkd.agents.policy.controllers import Controller, run
from rlkd.data import Preference
from rlkd.envs import CONTROLS, EnvConfig, Scenario, build_scenario
from rlkd.envs.action import with_exit_kind
from rlkd.models import GateConfig, StudentConfig
from rlkd.runs.distil import distil

EXIT, RATE = CONTROLS.index("exit_threshold"), CONTROLS.index("learning_rate")


@pytest.fixture(scope="module")
def gated(config: EnvConfig) -> Scenario:
    student = StudentConfig(widths=(24, 24, 24), exits=(1, 2), gate=GateConfig(enabled=True, beta_end=0.1))
    return build_scenario(dataclasses.replace(config, student=student))


def constant(scenario: Scenario) -> Controller:
    """Every sample leaves by its confidence; a higher learning rate than the start's."""
    setting = with_exit_kind(scenario.start[None], "threshold")
    setting[:, EXIT], setting[:, RATE] = 0.5, 0.8
    return lambda observation, episodes, window: setting.expand(len(observation), -1)


def test_leaving_costs_what_a_batch_that_all_leaves_there_costs(gated: Scenario) -> None:
    kept = torch.tensor([[64.0, 24.0, 24.0, 24.0], [20.0, 6.0, 8.0, 4.0]])
    cost = gated.exit_cost(kept)
    assert cost.shape == (2, 3, 2)
    assert (cost.diff(dim=1) > 0).all()  # later is dearer
    assert (cost[0] > cost[1]).all()
    third = gated.profile.cost(gated.template, kept, torch.tensor([[0.0, 0.0, 1.0]] * 2), torch.full((2,), 0.5))
    torch.testing.assert_close(cost[:, 2], torch.stack([third.latency_ratio, third.energy_ratio], dim=-1))
    # by hand: the smaller student's MACs of its first block, first head and first gate
    first = gated.profile.cost(gated.template, kept[1:], torch.tensor([[1.0, 0.0, 0.0]]), torch.full((1,), 0.5))
    assert float(first.macs) == 20 * 6 + 6 * 10 + 11


def test_the_student_that_ships_answers_as_its_gates_decided(gated: Scenario) -> None:
    done = distil(gated, constant(gated), 3, lambda row, observation: None)
    assert done.student.architecture()["gated"] is True
    rates = done.figures["exit_rates"]
    assert rates[2] < 1.0  # some leave early
    assert done.figures["compacted_accuracy"] == pytest.approx(done.figures["accuracy"], abs=1e-6)
    assert done.figures["accuracy"] > 0.3


def test_gates_train_in_lock_step_under_any_controller(gated: Scenario) -> None:
    tasks = gated.config.task.with_preference(Preference(0.3))
    together = run(gated, constant(gated), [2**60, 2**60 + 1], tasks, final_split="validation")
    alone = run(gated, constant(gated), [2**60 + 1], tasks, final_split="validation")
    assert together.score[1] == pytest.approx(alone.score[0], abs=0.02)  # float rounding may move a sample or two
