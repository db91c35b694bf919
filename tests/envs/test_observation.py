"""Observations: relative to the goal, with probes that are explicit forward passes and change nothing."""

import dataclasses

import pytest
import torch
from torch import Tensor

from rlkd.cost import Cost
from rlkd.data import TaskDistribution
from rlkd.envs import CONTROLS, OBSERVATIONS, Scenario
from rlkd.envs.action import decode
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import (
    HIGH,
    LOW,
    PROBES,
    SAVINGS,
    TABLE,
    Snapshot,
    TaskFeatures,
    observe,
    unknown_observations,
)
from rlkd.students import Metrics, SoloStudent, Telemetry
from rlkd.students.interface import probed_samples
from rlkd.teachers.landmarks import LANDMARKS

UNITS, INPUTS = CONTROLS.index("unit_keep"), CONTROLS.index("feature_keep")


def metrics(accuracy: Tensor, exits: Tensor) -> Metrics:
    n = len(accuracy)
    return Metrics(
        accuracy=accuracy,
        exit_accuracy=exits,
        exit_loss=torch.full((n, 2), 1.5),
        exit_rates=torch.tensor([[0.25, 0.75]] * n),
        agreement=torch.full((n,), 0.5),
        divergence=torch.full((n,), 0.3),
        kept=torch.tensor([[32.0, 24.0, 12.0]] * n),
        spread=torch.zeros(n, 2),
    )


def observed(shift: float, has_floor: bool = True, limit: float = float("inf")) -> dict[str, float]:
    """What is seen of one student if all accuracies and the anchor lie `shift` higher, by name."""
    n, one = 1, torch.ones(1)
    features = TaskFeatures(
        teacher_accuracy=torch.tensor([0.8 + shift]),
        teacher_label_agreement=torch.tensor([0.6]),
        landmarks=torch.linspace(0.3, 0.7, len(LANDMARKS))[None] + shift,
        preference=torch.tensor([[0.0, 0.75, 0.25]]),
        anchor=torch.tensor([0.55 + shift]),
        has_floor=torch.tensor([has_floor]),
        limits=torch.tensor([[limit, float("inf"), 0.9, float("inf")]]) if limit < 1 else torch.full((1, 4), limit),
    )
    now = Snapshot(
        windows_done=torch.tensor([5.0]),
        num_windows=12,
        u=torch.linspace(0, 1, len(CONTROLS))[None],
        score_change=torch.tensor([0.07]),
        metrics=metrics(torch.tensor([0.5 + shift]), torch.tensor([[0.4 + shift, 0.6 + shift]])),
        previous=torch.tensor([[0.47, 0.38, 0.55]]) + shift,
        cost=Cost(one, one, one, 0.6 * one, 0.5 * one, 0.4 * one, one, 0.3 * one),
        probes={name: torch.tensor([0.02]) for name in PROBES},
        telemetry=Telemetry(
            losses=torch.full((n, 4), 1.0),
            gradient_norms=torch.ones(n, 4),
            gradient_cosine=torch.tensor([0.3]),
            diverged=torch.tensor([False]),
            num_rollbacks=torch.tensor([0]),
        ),
    )
    seen = observe(features, now, torch.linspace(0.1, 0.6, 6), group_sizes=(64, 48, 48), num_classes=10)
    return dict(zip(OBSERVATIONS, seen[0].tolist(), strict=True))


