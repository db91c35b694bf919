"""A student that diverges goes back to its last good window alone, with smaller steps, and not for ever."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlkd.data import Task, draw_task
from rlkd.envs import Scenario
from rlkd.envs.episodes import Episodes
from rlkd.models import StudentConfig, build_student
from rlkd.students import Controls, Population, SoloStudent, Telemetry, TrainConfig
from rlkd.students.interface import family_weights
from rlkd.students.rollback import STEP_SHRINK, Rollbacks

TRAIN = TrainConfig(steps_per_window=3, batch_size=8)
INFECTED = 2  # the teacher whose signals a test spoils


def controls(num_students: int, rate: float = 3e-3) -> Controls:
    i = torch.arange(num_students, dtype=torch.get_default_dtype())
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(num_students, 1)
    return Controls(weights, 2 + i, 1 - 0.1 * i, 1 - 0.1 * i, 0.5 + 0 * i, rate * (1 + i))


def with_rate(c: Controls, row: int, rate: float) -> Controls:
    rates = c.learning_rate.clone()
    rates[row] = rate
    return dataclasses.replace(c, learning_rate=rates)


def tasks(scenario: Scenario, teachers: list[int]) -> list[Task]:
    drawn = [draw_task(seed, scenario.config.task, scenario.data, 3) for seed in range(len(teachers))]
    return [dataclasses.replace(task, teacher=teacher) for task, teacher in zip(drawn, teachers, strict=True)]


def infected(scenario: Scenario, field: str, value: float) -> Scenario:
    """One teacher's signals hold `value`."""
    spoiled = getattr(scenario.signals, field).clone()
    spoiled[INFECTED] = value
    return dataclasses.replace(scenario, signals=dataclasses.replace(scenario.signals, **{field: spoiled}))


def population(scenario: Scenario, teachers: list[int], train: TrainConfig = TRAIN) -> Population:
    made = Population(scenario.new_structure(), scenario.data, scenario.signals, len(teachers), train)
    made.reset(tasks(scenario, teachers))
    return made


def solo(scenario: Scenario, train: TrainConfig = TRAIN, seed: int = 0) -> SoloStudent:
    made = SoloStudent(scenario.new_structure(), scenario.data, scenario.signals, config=train)
    made.reset([dataclasses.replace(draw_task(seed, scenario.config.task, scenario.data, 3), teacher=0)])
    return made


def everything(students: Population) -> dict[str, Tensor]:
    """All that a student takes along, [N, ...] each."""
    named = {"first": students._first, "second": students._second, "parameter": students._parameters}
    state = {f"{kind} {name}": t.clone() for kind, store in named.items() for name, t in store.items()}
    state |= {f"mask {i}": mask.clone() for i, mask in enumerate(students.masks())}
    return state | {"updates": students._num_updates.clone(), "scale": students._rollbacks.step_scale.clone()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], rows: list[int]) -> None:
    for name, values in left.items():
        assert torch.equal(values[rows], right[name][rows]), name


def huge_gradient(students: Population, row: int) -> None:
    """Its gradients stay finite and leave losses and parameters so; their squares do not."""
    step = students._step

    def spoiled(*arguments: object) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        gradients, rest = step(*arguments)
        for gradient in gradients.values():
            gradient[row] = 1e25
        return gradients, rest

    students._step = spoiled


@settings(max_examples=12, deadline=None)
@given(
    row=st.integers(0, 3),
    at=st.integers(0, 2),
    harm=st.sampled_from(["rate 1e30", "rate nan", "logits inf", "features nan", "gradient 1e25"]),
    limit=st.integers(0, 2),
)
def test_neighbours_of_a_diverging_student_are_untouched_to_the_bit(
    scenario: Scenario, row: int, at: int, harm: str, limit: int
) -> None:
    train = dataclasses.replace(TRAIN, max_rollbacks=limit)
    what, value = harm.split()
    ill = infected(scenario, what, float(value)) if what in ("logits", "features") else scenario
    teachers = [0, 1, 0, 1]
    calm, mixed = population(ill, teachers, train), population(ill, teachers, train)
    if what in ("logits", "features"):
        teachers[row] = INFECTED
        mixed.reset([tasks(ill, teachers)[row]], torch.tensor([row]))
    others = [i for i in range(4) if i != row]
    rollbacks = 0
    for window in range(4):
        good = controls(4)
        if what == "gradient" and window == at:
            huge_gradient(mixed, row)
        bad = with_rate(good, row, float(value)) if what == "rate" and window >= at else good
        fine, told = calm.train_window(good), mixed.train_window(bad)
        is_broken = what in ("logits", "features") or window >= at
        rollbacks += is_broken
        assert fine.num_rollbacks.tolist() == [0] * 4
        assert not fine.diverged.any()
        assert told.num_rollbacks[row] == min(rollbacks, limit)
        assert bool(told.diverged[row]) == (rollbacks > limit)
        assert_same(everything(calm), everything(mixed), others)
        for name in ("losses", "gradient_norms", "gradient_cosine", "diverged", "num_rollbacks"):
            assert torch.equal(getattr(fine, name)[others], getattr(told, name)[others]), name
        left, right = calm.evaluate("validation"), mixed.evaluate("validation")
        for field in dataclasses.fields(left):
            assert torch.equal(getattr(left, field.name)[others], getattr(right, field.name)[others]), field.name


