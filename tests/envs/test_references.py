"""Reference accuracies, floors and warm starts: what is trained once, and that it is the same whatever asked for it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from rlkd.data import Range, TaskDistribution, draw_task
from rlkd.envs import EnvConfig, Scenario, build_scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.references import References
from rlkd.errors import UserError
from rlkd.students import TrainConfig


def changed(scenario: Scenario, task: TaskDistribution | None = None, **changes: int) -> Scenario:
    """The same scenario with another config and no reference known yet."""
    config = dataclasses.replace(scenario.config, task=task or scenario.config.task, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(scenario, config=config, known=References())


@pytest.fixture
def floored(scenario: Scenario) -> Scenario:
    return changed(scenario, scenario.config.task.with_keep(0.98))


def test_a_reference_is_what_the_dense_student_of_the_task_reaches(floored: Scenario) -> None:
    episodes = Episodes(floored, 3)
    episodes.reset([5, 6, 7])
    dense = Episodes(floored, 3)
    dense.reset([5, 6, 7])
    for _ in range(floored.config.num_windows):
        dense.step(dense.start)  # the published setting is the start here
    for column, split in enumerate(("validation", "test")):
        accuracy = dense.evaluate(split)[0].accuracy  # type: ignore[arg-type]
        torch.testing.assert_close(episodes.reference[:, column], accuracy, atol=0, rtol=0)
    torch.testing.assert_close(episodes.floors[:, 1], 0.98 * episodes.reference[:, 1])


def test_a_second_call_trains_nothing_and_gives_the_same_bytes(floored: Scenario) -> None:
    tasks = [Episodes(floored, 1)._draw(seed, seed) for seed in (1, 2, 3)]
    first = floored.references(tasks)
    known = dict(floored.known.accuracy)

    def no_students(num_students: int) -> None:
        raise AssertionError("a reference is trained anew")

    again = dataclasses.replace(floored)
    object.__setattr__(again, "students", no_students)
    assert torch.equal(again.references(tasks[::-1]).flip(0), first)
    assert floored.known.accuracy == known


@pytest.mark.parametrize("warm_windows", [0, 2])
def test_references_and_warm_starts_do_not_depend_on_what_they_were_trained_beside(
    double_scenario: Scenario, warm_windows: int
) -> None:
    task = double_scenario.config.task.with_keep(0.98)
    together, apart = (changed(double_scenario, task, warm_windows=warm_windows) for _ in range(2))
    many, one = Episodes(together, 3), Episodes(apart, 1)
    many.reset([5, 6, 7])
    for row, seed in enumerate((5, 6, 7)):
        one.reset([seed])
        torch.testing.assert_close(one.reference[0], many.reference[row], atol=0, rtol=0)
        mine, single = many.students.state_dict(), one.students.state_dict()
        for name in mine:
            torch.testing.assert_close(mine[name][row], single[name][0], atol=1e-9, rtol=1e-9)


def test_a_partial_reset_gives_the_new_task_its_own_reference(floored: Scenario) -> None:
    episodes = Episodes(floored, 3)
    episodes.reset([5, 6, 7])
    before = episodes.reference.clone()
    episodes.reset([8], torch.tensor([1]))
    alone = Episodes(floored, 3)
    alone.reset([5, 8, 7])
    assert torch.equal(episodes.reference, alone.reference)
    assert torch.equal(episodes.reference[[0, 2]], before[[0, 2]])
    assert not torch.equal(episodes.reference[1], before[1])


def test_a_reference_may_be_the_teacher_or_a_number(floored: Scenario) -> None:
    task = floored.config.task
    stated = Episodes(changed(floored, dataclasses.replace(task, reference="0.91")), 2)
    stated.reset([1, 2])
    assert stated.reference.flatten().tolist() == pytest.approx([0.91] * 6)
    taught = Episodes(changed(floored, dataclasses.replace(task, reference="teacher")), 2)
    taught.reset([1, 2])
    s, data = floored.signals, floored.data
    for row, drawn in enumerate(taught.tasks):
        for column, split in enumerate(("validation", "test")):
            index = data.splits[split]  # type: ignore[index]
            right = (s.logits[drawn.teacher, index].argmax(-1) == data.labels[index]).float().mean()
            assert float(taught.reference[row, column]) == pytest.approx(float(right), abs=1e-6)
    for bad in ("densest", "0", "1.5", "nan", ""):
        with pytest.raises(UserError, match=r"goal\.reference: got .*allowed: teacher, dense, or an accuracy"):
            dataclasses.replace(task, reference=bad).check()


def parameters(episodes: Episodes) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in episodes.students.state_dict().items()}


def test_a_warm_start_is_the_dense_training_of_that_many_windows(floored: Scenario) -> None:
    warm = Episodes(changed(floored, warm_windows=2), 2)
    warm.reset([5, 6])
    cold = Episodes(floored, 2)
    cold.reset([5, 6])
    for _ in range(2):
        cold.step(cold.start)
    for name, tensor in parameters(cold).items():
        assert torch.equal(tensor, parameters(warm)[name]), name
    assert warm.window.tolist() == [0, 0]
    # the reference has the warm windows besides those of an episode
    dense = Episodes(changed(floored, num_windows=floored.config.num_windows + 2), 2)
    dense.reset([5, 6])
    assert torch.equal(warm.reference, dense.reference)


def test_a_warm_start_comes_with_a_partial_reset_and_survives_a_restore(floored: Scenario) -> None:
    scenario = changed(floored, warm_windows=1)
    episodes = Episodes(scenario, 3)
    episodes.reset([5, 6, 7])
    episodes.step(episodes.start)
    episodes.reset([8], torch.tensor([1]))
    fresh = Episodes(scenario, 1)
    fresh.reset([8])
    for name, tensor in parameters(fresh).items():
        assert torch.equal(parameters(episodes)[name][1], tensor[0]), name
    resumed = Episodes(changed(floored, warm_windows=1), 3)
    resumed.load_training_state(episodes.training_state())
    now, then = resumed.step(resumed.start), episodes.step(episodes.start)
    assert torch.equal(now.observation, then.observation)
    assert torch.equal(now.score, then.score)


def test_warm_windows_are_checked(config: EnvConfig) -> None:
    with pytest.raises(UserError, match="warm_windows: got -1; allowed: at least 0"):
        dataclasses.replace(config, warm_windows=-1).check()
    assert build_scenario(dataclasses.replace(config, train=TrainConfig(steps_per_window=1))).known.accuracy == {}


def test_references_of_a_scenario_that_trains_otherwise_are_not_taken(scenario: Scenario) -> None:
    shorter = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, num_windows=1))
    assert shorter.known is not scenario.known
    other = dataclasses.replace(scenario, signals=dataclasses.replace(scenario.signals))
    assert other.known is not scenario.known  # of other teachers
    goal = dataclasses.replace(scenario.config, task=scenario.config.task.with_keep(0.9))
    assert dataclasses.replace(scenario, config=goal).known is scenario.known  # a goal changes no training


def test_a_seed_with_other_labels_has_a_reference_of_its_own(scenario: Scenario) -> None:
    own = dataclasses.replace(scenario, known=References())
    few = dataclasses.replace(own.config.task, num_labels=Range(60.0, 60.0))
    many = dataclasses.replace(own.config.task, num_labels=Range(300.0, 300.0))
    tasks = [draw_task(2**60, some, own.data, len(own.signals.accuracy)) for some in (few, many)]
    first, second = (own.references([task]) for task in tasks)
    assert not torch.equal(first, second)
    assert torch.equal(own.references(tasks), torch.cat([first, second]))
