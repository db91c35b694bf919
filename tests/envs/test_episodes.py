"""What a population does besides training: students copied from others, and exits moved without training."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlkd.agents.policy.controllers import run
from rlkd.data import Range
from rlkd.envs import CONTROLS, OBSERVATIONS, Scenario
from rlkd.envs.episodes import CAUTION, Episodes, cautious, reference_savings
from rlkd.envs.observation import REFERENCES, SAVINGS, TABLE
from rlkd.teachers.landmarks import LANDMARKS

SEED = 2**60 + 5
EXIT, KEEP, RATE = (CONTROLS.index(name) for name in ("exit_threshold", "unit_keep", "learning_rate"))
FIRST, THRESHOLD = (CONTROLS.index(name) for name in ("exit_first", "exit_by_threshold"))
ALL_FIRST: dict[int, float] = {CONTROLS.index("exit_never"): 0.0, FIRST: 1.0}
BY_THRESHOLD: dict[int, float] = {CONTROLS.index("exit_never"): 0.0, THRESHOLD: 1.0}
KNOWN = [OBSERVATIONS.index(name) for group in ("goal", "teacher", "savings") for name in TABLE[group]]


def settings(scenario: Scenario, *changes: dict[int, float]) -> Tensor:
    """The start setting of each student with some unit controls changed."""
    u = scenario.start.expand(len(changes), -1).clone()
    for row, changed in enumerate(changes):
        for column, value in changed.items():
            u[row, column] = value
    return u


def trained(scenario: Scenario, u: Tensor, num_windows: int, seeds: list[int] | None = None) -> Episodes:
    episodes = Episodes(scenario, len(u))
    episodes.reset(seeds or [SEED] * len(u))
    for _ in range(num_windows):
        episodes.step(u)
    return episodes


def test_a_copy_goes_on_exactly_as_its_source(scenario: Scenario) -> None:
    different = settings(scenario, {KEEP: 0.6, **ALL_FIRST}, {RATE: 0.2, EXIT: 0.6, **BY_THRESHOLD}, {RATE: 0.9})
    copied, untouched = trained(scenario, different, 2), trained(scenario, different, 2)
    before = untouched.evaluate("validation")[2]
    assert len(set(before.tolist())) == 3
    copied.copy_rows(torch.tensor([0, 0, 2]))
    assert torch.equal(copied.u, different[[0, 0, 2]])
    assert torch.equal(copied.evaluate("validation")[2], before[[0, 0, 2]])
    same = settings(scenario, *({KEEP: 0.8, EXIT: 0.4, RATE: 0.5, **BY_THRESHOLD},) * 3)
    for _ in range(2):
        now, reference = copied.step(same), untouched.step(same)
        for field in ("observation", "reward", "score"):
            torch.testing.assert_close(getattr(now, field)[0], getattr(reference, field)[0], atol=0, rtol=0)
            torch.testing.assert_close(getattr(now, field)[1], getattr(now, field)[0], atol=0, rtol=0)
            torch.testing.assert_close(getattr(now, field)[2], getattr(reference, field)[2], atol=0, rtol=0)
    for name, stacked in copied.students.state_dict().items():
        assert torch.equal(stacked[0], stacked[1]), name
        assert torch.equal(stacked[[0, 2]], untouched.students.state_dict()[name][[0, 2]]), name


def test_a_copy_keeps_its_own_task_and_batches(scenario: Scenario) -> None:
    u = settings(scenario, {}, {})
    episodes = trained(scenario, u, 1, [SEED, SEED + 1])
    tasks = list(episodes.tasks)
    episodes.copy_rows(torch.tensor([0, 0]))
    assert episodes.tasks == tasks
    episodes.step(u)
    first = episodes.students.state_dict()["layers.0.weight"]
    assert not torch.equal(first[0], first[1])


def test_one_student_has_nobody_to_copy(scenario: Scenario) -> None:
    with pytest.raises(ValueError, match="got one student"):
        trained(scenario, settings(scenario, {}), 0).copy_rows(torch.tensor([0]))


@pytest.mark.parametrize("num_students", [1, 3])
def test_moving_the_exit_changes_nothing_else(scenario: Scenario, num_students: int) -> None:
    pruned = settings(
        scenario, *({KEEP: 0.6, CONTROLS.index("feature_keep"): 0.7, EXIT: 0.5, **BY_THRESHOLD},) * num_students
    )
    episodes = trained(scenario, pruned, 3, [SEED + i for i in range(num_students)])
    before, masks, threshold = episodes.evaluate("validation"), episodes.students.masks(), episodes.threshold
    parameters = episodes.students.state_dict()
    episodes.set_exit(torch.full((num_students,), 1.0))
    late = episodes.evaluate("validation")[0]
    assert torch.equal(late.exit_rates[:, -1], torch.ones(num_students))
    torch.testing.assert_close(late.exit_accuracy, before[0].exit_accuracy, atol=0, rtol=0)
    for now, then in zip(episodes.students.masks(), masks, strict=True):
        assert torch.equal(now, then)
    for name, parameter in episodes.students.state_dict().items():
        assert torch.equal(parameter, parameters[name]), name
    episodes.set_exit(threshold)
    assert torch.equal(episodes.u, pruned)
    assert torch.equal(episodes.evaluate("validation")[2], before[2])


def test_tuning_the_exit_of_pruned_students_never_costs_validation_score(scenario: Scenario) -> None:
    seeds = [SEED + i for i in range(6)]
    pruned = settings(scenario, {KEEP: 0.6, CONTROLS.index("feature_keep"): 0.7, **ALL_FIRST})[0]
    fixed, tuned = (
        run(
            scenario,
            lambda o, e, w: pruned.expand_as(e.start),
            seeds,
            scenario.config.task,
            final_split="validation",
            tune_exit=t,
        )
        for t in (False, True)
    )
    assert (tuned.score >= fixed.score).all()


def test_savings_of_reference_students_are_those_of_students_that_really_look_like_them(scenario: Scenario) -> None:
    found = dict(zip(SAVINGS, reference_savings(scenario).tolist(), strict=True))
    for name, (feature_keep, unit_keep) in REFERENCES.items():
        row = dict(ALL_FIRST)
        for control, wanted in (("feature_keep", feature_keep), ("unit_keep", unit_keep)):
            low, high = getattr(scenario.config.controls, control)
            row[CONTROLS.index(control)] = math.log(wanted / low) / math.log(high / low)
        episodes = trained(scenario, settings(scenario, row), 1)
        _, cost, _ = episodes.evaluate("validation")
        assert found[f"latency_saving_{name}"] == pytest.approx(float(1 - cost.latency_ratio), abs=1e-5)
        assert found[f"energy_saving_{name}"] == pytest.approx(float(1 - cost.energy_ratio), abs=1e-5)


def test_known_figures_are_those_of_each_students_own_task_however_it_was_reset(goal_scenario: Scenario) -> None:
    scenario = goal_scenario
    episodes, alone = Episodes(scenario, 3), Episodes(scenario, 1)
    episodes.reset([SEED, SEED + 1, SEED + 2])
    seen = episodes.reset([SEED + 7], torch.tensor([1]))
    for row, seed in enumerate((SEED, SEED + 7, SEED + 2)):
        torch.testing.assert_close(seen[row, KNOWN], alone.reset([seed])[0, KNOWN])
        torch.testing.assert_close(episodes.floors[row], alone.floors[0])
        assert episodes.latency_limit[row] == alone.latency_limit[0]
    resumed = Episodes(scenario, 3)
    resumed.load_training_state(episodes.training_state())
    u = settings(scenario, {}, {}, {})
    torch.testing.assert_close(resumed.step(u).observation, episodes.step(u).observation, atol=0, rtol=0)
    assert torch.equal(resumed.floors, episodes.floors)


def test_figures_of_several_teachers_are_their_means(scenario: Scenario) -> None:
    task = dataclasses.replace(scenario.config.task, num_teachers=Range(2, 3))
    several = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task))
    episodes = Episodes(several, 4)
    observation, s = episodes.reset([3, 4, 5, 6]), scenario.signals
    assert {len(t.teachers) for t in episodes.tasks} == {2, 3}
    for row, drawn in enumerate(episodes.tasks):
        who, anchor = list(drawn.teachers), float(episodes.reference[row, 0])  # without a floor
        agreement = sum(float(s.agreement(t, drawn.samples, drawn.labels)) for t in who) / len(who)
        expected = {
            "teacher_margin": float(s.accuracy[who].mean()) - anchor,
            "teacher_label_agreement": agreement,
        }
        alone = [dataclasses.replace(drawn, teacher=t, others=()) for t in who]
        reached = s.landmarks(scenario.data, alone).mean(0).tolist()
        expected |= {f"landmark_{name}": value - anchor for name, value in zip(LANDMARKS, reached, strict=True)}
        for name, value in expected.items():
            assert float(observation[row, OBSERVATIONS.index(name)]) == pytest.approx(value, abs=1e-6), name


def with_goal(scenario: Scenario, reference: float, keep: float) -> Scenario:
    """The same scenario; every floor is `keep` times `reference`."""
    task = dataclasses.replace(scenario.config.task.with_keep(keep), reference=str(reference))
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task))


@pytest.mark.parametrize("num_students", [1, 3])
def test_all_leave_at_the_first_exit_only_where_it_meets_the_floor(scenario: Scenario, num_students: int) -> None:
    seeds = [SEED + i for i in range(num_students)]
    u = settings(scenario, *({**ALL_FIRST, RATE: 0.8},) * num_students)
    kept = trained(with_goal(scenario, 0.1, 0.5), u, 2, seeds)  # a floor that any student reaches
    failed = trained(with_goal(scenario, 1.0, 1.1), u, 2, seeds)  # a floor that none reaches
    for episodes, exit in ((kept, 0), (failed, -1)):
        metrics, cost, score = episodes.evaluate("validation")
        assert torch.equal(metrics.exit_rates[:, exit], torch.ones(num_students))
        torch.testing.assert_close(metrics.accuracy, metrics.exit_accuracy[:, exit], atol=0, rtol=0)
        assert episodes.threshold.tolist() == pytest.approx([0.1 if exit == 0 else 1.0] * num_students)
        outcome = episodes.step(u)  # what the step reports is what an evaluation finds
        metrics, cost, score = episodes.evaluate("validation")
        torch.testing.assert_close(outcome.metrics.accuracy, metrics.accuracy, atol=0, rtol=0)
        torch.testing.assert_close(outcome.metrics.exit_rates, metrics.exit_rates, atol=0, rtol=0)
        torch.testing.assert_close(outcome.cost.latency_ratio, cost.latency_ratio, atol=1e-6, rtol=0)
        torch.testing.assert_close(outcome.score, score, atol=1e-6, rtol=0)
    assert (kept.evaluate("validation")[1].macs_ratio < failed.evaluate("validation")[1].macs_ratio).all()


def test_the_first_exit_is_judged_against_the_floor_itself(scenario: Scenario) -> None:
    u = settings(scenario, {**ALL_FIRST, RATE: 0.8})
    first = float(trained(with_goal(scenario, 0.1, 0.5), u, 2, [SEED]).evaluate("validation")[0].exit_accuracy[0, 0])
    error = CAUTION * math.sqrt(first * (1 - first) / len(scenario.data.splits["validation"]))
    for below, exit in ((error + 0.004, 0), (error - 0.004, -1)):  # the floor on validation is `error` higher
        episodes = trained(with_goal(scenario, round(first - below, 6), 1.0), u, 2, [SEED])
        assert float(episodes.evaluate("validation")[0].exit_rates[0, exit]) == 1.0


def test_floors_on_validation_are_half_a_standard_error_higher(scenario: Scenario) -> None:
    episodes = Episodes(with_goal(scenario, 0.8, 0.75), 2)
    episodes.reset([1, 2])
    assert episodes.floors[:, 1].tolist() == pytest.approx([0.6, 0.6])
    error = math.sqrt(0.6 * 0.4 / 450)
    assert episodes.floors[:, 0].tolist() == pytest.approx([0.6 + 0.5 * error] * 2)
    plain = Episodes(scenario, 2)
    plain.reset([1, 2])
    assert plain.floors.tolist() == [[0.0, 0.0]] * 2


def test_floors_on_validation_are_raised_by_half_a_standard_error_and_stay_reachable() -> None:
    floors = cautious(torch.tensor([[0.9, 0.8], [0.999, 0.999], [1.0, 1.0], [1.02, 1.02], [0.0, 0.0]]), 100)
    # sqrt(0.9 * 0.1 / 100) = 0.03
    assert floors[:, 0].tolist() == pytest.approx([0.915, 1.0, 1.0, 1.02, 0.0])
    assert floors[:, 1].tolist() == pytest.approx([0.8, 0.999, 1.0, 1.02, 0.0])