def test_a_rolled_back_student_has_its_last_good_state_and_goes_on_with_smaller_steps(scenario: Scenario) -> None:
    students, reference = population(scenario, [0, 1]), population(scenario, [0, 1])
    good = controls(2)
    for p in (students, reference):
        p.train_window(good)
    before = everything(students)
    told = students.train_window(with_rate(good, 1, 1e30))
    assert told.num_rollbacks.tolist() == [0, 1]
    assert told.diverged.tolist() == [False, False]
    after = everything(students)
    for name in (n for n in before if n not in ("scale",) and not n.startswith("mask")):
        assert torch.equal(before[name][1], after[name][1]), name
        assert not torch.equal(before[name][0], after[name][0]), name
    assert after["scale"].tolist() == [1.0, pytest.approx(STEP_SHRINK)]
    assert int(students._num_updates[1]) == TRAIN.steps_per_window
    # by hand: the reference spends the same batches untrained, then takes steps of a tenth
    torch.randint(reference._num_samples[1], (3, 8), generator=reference._batches[1])
    students.train_window(good)
    reference.train_window(with_rate(good, 1, float(good.learning_rate[1] * torch.tensor(STEP_SHRINK))))
    mine, theirs = everything(students), everything(reference)
    for name in (n for n in mine if n != "scale"):
        assert torch.equal(mine[name][1], theirs[name][1]), name


def test_a_new_episode_begins_with_whole_steps(scenario: Scenario) -> None:
    students = population(scenario, [0, 1])
    told = [students.train_window(with_rate(controls(2), 1, 1e30)) for _ in range(3)]
    assert [t.num_rollbacks.tolist() for t in told] == [[0, 1], [0, 2], [0, 2]]
    assert [t.diverged.tolist() for t in told] == [[False, False], [False, False], [False, True]]
    students.reset([tasks(scenario, [0, 1])[1]], torch.tensor([1]))
    assert told[-1].num_rollbacks.tolist() == [0, 2]  # what was told stays told
    assert told[-1].diverged.tolist() == [False, True]
    fresh = population(scenario, [0, 1])
    again, first = students.train_window(controls(2)), fresh.train_window(controls(2))
    assert again.num_rollbacks.tolist() == [0, 0]
    assert not again.diverged.any()
    assert torch.equal(again.losses[1], first.losses[1])
    assert_same(everything(students), everything(fresh), [1])


def test_who_diverged_stays_so_even_if_its_numbers_would_be_finite_again(scenario: Scenario) -> None:
    students = population(scenario, [0, 1], dataclasses.replace(TRAIN, max_rollbacks=0))
    assert students.train_window(with_rate(controls(2), 0, math.nan)).diverged.tolist() == [True, False]
    assert students.train_window(controls(2)).diverged.tolist() == [True, False]
    assert all(torch.isfinite(p).all() for p in students.state_dict().values())


def test_a_copy_takes_the_rollbacks_of_its_source_along(scenario: Scenario) -> None:
    students = population(scenario, [0, 0])
    students.train_window(with_rate(controls(2), 1, 1e30))
    students.copy_rows(torch.tensor([1, 1]))
    assert students._rollbacks.count.tolist() == [1, 1]
    assert students._rollbacks.step_scale.tolist() == [pytest.approx(STEP_SHRINK)] * 2


