import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlkd.data import Range, Task, TaskDistribution, draw_task
from rlkd.envs import Scenario
from rlkd.losses.hard_label import log_probabilities
from rlkd.models import StudentConfig, build_student
from rlkd.students import Controls, Population, SoloStudent, TrainConfig
from rlkd.students.fusion import LEAST_LOG_P, TeacherMix, cues

TRAIN = TrainConfig(steps_per_window=10, batch_size=24)


def task_of(scenario: Scenario, seed: int, count: float) -> Task:
    distribution = TaskDistribution(num_teachers=Range(count, count))
    return draw_task(seed, distribution, scenario.data, len(scenario.signals.accuracy))


def controls(n: int) -> Controls:
    each = torch.ones(n)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(n, 4)
    return Controls(weights, 3 * each, each, 0.5 * each, 0.5 * each, 3e-3 * each)


def test_cues_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [100.0, 0.0]]])  # even odds, 3 : 1, certain
    seen = cues(logits, torch.tensor([[0, 1, 1]]))[0]
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    expected = [[math.log(0.5), 0.5, 1.0], [math.log(0.25), 0.75, quarter], [LEAST_LOG_P, 1.0, 0.0]]
    torch.testing.assert_close(seen, torch.tensor(expected), atol=1e-6, rtol=0)


def mix(scenario: Scenario, tasks: list[Task], max_teachers: int, theta: Tensor | None = None) -> TeacherMix:
    made = TeacherMix(len(tasks), max_teachers)
    made.reset(tasks, torch.arange(len(tasks)))
    if theta is not None:
        made.weigh(theta)
    return made


def test_several_teachers_are_their_mean_until_somebody_weighs_them(scenario: Scenario) -> None:
    tasks = [task_of(scenario, 1, 3), task_of(scenario, 2, 2), task_of(scenario, 3, 1)]
    s, samples = scenario.signals, torch.stack([task.samples[:5] for task in tasks])
    labels = torch.stack([task.labels[:5] for task in tasks])
    logits, features, maps = mix(scenario, tasks, 3).of(s, samples, labels)
    validation = scenario.data.splits["validation"]
    answers = mix(scenario, tasks, 3, torch.ones(3, 3)).answers(s, validation)  # labels are not read, so nor is theta
    for row, task in enumerate(tasks):
        who = list(task.teachers)
        assert len(who) == 3 - row
        torch.testing.assert_close(logits[row], s.logits[who][:, samples[row]].mean(0))
        torch.testing.assert_close(features[row], s.features[who][:, samples[row]].mean(0))
        summed = s.maps[who][:, samples[row]].sum(0)
        torch.testing.assert_close(maps[row], summed / summed.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(answers[row], log_probabilities(s.mean_logits(who, validation)))


def test_weights_by_hand(scenario: Scenario) -> None:
    task = dataclasses.replace(task_of(scenario, 1, 1), teacher=2, others=(0,))
    samples, labels = task.samples[:6], task.labels[:6]
    theta = torch.tensor([[0.7, 2.0, -1.5]])
    logits = mix(scenario, [task], 3, theta).of(scenario.signals, samples[None], labels[None])[0][0]
    for i in range(6):
        told = scenario.signals.logits[[2, 0], samples[i]]  # [2, C]
        p = told.softmax(-1)
        entropy = -(p * p.log()).sum(-1) / math.log(10)
        label = p[:, labels[i]].log().clamp_min(LEAST_LOG_P)
        weights = (0.7 * label + 2.0 * p.amax(-1) - 1.5 * entropy).softmax(0)
        torch.testing.assert_close(logits[i], weights @ told, atol=1e-5, rtol=1e-5)


def test_one_teacher_is_what_it_was(scenario: Scenario) -> None:
    tasks = [task_of(scenario, seed, 1) for seed in range(4)]
    s, samples = scenario.signals, torch.stack([task.samples[:5] for task in tasks])
    labels = torch.stack([task.labels[:5] for task in tasks])
    teacher = torch.tensor([task.teacher for task in tasks])
    for theta in (None, torch.ones(4, 3)):  # nothing to weigh
        told = mix(scenario, tasks, 1, theta).of(s, samples, labels)
        for mine, signal in zip(told, (s.logits, s.features, s.maps), strict=True):
            assert torch.equal(mine, signal[teacher[:, None], samples])
    index = scenario.data.splits["validation"]
    assert torch.equal(mix(scenario, tasks, 1).answers(s, index), log_probabilities(s.logits[:, index])[teacher])


@pytest.mark.parametrize("count", [1, 3])
def test_population_and_solo_student_agree_on_several_teachers(double_scenario: Scenario, count: int) -> None:
    scenario, student, theta = (
        double_scenario,
        StudentConfig(widths=(12, 12)),
        torch.tensor([[0.5, 1.0, -2.0], [0, 0, 0.0]]),
    )
    structure = build_student(student, scenario.data.input_shape, scenario.data.num_classes)
    tasks = [task_of(scenario, seed, count) for seed in (5, 6)]
    together = Population(structure, scenario.data, scenario.signals, 2, TRAIN, max_teachers=3)
    together.reset(tasks)
    together.weigh_teachers(theta)
    told = together.train_window(controls(2))
    for row, task in enumerate(tasks):
        alone = SoloStudent(
            build_student(student, scenario.data.input_shape, 10),
            scenario.data,
            scenario.signals,
            config=TRAIN,
            max_teachers=3,
        )
        alone.reset([task])
        alone.weigh_teachers(theta[[row]])
        single = alone.train_window(controls(1))
        torch.testing.assert_close(single.losses[0], told.losses[row])
        for name, parameter in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name][row], parameter[0], atol=1e-8, rtol=1e-7)
        for split in ("validation", "test"):
            mine, ours = alone.evaluate(split), together.evaluate(split)
            torch.testing.assert_close(mine.divergence[0], ours.divergence[row])
            torch.testing.assert_close(mine.agreement[0], ours.agreement[row])


def test_theta_changes_a_student_of_several_teachers_and_a_reset_forgets_it(scenario: Scenario) -> None:
    def losses(theta: float | None, count: float) -> Tensor:
        students = Population(
            scenario.new_structure(), scenario.data, scenario.signals, 2, TRAIN, scenario.exit_cost, max_teachers=3
        )
        tasks = [task_of(scenario, seed, count) for seed in (5, 6)]
        students.reset(tasks)
        if theta is None:
            students.weigh_teachers(torch.full((2, 3), 2.0))
            students.reset(tasks)
        else:
            students.weigh_teachers(torch.full((2, 3), theta))
        return students.train_window(controls(2)).losses

    assert torch.equal(losses(None, 3), losses(0.0, 3))
    assert not torch.equal(losses(2.0, 3), losses(0.0, 3))
    assert torch.equal(losses(2.0, 1), losses(0.0, 1))


def test_more_teachers_than_room_are_refused(scenario: Scenario) -> None:
    with pytest.raises(ValueError, match="a task of 3 teachers; allowed: up to max_teachers, 2"):
        mix(scenario, [task_of(scenario, 1, 3)], 2)
    with pytest.raises(ValueError, match="max_teachers: got 0"):
        TeacherMix(1, 0)
