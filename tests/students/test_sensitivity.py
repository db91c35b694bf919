import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlkd.data import Task, draw_task
from rlkd.envs import Scenario
from rlkd.losses import FAMILIES, attention_transfer, cross_entropy, hint, response
from rlkd.models import StudentConfig, build_student
from rlkd.models.attention_map import attention_map
from rlkd.students import Controls, Population, SoloStudent, TrainConfig
from rlkd.students.sensitivity import NUM_SAMPLES, Sensitivity, sensitivity

TRAIN = TrainConfig(steps_per_window=5, batch_size=24)
SEEDS = (3, 4, 5)


def controls_of(rows: list[int]) -> Controls:
    """Temperatures 1.5, 3 and 4.5; inputs and units pruned a little more from row to row."""
    i = torch.tensor(rows, dtype=torch.get_default_dtype())
    weights = torch.full((len(rows), 4), 0.25)
    return Controls(weights, 1.5 * (1 + i), 0.9 - 0.1 * i, 0.8 - 0.2 * i, 0.5 + 0 * i, 3e-3 + 0 * i)


def task_of(seed: int, scenario: Scenario) -> Task:
    return draw_task(seed, scenario.config.task, scenario.data, 3)


def measured(scenario: Scenario, students: Population | SoloStudent, rows: list[int]) -> Sensitivity:
    """Train two windows and look."""
    tasks = [task_of(SEEDS[row], scenario) for row in rows]
    students.reset(tasks)
    for _ in range(2):
        students.train_window(controls_of(rows))
    g = torch.Generator().manual_seed(7)
    return sensitivity(
        students,
        scenario.new_structure(),
        tasks,
        controls=controls_of(rows),
        data=scenario.data,
        signals=scenario.signals,
        generator=g,
    )


def solo(scenario: Scenario) -> SoloStudent:
    return SoloStudent(scenario.new_structure(), scenario.data, scenario.signals, config=TRAIN)


def by_hand(
    scenario: Scenario, student: SoloStudent, task: Task, positions: Tensor, chosen: Tensor, t: float
) -> list[float]:
    """d log response / d log T by central differences, and the four cosines by plain autograd."""
    masks = tuple(mask[0] for mask in student.masks())
    state, samples = student.state_dict(), task.samples[positions]

    def losses(temperature: float) -> Tensor:
        outputs = student.student(scenario.data.inputs[samples], masks)
        adapted = outputs.features[-1] @ state["adapter.weight"][0].T + state["adapter.bias"][0]
        s = scenario.signals
        logits, features, maps = (signal[task.teacher, samples] for signal in (s.logits, s.features, s.maps))
        return torch.stack(
            [
                torch.stack([cross_entropy(z, task.labels[positions]) for z in outputs.logits]).mean(),
                torch.stack([response(z, logits, temperature) for z in outputs.logits]).mean(),
                hint(adapted, features),
                attention_transfer(attention_map(outputs.features[-1], maps.shape[-1]), maps),
            ]
        )

    def flat(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, list(student.student.parameters()), materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients])

    step = 1e-5
    high, low = (float(losses(t * math.exp(s))[1].detach().log()) for s in (step, -step))
    answers = student.student(scenario.data.inputs[chosen], masks).logits[-1]
    wanted = flat(cross_entropy(answers, scenario.data.labels[chosen]))
    cosines = [
        float(torch.nn.functional.cosine_similarity(flat(losses(t)[i]), wanted, dim=0)) for i in range(len(FAMILIES))
    ]
    return [(high - low) / (2 * step), *cosines]


def test_both_gradients_are_those_of_a_plain_module(double_scenario: Scenario) -> None:
    scenario, rows = double_scenario, [0, 1, 2]
    found = measured(scenario, Population(scenario.new_structure(), scenario.data, scenario.signals, 3, TRAIN), rows)
    tasks = [task_of(seed, scenario) for seed in SEEDS]
    g = torch.Generator().manual_seed(7)
    positions = [torch.randint(len(task.samples), (NUM_SAMPLES,), generator=g) for task in tasks]
    validation = scenario.data.splits["validation"]
    chosen = validation[torch.randint(len(validation), (NUM_SAMPLES,), generator=g)]
    for row, task in enumerate(tasks):
        student = solo(scenario)
        measured(scenario, student, [row])  # the same two windows
        slope, *cosines = by_hand(scenario, student, task, positions[row], chosen, 1.5 * (1 + row))
        assert float(found.log_temperature[row]) == pytest.approx(slope, abs=1e-7)
        assert found.alignment[row].tolist() == pytest.approx(cosines, abs=1e-8)
        assert max(abs(c) for c in cosines) > 0.05


def test_a_solo_student_is_measured_as_a_population(double_scenario: Scenario) -> None:
    scenario = double_scenario
    students = Population(scenario.new_structure(), scenario.data, scenario.signals, 2, TRAIN)
    alone, together = measured(scenario, solo(scenario), [0]), measured(scenario, students, [0, 1])
    # the first student's samples are drawn first; the validation samples after those of all students
    torch.testing.assert_close(alone.log_temperature[0], together.log_temperature[0], atol=1e-8, rtol=1e-7)
    assert alone.alignment.shape == (1, 4)


def test_gradients_come_from_training_and_validation_samples_alone(scenario: Scenario) -> None:
    def with_labels_shifted(split: str) -> Scenario:
        labels = scenario.data.labels.clone()
        index = scenario.data.splits[split]  # type: ignore[index]
        labels[index] = (labels[index] + 1) % 10
        return dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, labels=labels))

    plain, blind, moved = (
        measured(w, solo(w), [1]) for w in (scenario, *map(with_labels_shifted, ("test", "validation")))
    )
    assert torch.equal(plain.alignment, blind.alignment)
    assert torch.equal(plain.log_temperature, blind.log_temperature)
    assert torch.equal(plain.log_temperature, moved.log_temperature)  # the slope needs no validation labels
    assert not torch.allclose(plain.alignment, moved.alignment, atol=1e-2)


def test_a_convolutional_student_can_be_measured(scenario: Scenario) -> None:
    structure = build_student(StudentConfig("conv", (4, 8), (1,)), scenario.data.input_shape, 10)
    students = Population(structure, scenario.data, scenario.signals, 2, TRAIN)
    tasks = [task_of(seed, scenario) for seed in SEEDS[:2]]
    students.reset(tasks)
    controls = controls_of([0, 1])
    students.train_window(controls)
    g = torch.Generator().manual_seed(0)
    found = sensitivity(
        students, structure, tasks, controls=controls, data=scenario.data, signals=scenario.signals, generator=g
    )
    assert torch.isfinite(found.log_temperature).all()
    assert found.alignment.abs().max() <= 1 + 1e-5
