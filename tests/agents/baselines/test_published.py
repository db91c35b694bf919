import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlkd.agents.baselines.gradients import look
from rlkd.agents.baselines.published import SCHEDULES, Values, annealed, curriculum, upon
from rlkd.agents.policy.controllers import Controller
from rlkd.data import Range, Task
from rlkd.envs import ControlConfig, Scenario
from rlkd.envs.action import CONTROLS, decode
from rlkd.envs.episodes import Episodes
from rlkd.students import Controls
from rlkd.students.sensitivity import Sensitivity

BASE = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.35, 0.2, 0.0, 0.0, 1.0]])
NOTHING = torch.zeros(1)  # schedules do not observe


def base(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
    return BASE.expand_as(episodes.start)


def begun(scenario: Scenario, num_students: int = 2, num_windows: int = 4, num_labels: int | None = None) -> Episodes:
    """Fresh episodes of so many windows, with so many training samples."""
    task = scenario.config.task
    if num_labels:
        task = dataclasses.replace(task, num_labels=Range(num_labels, num_labels))
    scenario = dataclasses.replace(
        scenario, config=dataclasses.replace(scenario.config, num_windows=num_windows, task=task)
    )
    episodes = Episodes(scenario, num_students)
    episodes.reset([2**60 + i for i in range(num_students)])
    return episodes


def built(name: str) -> Controller:
    return curriculum(base) if name == "curriculum" else upon(base, SCHEDULES[name])


def controls_of(name: str, episodes: Episodes, window: int) -> Controls:
    u = built(name)(NOTHING, episodes, window)
    return decode(u, episodes.scenario.config.controls, episodes.scenario.data.num_classes)


def temperatures(name: str, episodes: Episodes) -> list[float]:
    """Of the first student, in every window."""
    windows = range(episodes.scenario.config.num_windows)
    return [float(controls_of(name, episodes, window).temperature[0]) for window in windows]


def test_temperature_decays_by_a_hundredth_an_epoch(scenario: Scenario) -> None:
    # 15 steps of 48 samples are 10 passes over 72 samples
    wanted = [5 * 0.99**epochs for epochs in (0, 10, 20, 30)]
    assert temperatures("temperature_decay", begun(scenario, num_labels=72)) == pytest.approx(wanted, rel=1e-5)
    # and 90 over 8: 5 * 0.99^180 = 0.82 is below the floor, whatever the range of the control
    cold = dataclasses.replace(scenario.config, controls=ControlConfig(temperature=(0.5, 10.0)))
    wanted = [5.0, 5 * 0.99**90, 1.0, 1.0]
    episodes = begun(dataclasses.replace(scenario, config=cold), num_labels=8)
    assert temperatures("temperature_decay", episodes) == pytest.approx(wanted, rel=1e-5)


def test_temperature_decays_by_each_students_own_epochs(scenario: Scenario) -> None:
    episodes = begun(scenario, 3)
    sizes = [len(task.samples) for task in episodes.tasks]
    assert len(set(sizes)) == 3
    wanted = [max(1.0, 5 * 0.99 ** (2 * 720 / size)) for size in sizes]
    assert controls_of("temperature_decay", episodes, 2).temperature.tolist() == pytest.approx(wanted, rel=1e-5)


def test_temperature_falls_in_four_equal_stages(scenario: Scenario) -> None:
    assert temperatures("temperature_stages", begun(scenario)) == pytest.approx([4, 3, 2, 1], rel=1e-5)
    twelve = temperatures("temperature_stages", begun(scenario, num_windows=12))
    assert twelve == pytest.approx([4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1], rel=1e-5)
    assert temperatures("temperature_stages", begun(scenario, num_windows=1)) == pytest.approx([4], rel=1e-5)


def test_fewer_features_in_a_line(scenario: Scenario) -> None:
    episodes = begun(scenario)
    kept = [float(controls_of("fewer_features", episodes, window).feature_keep[0]) for window in range(4)]
    assert kept == pytest.approx([0.8, 0.8 - 0.5 / 3, 0.8 - 1 / 3, 0.3], rel=1e-5)


def test_alpha_weighted_is_half_and_half_at_five(scenario: Scenario) -> None:
    for window in (0, 3):
        controls = controls_of("alpha_weighted", begun(scenario), window)
        assert controls.weights[1].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0], abs=1e-3)
        assert controls.temperature.tolist() == pytest.approx([5.0, 5.0], rel=1e-5)


def answer(confidence: float) -> Tensor:
    """Logits of ten classes whose softmax has this maximum."""
    logits = torch.zeros(10)
    logits[3] = torch.tensor(9 * confidence / (1 - confidence)).log()
    return logits


def test_labels_weigh_by_the_teachers_mean_confidence(scenario: Scenario) -> None:
    logits = scenario.signals.logits.clone()
    logits[0], logits[1], logits[2] = answer(0.95), answer(0.7), answer(0.3)
    sure = dataclasses.replace(scenario, signals=dataclasses.replace(scenario.signals, logits=logits))
    episodes = begun(sure, 12)
    teachers = [task.teacher for task in episodes.tasks]
    assert set(teachers) == {0, 1, 2}
    weights = controls_of("alpha_by_confidence", episodes, 1).weights
    wanted = [[0.2, 0.5, 0.8][teacher] for teacher in teachers]
    assert weights[:, 0].tolist() == pytest.approx(wanted, abs=1e-3)
    assert weights[:, 1].tolist() == pytest.approx([1 - w for w in wanted], abs=1e-3)
    # a mean over the student's own samples: 0.99 on one half and 0.75 on the other is 0.87
    task: Task = episodes.tasks[0]
    half = len(task.samples) // 2
    logits[:] = answer(0.1001)
    logits[task.teacher, task.samples[:half]], logits[task.teacher, task.samples[half:]] = answer(0.99), answer(0.75)
    assert float(controls_of("alpha_by_confidence", episodes, 1).weights[0, 0]) == pytest.approx(0.5, abs=1e-3)


