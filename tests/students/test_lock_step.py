import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlkd.data import draw_task
from rlkd.envs import Scenario
from rlkd.models import GateConfig, StudentConfig, build_student
from rlkd.students import Controls, Metrics, Population, SoloStudent, TrainConfig

TRAIN = TrainConfig(steps_per_window=15, batch_size=24, max_rollbacks=0)


def controls_of(rows: list[int]) -> Controls:
    """Different controls for every student, by its number."""
    i = torch.tensor(rows, dtype=torch.float32)
    weights = torch.stack([1 + i, 2.0 + 0 * i, 0.5 + 0 * i, 0.3 + 0.1 * i], dim=-1)
    return Controls(
        weights / weights.sum(-1, keepdim=True), 1 + i, 1 - 0.2 * i, 1 - 0.25 * i, 0.3 + 0.2 * i, 1e-3 * (1 + i)
    )


def population(scenario: Scenario, student: StudentConfig, seeds: list[int], num_steps: int = 15) -> Population:
    structure = build_student(student, scenario.data.input_shape, scenario.data.num_classes)
    train = dataclasses.replace(TRAIN, steps_per_window=num_steps)
    students = Population(structure, scenario.data, scenario.signals, len(seeds), train, exit_cost)
    students.reset([draw_task(seed, scenario.config.task, scenario.data, 3) for seed in seeds])
    return students


def assert_rows_equal(left: dict[str, Tensor], right: dict[str, Tensor], rows: list[int], others: list[int]) -> None:
    for name, stacked in left.items():
        assert torch.equal(stacked[rows], right[name][others]), name


GATED = StudentConfig(widths=(12, 12, 12), exits=(1, 2), gate=GateConfig(enabled=True, steps_per_rise=15))
STUDENTS = {
    "mlp": StudentConfig(),
    "conv": StudentConfig("conv", (4, 8), (1,)),
    "gated": GATED,
    "wide": StudentConfig(widths=(160, 12), exits=(1,)),
}


def exit_cost(kept: Tensor) -> Tensor:
    """Leaving later costs more, and more units cost more."""
    return torch.arange(1, 4)[None, :, None] * (kept.sum(-1) / 200)[:, None, None].expand(-1, 3, 2)


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_population_and_solo_student_agree_after_sixty_updates(
    double_scenario: Scenario, student: StudentConfig
) -> None:
    scenario = double_scenario
    together = population(scenario, student, [0, 1, 2])
    for _ in range(4):
        telemetry = together.train_window(controls_of([0, 1, 2]))
    metrics = together.evaluate("validation")
    for row in range(3):
        structure = build_student(student, scenario.data.input_shape, scenario.data.num_classes)
        alone = SoloStudent(structure, scenario.data, scenario.signals, config=TRAIN, exit_cost=exit_cost)
        alone.reset([draw_task(row, scenario.config.task, scenario.data, 3)])
        for _ in range(4):
            single = alone.train_window(controls_of([row]))
        for name, parameter in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name][row], parameter[0], atol=1e-8, rtol=1e-7)
        for field in ("losses", "gradient_norms", "gradient_cosine"):
            torch.testing.assert_close(
                getattr(telemetry, field)[row], getattr(single, field)[0], atol=1e-7, rtol=1e-6, msg=field
            )
        ours: Metrics = alone.evaluate("validation")
        for field in ("kept", "exit_loss", "divergence", "spread"):
            torch.testing.assert_close(getattr(metrics, field)[row], getattr(ours, field)[0], atol=1e-7, rtol=1e-6)
        for field in ("accuracy", "exit_accuracy", "exit_rates", "agreement"):
            assert torch.equal(getattr(metrics, field)[row], getattr(ours, field)[0]), field
        assert not single.diverged.any()
        assert not telemetry.diverged[row]