def windows(students: Population | SoloStudent, row: Callable[[Controls], Controls], rates: list[float]) -> Telemetry:
    for rate in rates:
        told = students.train_window(row(with_rate(controls(3), 1, rate)))
    return told


@pytest.mark.parametrize("rates", [[3e-3, 1e300, 3e-3, 3e-3], [math.nan, 3e-3, 3e-3], [1e300] * 3, [1e300] * 5])
def test_population_and_solo_student_roll_back_alike(double_scenario: Scenario, rates: list[float]) -> None:
    together, alone = population(double_scenario, [0, 0, 0]), solo(double_scenario, seed=1)
    many, one = windows(together, lambda c: c, rates), windows(alone, lambda c: c.rows(slice(1, 2)), rates)
    assert many.num_rollbacks[1] == one.num_rollbacks[0] == min(2, sum(not rate < 1 for rate in rates))
    assert many.diverged[1] == one.diverged[0]
    for name, parameter in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name][1], parameter[0], atol=1e-9, rtol=1e-8)
    moments = [alone._optimizer.state[p] for p in alone._module.parameters()]
    assert len(moments) == len(together._first)
    for (name, first), state in zip(together._first.items(), moments, strict=True):
        if state:  # torch keeps none before the first step
            torch.testing.assert_close(first[1], state["exp_avg"], atol=1e-9, rtol=1e-8, msg=name)
            assert float(state["step"]) == float(together._num_updates[1])
        else:
            assert not first[1].any()


def test_a_gradient_whose_square_overflows_counts_alone_too(scenario: Scenario) -> None:
    alone = solo(scenario)
    parameter = next(alone._module.parameters())
    hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, 1e25))
    assert alone.train_window(controls(1)).num_rollbacks.tolist() == [1]
    assert not alone._optimizer.state  # as before its first step
    hook.remove()
    assert alone.train_window(controls(1)).num_rollbacks.tolist() == [1]


@pytest.mark.parametrize("student", [StudentConfig(), StudentConfig("conv", (4, 8), (1,))], ids=["mlp", "conv"])
def test_nothing_changes_for_students_that_do_not_diverge(scenario: Scenario, student: StudentConfig) -> None:
    """The plain loop of Adam steps, written out, gives the same bits and leaves the same random states."""
    structure = build_student(student, scenario.data.input_shape, scenario.data.num_classes)
    guarded, plain = (Population(structure, scenario.data, scenario.signals, 3, TRAIN) for _ in range(2))
    for p in (guarded, plain):
        p.reset(tasks(scenario, [0, 1, 2]))
    c = controls(3)
    for _ in range(3):
        guarded.train_window(c)
        plain.set_controls(c)
        drawn = [torch.randint(n, (3, 8), generator=g) for n, g in zip(plain._num_samples, plain._batches, strict=True)]
        for positions in torch.stack(drawn, dim=1):
            weights = family_weights(c.weights, plain._available)
            gradients, _ = plain._step(
                plain._parameters, *plain._batch(positions), plain._masks, weights, c.temperature, ()
            )
            plain._update(gradients, c.learning_rate)
    assert_same(everything(guarded), everything(plain), [0, 1, 2])
    for mine, theirs in zip(guarded._batches, plain._batches, strict=True):
        assert torch.equal(mine.get_state(), theirs.get_state())


def test_an_episode_goes_on_after_a_rollback_and_its_reward_is_the_change_of_score(scenario: Scenario) -> None:
    episodes = Episodes(scenario, 2)
    episodes.reset([3, 4])
    before = episodes._score.clone()
    huge_gradient(episodes.students, 1)  # type: ignore[arg-type]
    outcome = episodes.step(episodes.start)
    assert outcome.telemetry.num_rollbacks.tolist() == [0, 1]
    assert not outcome.terminated.any()
    assert torch.isfinite(outcome.observation).all()
    torch.testing.assert_close(outcome.reward, outcome.score - before)
    assert outcome.score[1] > 0.0


def test_the_rule_by_hand() -> None:
    rule = Rollbacks(3, 1)
    assert rule.judge(torch.tensor([True, False, True])).tolist() == [False, True, False]
    assert rule.judge(torch.tensor([True, False, False])).tolist() == [False, True, True]
    assert rule.count.tolist() == [0, 1, 1]
    assert rule.step_scale.tolist() == [1.0, pytest.approx(0.1), pytest.approx(0.1)]
    assert rule.diverged.tolist() == [False, True, False]