def test_observations_by_hand() -> None:
    seen = observed(0.0, limit=0.7)
    expected = {
        "progress": 5 / 12,
        "windows_left": 3 / 8,
        "margin": -0.05,
        "margin_change": 0.03,
        "first_exit_margin": -0.15,
        "last_exit_margin": 0.05,
        "first_exit_change": 0.02,
        "last_exit_change": 0.05,
        "score_change": 0.07,
        "has_floor": 1.0,
        "preference_latency": 0.75,
        "has_limit": 1.0,
        "limit_slack": 0.1,
        "latency_saving": 0.4,
        "energy_saving": 0.5,
        "inputs_kept": 0.5,
        "units_kept": 36 / 96,
        "first_exit_rate": 0.25,
        "probe_units": 0.02,
        "label_loss": 1 / 2.302585,
        "generalisation_gap": 0.5 / 2.302585,
        "gradient_cosine": 0.3,
        "teacher_margin": 0.25,
        "teacher_label_agreement": 0.6,
        "control_exit_threshold": 7 / 11,
        "control_exit_by_threshold": 1.0,
    }
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value, abs=1e-5), name
    free = observed(0.0, has_floor=False)
    assert (free["has_floor"], free["has_limit"], free["limit_slack"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("shift", [-0.25, 0.1, 0.2])
def test_only_accuracies_less_the_floor_are_seen(shift: float) -> None:
    before, after = observed(0.0), observed(shift)
    assert after == pytest.approx(before, abs=1e-6)
    lower = observed(0.0)
    assert lower["margin"] != pytest.approx(lower["margin"] + shift)


def test_groups_and_bounds_are_complete() -> None:
    names = [name for group in TABLE.values() for name in group]
    assert tuple(names) == OBSERVATIONS
    assert len(set(names)) == len(names)
    assert (LOW < HIGH).all()
    assert OBSERVATIONS[-len(CONTROLS) :] == tuple(f"control_{name}" for name in CONTROLS)
    assert len(set(CONTROLS)) == len(CONTROLS) == 12
    assert set(TABLE) == {"time", "margin", "goal", "cost", "savings", "probe", "training", "teacher", "controls"}


def test_a_higher_floor_lowers_every_margin_and_nothing_else(scenario: Scenario) -> None:
    def seen(keep: float) -> tuple[Tensor, float]:
        task: TaskDistribution = dataclasses.replace(scenario.config.task.with_keep(keep), reference="0.5")
        episodes = Episodes(dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task)), 2)
        episodes.reset([4, 5])
        return episodes.step(episodes.start).observation, float(episodes.floors[0, 0])

    (low, floor), (high, other) = seen(0.8), seen(1.0)
    relative = {"margin", "first_exit_margin", "last_exit_margin", "teacher_margin"}
    relative |= {f"landmark_{name}" for name in LANDMARKS}
    for i, name in enumerate(OBSERVATIONS):
        if name == "score_change":  # the reward itself
            continue
        expected = other - floor if name in relative else 0.0
        torch.testing.assert_close(low[:, i] - high[:, i], torch.full((2,), expected), atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("num_students", [1, 3])
def test_a_probe_is_a_forward_pass_with_fewer_units_or_inputs(scenario: Scenario, num_students: int) -> None:
    seeds = list(range(num_students))
    episodes = Episodes(scenario, num_students)
    episodes.reset(seeds)
    u = scenario.start.expand(num_students, -1).clone()
    u[:, UNITS], u[:, INPUTS] = 0.8, 0.9
    outcome = episodes.step(u)
    index = probed_samples(scenario.data.splits["validation"])
    assert len(index) == 128
    controls = decode(u, scenario.config.controls, scenario.data.num_classes)
    for row in range(num_students):
        solo = Episodes(scenario, 1)
        solo.reset([seeds[row]])
        solo.step(u[:1])
        students = solo.students
        assert isinstance(students, SoloStudent)

        def accuracy(inputs: float, units: float, row: int = row, students: SoloStudent = students) -> float:
            students.set_controls(
                dataclasses.replace(
                    controls.rows(slice(row, row + 1)),
                    feature_keep=controls.feature_keep[row : row + 1] * inputs,
                    unit_keep=controls.unit_keep[row : row + 1] * units,
                )
            )
            masks = tuple(mask[0] for mask in students.masks())
            outputs = students.student(scenario.data.inputs[index], masks)
            right = (outputs.logits[-1].argmax(-1) == scenario.data.labels[index]).float().mean()  # none leaves early
            return float(right)

        whole = accuracy(1.0, 1.0)
        for name, shares in PROBES.items():
            expected = whole - accuracy(*shares)
            found = float(outcome.observation[row, OBSERVATIONS.index(f"probe_{name}")])
            assert found == pytest.approx(expected, abs=0.017 if num_students > 1 else 1e-6), name  # two samples


@pytest.mark.parametrize("num_students", [1, 3])
def test_probes_change_nothing(scenario: Scenario, num_students: int) -> None:
    one, two = Episodes(scenario, num_students), Episodes(scenario, num_students)
    for episodes in (one, two):
        episodes.reset(list(range(num_students)))
        episodes.step(episodes.start)
    random = torch.get_rng_state()
    state, masks = two.training_state(), two.students.masks()
    for share in (0.1, 0.5, 1.0):
        keep = torch.full((num_students,), share)
        assert two.students.probe(keep, keep).shape == (num_students, scenario.num_exits)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in two.training_state().items():
        assert torch.equal(tensor, state[name]), name
    for now, then in zip(two.students.masks(), masks, strict=True):
        assert torch.equal(now, then)
    first, second = one.step(one.start), two.step(two.start)
    assert torch.equal(first.observation, second.observation)
    assert torch.equal(first.reward, second.reward)


def test_savings_without_their_control_are_unknown() -> None:
    def names(num_exits: int, *sizes: int) -> set[str]:
        unknown = unknown_observations(num_exits, sizes)
        return {name for name, lacking in zip(OBSERVATIONS, unknown.tolist(), strict=True) if lacking}

    assert names(2, 64, 48, 48) == set()
    assert names(1, 64, 48, 48) == set(SAVINGS)  # no early exit
    assert names(3, 1, 48) == {"latency_saving_exit_quarter_inputs", "energy_saving_exit_quarter_inputs"}