def test_weights_that_read_many_units_take_smaller_steps(scenario: Scenario) -> None:
    """Adam's first step is the learning rate for each weight that has a gradient, whatever its size."""
    students = population(scenario, StudentConfig(widths=(256, 12), exits=(1,)), [0], num_steps=1)
    before = students.state_dict()
    students.train_window(controls_of([0]))
    after = students.state_dict()
    largest = {name: float((after[name] - before[name]).abs().max()) for name in before if "weight" in name}
    wanted = {"layers.0.weight": 1e-3, "layers.1.weight": 5e-4, "heads.0.weight": 5e-4, "heads.1.weight": 1e-3}
    assert {name: largest[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)


def test_training_learns_something(scenario: Scenario) -> None:
    students = population(scenario, StudentConfig(), [5])
    before = float(students.evaluate("validation").exit_accuracy[0, -1])
    controls = Controls(
        torch.tensor([[0.5, 0.5, 0.0, 0.0]]),
        torch.ones(1),
        torch.ones(1),
        torch.ones(1),
        torch.ones(1),
        torch.full((1,), 5e-3),
    )
    for _ in range(6):
        students.train_window(controls)
    assert float(students.evaluate("validation").exit_accuracy[0, -1]) > before + 0.2


def test_a_student_learns_the_same_whoever_stands_beside_it(scenario: Scenario) -> None:
    first, second = (
        population(scenario, StudentConfig(), [7, 1, 2]),
        population(scenario, StudentConfig(), [3, 9, 7, 4]),
    )
    first.train_window(controls_of([0, 1, 2]))
    second.train_window(controls_of([3, 1, 0, 2]))
    for name, stacked in first.state_dict().items():
        torch.testing.assert_close(stacked[0], second.state_dict()[name][2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rate", [1e30, math.nan])
def test_a_diverged_neighbour_is_flagged_and_touches_nobody(scenario: Scenario, rate: float) -> None:
    healthy, mixed = population(scenario, StudentConfig(), [0, 1, 2]), population(scenario, StudentConfig(), [0, 1, 2])
    good = controls_of([0, 1, 2])
    rates = good.learning_rate.clone()
    rates[1] = rate
    bad = Controls(good.weights, good.temperature, good.feature_keep, good.unit_keep, good.exit_threshold, rates)
    for _ in range(2):
        fine, broken = healthy.train_window(good), mixed.train_window(bad)
    assert fine.diverged.tolist() == [False, False, False]
    assert broken.diverged.tolist() == [False, True, False]
    assert_rows_equal(healthy.state_dict(), mixed.state_dict(), [0, 2], [0, 2])


def test_resetting_some_students_leaves_the_others_alone(scenario: Scenario) -> None:
    kept, reset = population(scenario, StudentConfig(), [0, 1, 2]), population(scenario, StudentConfig(), [0, 1, 2])
    for students in (kept, reset):
        students.train_window(controls_of([0, 1, 2]))
    reset.reset([draw_task(8, scenario.config.task, scenario.data, 3)], torch.tensor([1]))
    assert not torch.equal(kept.state_dict()["layers.0.weight"][1], reset.state_dict()["layers.0.weight"][1])
    for students in (kept, reset):
        students.train_window(controls_of([0, 1, 2]))
    assert_rows_equal(kept.state_dict(), reset.state_dict(), [0, 2], [0, 2])
    fresh = population(scenario, StudentConfig(), [0, 8, 2])
    fresh.train_window(controls_of([0, 1, 2]))
    assert_rows_equal(fresh.state_dict(), reset.state_dict(), [1], [1])


def test_reset_wants_a_task_for_each_student(scenario: Scenario) -> None:
    with pytest.raises(ValueError, match="1 tasks for 2 students"):
        population(scenario, StudentConfig(), [0, 1]).reset([draw_task(0, scenario.config.task, scenario.data, 3)])


def test_a_weight_of_an_unavailable_family_goes_to_the_others(scenario: Scenario) -> None:
    # the teachers are MLPs: a convolutional student has no attention to match, so this weight changes nothing
    conv = StudentConfig("conv", (4, 8), (1,))
    with_it, without = population(scenario, conv, [0]), population(scenario, conv, [0])
    a, b = torch.tensor([[0.4, 0.1, 0.0, 0.5]]), torch.tensor([[0.8, 0.2, 0.0, 0.0]])
    rest = (torch.ones(1), torch.ones(1), torch.ones(1), torch.ones(1), torch.full((1,), 1e-3))
    with_it.train_window(Controls(a, *rest))
    without.train_window(Controls(b, *rest))
    for name, parameter in with_it.state_dict().items():
        torch.testing.assert_close(parameter, without.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_a_student_of_three_equals_itself_among_two_others_after_four_windows(double_scenario: Scenario) -> None:
    three = population(double_scenario, StudentConfig(), [7, 1, 2])
    two = population(double_scenario, StudentConfig(), [9, 7])
    for _ in range(4):
        three.train_window(controls_of([1, 0, 2]))
        two.train_window(controls_of([3, 1]))
    for name, stacked in three.state_dict().items():
        torch.testing.assert_close(stacked[0], two.state_dict()[name][1], atol=1e-8, rtol=1e-7)
    for mine, other in zip(three.masks(), two.masks(), strict=True):
        assert torch.equal(mine[0], other[1])


def test_the_same_seeds_give_the_same_students_to_the_bit(scenario: Scenario) -> None:
    first, second = (population(scenario, StudentConfig(), [4, 5]) for _ in range(2))
    for _ in range(2):
        one, two = first.train_window(controls_of([0, 1])), second.train_window(controls_of([0, 1]))
    assert_rows_equal(first.state_dict(), second.state_dict(), [0, 1], [0, 1])
    assert torch.equal(one.losses, two.losses)
    other = population(scenario, StudentConfig(), [4, 6])
    assert not torch.equal(first.state_dict()["layers.0.weight"][1], other.state_dict()["layers.0.weight"][1])


def test_a_student_alone_is_flagged_when_it_diverges(scenario: Scenario) -> None:
    alone = SoloStudent(build_student(StudentConfig(), (8, 8), 10), scenario.data, scenario.signals, config=TRAIN)
    task = draw_task(0, scenario.config.task, scenario.data, 3)
    alone.reset([task])
    good = controls_of([0])
    assert alone.train_window(good).diverged.tolist() == [False]
    assert alone.train_window(dataclasses.replace(good, learning_rate=torch.tensor([1e30]))).diverged.tolist() == [True]
    alone.reset([task])  # a new episode starts from finite parameters again
    assert alone.train_window(good).diverged.tolist() == [False]


def test_gates_learn_what_leaving_is_worth(scenario: Scenario) -> None:
    """Where leaving early is free and staying costs all, gates come to let more go, and the other way round."""
    config = StudentConfig(gate=GateConfig(enabled=True, beta_start=1.0, beta_end=1.0))

    def rate(costs: list[float]) -> float:
        def cost(kept: Tensor) -> Tensor:
            return torch.tensor(costs)[None, :, None].expand(len(kept), -1, 2)

        students = Population(
            build_student(config, scenario.data.input_shape, 10), scenario.data, scenario.signals, 2, TRAIN, cost
        )
        students.reset([draw_task(seed, scenario.config.task, scenario.data, 3) for seed in (0, 1)])
        one = torch.ones(2)
        weights = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(2, -1)
        for _ in range(6):
            students.train_window(Controls(weights, one, one, one, 0.5 * one, 1e-2 * one))
        return float(students.evaluate("validation").exit_rates[:, 0].mean())

    cheap_early, cheap_late = rate([0.0, 3.0]), rate([3.0, 0.0])
    assert cheap_early > 0.9
    assert cheap_late < 0.1


def test_a_gated_student_must_know_what_leaving_costs(scenario: Scenario) -> None:
    gated = build_student(GATED, scenario.data.input_shape, 10)
    with pytest.raises(ValueError, match="exit_cost: got None"):
        Population(gated, scenario.data, scenario.signals, 2, TRAIN)
    with pytest.raises(ValueError, match="exit_cost: got None"):
        SoloStudent(gated, scenario.data, scenario.signals, config=TRAIN)
