"""The range test: it finds a step size that learns, says so, and leaves the student as it was."""

import dataclasses
import logging
import math
import re

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import rlkd
from rlkd.data import load_dataset
from rlkd.envs import ControlConfig, rate
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.models.real.cutting import StudentCut
from rlkd.students.real.module import ModuleStudent
from rlkd.students.real.train_config import ModuleTrainConfig


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> RealScenario:
    folder = tmp_path_factory.mktemp("rate")
    teacher = tiny_models.tiny("vit", layers=3)
    classes = list(teacher.config.id2label.values())
    teacher.save_pretrained(folder / "vit")
    generator = np.random.default_rng(0)
    labels = np.arange(60) % len(classes)
    size = teacher.config.image_size
    images = generator.normal(size=(60, teacher.config.num_channels, size, size)).astype(np.float32)
    np.savez(folder / "data.npz", inputs=images, labels=labels)
    config = RealConfig(
        teacher=str(folder / "vit"),
        data=str(folder / "data.npz"),
        num_windows=2,
        cut=StudentCut(layers=2),
        train=ModuleTrainConfig(steps_per_window=2, batch_size=8, learning_rate=1e-3),
        cost=RealCostConfig(batch_size=4),
    )
    return build_real_scenario(config, ControlConfig())


def without_rate(scenario: RealScenario) -> RealScenario:
    train = dataclasses.replace(scenario.config.train, learning_rate=0.0)
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, train=train))


def test_a_given_step_size_is_taken(scenario: RealScenario) -> None:
    assert rate.with_learning_rate(scenario, 0) is scenario


def test_the_least_validation_loss_decides_and_the_student_is_put_back(
    scenario: RealScenario, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "RATES", (1e-9, 3e-3))  # the first cannot learn in a few steps
    students = scenario.students(1)
    before = {name: tensor.clone() for name, tensor in scenario.student.model.state_dict().items()}
    with caplog.at_level(logging.INFO, "rlkd"):
        found = rate.with_learning_rate(without_rate(scenario), 0)
    losses = [rate._loss_after(without_rate(scenario), r, 0) for r in rate.RATES]
    best = rate.RATES[losses.index(min(losses))]
    assert found.config.train.learning_rate == best
    assert f"learning rate: {best:g}" in caplog.text
    students = found.students(1)
    assert students.num_students == 1
    for name, tensor in found.student.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_a_student_that_begins_trained_gets_a_step_size_that_mends_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_dataset("digits")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    optimizer, train = torch.optim.AdamW(teacher.parameters(), 3e-3), digits.splits["train"]
    for _ in range(1000):  # until more training gains nothing
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(digits.inputs[rows]), digits.labels[rows]).backward()
        optimizer.step()
    data = {name: (digits.inputs[index], digits.labels[index]) for name, index in digits.splits.items()}
    found = []
    monkeypatch.setattr(rate, "CLOSE", 1.0)  # no longer trainings: as a whole, it loses alike at all step sizes
    for little in (math.inf, rate.LITTLE):  # as if it began untrained, and as it is
        monkeypatch.setattr(rate, "LITTLE", little)
        caplog.clear()
        with caplog.at_level(logging.INFO, "rlkd"):
            rlkd.distil(teacher, data=data, options={"num_windows": 1, "train.steps_per_window": 1})
        found.append(float(re.findall(r"learning rate: (\S+),", caplog.text)[0]))
    assert found[0] < found[1]  # as a whole, it only loses by steps


def test_close_step_sizes_are_tried_with_more_steps_which_decide(
    scenario: RealScenario, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = without_rate(scenario)
    monkeypatch.setattr(rate, "CLOSE", 1.5)
    monkeypatch.setattr(rate, "LITTLE", math.inf)  # the whole student alone
    monkeypatch.setattr(rate, "RATES", (1e-4, 1e-2))
    with caplog.at_level(logging.INFO, "rlkd"):
        found = rate.with_learning_rate(without, 0)
    short, long = (
        {r: rate._loss_after(without, r, 0, num_steps=steps) for r in rate.RATES}
        for steps in (rate.NUM_STEPS, rate.LONGER * rate.NUM_STEPS)
    )
    best = min(long, key=lambda r: long[r])
    assert best != min(short, key=lambda r: short[r])  # else the test would show nothing
    assert found.config.train.learning_rate == best
    assert f"after 72 steps 0.0001: {long[1e-4]:.3f}, 0.01: {long[1e-2]:.3f})" in caplog.text


def test_step_sizes_that_are_far_apart_are_tried_once(
    scenario: RealScenario, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "RATES", (1e-9, 3e-3))
    monkeypatch.setattr(rate, "CLOSE", 1.0)
    with caplog.at_level(logging.INFO, "rlkd"):
        rate.with_learning_rate(without_rate(scenario), 0)
    assert "learning rate: " in caplog.text
    assert "72 steps" not in caplog.text


def test_the_same_seed_finds_the_same(scenario: RealScenario) -> None:
    assert rate._loss_after(scenario, 1e-3, 5) == rate._loss_after(scenario, 1e-3, 5)


def test_no_finite_loss_is_refused(scenario: RealScenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "RATES", (1e30,))
    with pytest.raises(UserError, match="finite loss"):
        rate.with_learning_rate(without_rate(scenario), 0)


def test_students_refuse_to_train_without_a_step_size(scenario: RealScenario) -> None:
    with pytest.raises(ValueError, match="learning_rate: got 0"):
        ModuleStudent(scenario.student, scenario.data, scenario.signals, without_rate(scenario).config.train, 2)