def test_the_curriculum_is_whole_before_the_last_stage_and_the_bases_after(scenario: Scenario) -> None:
    episodes = begun(scenario)
    published_weights = [0.5, 0.3, 0.15, 0.05]
    stages = [[1.0, 0.0, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0], None, published_weights]
    own = decode(BASE, scenario.config.controls, 10)
    for window, weights in enumerate(stages):
        controls = controls_of("curriculum", episodes, window)
        if weights:
            assert controls.weights[0].tolist() == pytest.approx(weights, abs=2e-3)
        assert float(controls.temperature[0]) == pytest.approx(4.0, rel=1e-5)
        for name in ("feature_keep", "unit_keep", "exit_threshold"):
            wanted = 1.0 if window < 3 else float(getattr(own, name))
            assert float(getattr(controls, name)[0]) == pytest.approx(wanted, rel=1e-5), (window, name)
        assert float(controls.learning_rate[0]) == pytest.approx(float(own.learning_rate), rel=1e-5)


def test_the_third_stage_weighs_families_by_what_they_do_for_validation(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    pay = torch.tensor(
        [[0.8, 0.4, -0.3, 0.4], [-0.1, -0.2, -0.3, -0.1], [math.nan, 0.5, 0.0, 0.0], [0.1, -0.9, 0.0, 0.0]]
    )
    monkeypatch.setattr("rlkd.agents.baselines.published.look", lambda *_: Sensitivity(torch.zeros(4), pay))
    weights = controls_of("curriculum", begun(scenario, 4), 2).weights
    # 0.5 * 0.8 : 0.3 * 0.4 : 0 : 0.05 * 0.4 = 0.4 : 0.12 : 0 : 0.02; nothing helps: published; a diverged student's NaN
    wanted = [
        [0.4 / 0.54, 0.12 / 0.54, 0.0, 0.02 / 0.54],
        [0.5, 0.3, 0.15, 0.05],
        [0.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
    ]
    for row, want in zip(weights.tolist(), wanted, strict=True):
        assert row == pytest.approx(want, abs=2e-3)


def test_the_third_stage_looks_at_the_students_themselves(scenario: Scenario) -> None:
    episodes = begun(scenario, 3)
    for window in range(2):
        episodes.step(built("curriculum")(NOTHING, episodes, window))
    weights = controls_of("curriculum", episodes, 2).weights
    pay = look(episodes, torch.Generator().manual_seed(2)).alignment  # [3, 4]
    assert pay[:, :2].min() > 0
    for i, j in ((0, 1), (0, 3)):
        if pay[:, j].min() > 0:
            ratio = (weights[:, i] / weights[:, j]).tolist()
            share = [0.5, 0.3, 0.15, 0.05]
            assert ratio == pytest.approx((share[i] * pay[:, i] / (share[j] * pay[:, j])).tolist(), rel=1e-3)
    assert torch.equal(weights, controls_of("curriculum", episodes, 2).weights)


def test_annealing_at_its_beginning_middle_and_end(scenario: Scenario) -> None:
    episodes = begun(scenario, num_windows=5)
    wanted = {
        0: ([0.2, 0.6, 0.15, 0.05], 5.0, 0.8, 1e-2),
        2: ([0.35, 0.45, 0.15, 0.05], 5**0.5, 0.3 + 0.5 / 8, 5.5e-3),
        4: ([0.5, 0.3, 0.15, 0.05], 1.0, 0.3, 1e-3),
    }
    for window, (weights, temperature, units, rate) in wanted.items():
        controls = decode(annealed(NOTHING, episodes, window), scenario.config.controls, 10)
        assert controls.weights[1].tolist() == pytest.approx(weights, rel=1e-4)
        assert float(controls.temperature[1]) == pytest.approx(temperature, rel=1e-4)
        assert float(controls.unit_keep[1]) == pytest.approx(units, rel=1e-4)
        assert float(controls.learning_rate[1]) == pytest.approx(rate, rel=1e-4)
        assert controls.feature_keep.tolist() == pytest.approx([1.0, 1.0])
        assert controls.exit_threshold.tolist() == pytest.approx([1.0, 1.0])


SETS: dict[str, tuple[str, ...]] = {
    "alpha_weighted": ("weights", "temperature"),
    "temperature_decay": ("temperature",),
    "temperature_stages": ("temperature",),
    "fewer_features": ("feature_keep",),
    "alpha_by_confidence": ("weights",),
    "curriculum": ("weights", "temperature", "feature_keep", "unit_keep", "exits"),
}


@pytest.mark.parametrize("name", SETS)
def test_what_a_schedule_does_not_set_is_the_bases(scenario: Scenario, name: str) -> None:
    episodes, kept = begun(scenario), BASE.clone()
    assert set(SETS) == {*SCHEDULES, "curriculum"}
    kinds = {"weights": "weight_", "exits": "exit_"}
    begins = tuple(kinds.get(name, name) for name in SETS[name])
    others = [i for i, control in enumerate(CONTROLS) if not control.startswith(begins)]
    for window in range(4):
        u = built(name)(NOTHING, episodes, window)
        assert torch.equal(u[:, others], BASE[:, others].expand(2, -1)), window
    assert torch.equal(BASE, kept)


def test_a_schedule_of_nothing_is_its_base(scenario: Scenario) -> None:
    nothing: Values = {}
    assert torch.equal(upon(base, lambda moment: nothing)(NOTHING, begun(scenario), 1), BASE.expand(2, -1))
