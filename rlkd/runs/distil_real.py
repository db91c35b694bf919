"""Distil a real model: the same loop as on chains, then one evaluation on test data and a shipped student."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.agents.policy.controllers import Controller
from rlkd.compression.real.cut import ship
from rlkd.compression.real.shipped import ShippedStudent
from rlkd.compression.real.trial import TOLERANCE, largest_difference
from rlkd.cost import compare_latency
from rlkd.data.anchors import Anchors
from rlkd.data.examples import Examples, TokenExamples
from rlkd.envs.action import decode
from rlkd.envs.guard import GuardConfig
from rlkd.envs.real import RealScenario
from rlkd.io.journal import Journal
from rlkd.models.chain import Masks
from rlkd.models.real.pretrained import Kind
from rlkd.runs.distil import SAME, OnWindow, TrainedStudent, check_shipped, is_lost, run_windows, shared_figures
from rlkd.students import Metrics
from rlkd.students.evaluation import ExitsByClass
from rlkd.students.real.module import ModuleStudent
from rlkd.teachers.real.token_signals import TokenSignals

MEASURED_BATCHES = (1, 32)
SUMMED = 1e-4  # what a quality may differ by from its sums in another order
ROUNDED = 0.01  # what an accuracy may differ by from training in half precision or on a GPU
COMPARED: dict[Kind, tuple[int, int]] = {  # test samples whose shipped and trained answers are compared, and at once
    "sequence_classification": (64, 8),
    "image_classification": (64, 8),
    "causal_lm": (8, 2),
    "module": (64, 8),
}


@dataclass(frozen=True)
class DistilledModule:
    """What one run on a real model brings."""

    student: ShippedStudent
    figures: dict[str, Any]  # on test data
    measured: dict[str, Any]  # latency by the clock, on the CPU
    diverged: bool


def distil_module(
    scenario: RealScenario,
    controller: Controller,
    seed: int,
    on_window: OnWindow = lambda row, observation: None,
    journal: Journal | None = None,
    guard: GuardConfig | None = None,
) -> DistilledModule:
    """Train under `controller`, evaluate once on test data, ship the student, time it beside dense one and teacher.

    Args:
        scenario: of the model.
        controller: sets the controls before every window.
        seed: fresh exits and adapters, batches and dropout.
        on_window: given each window's row (controls and validation figures) and its observation [1, O].
        journal: as of `run_windows`.
        guard: as of `run_windows`.
    """
    trained = run_windows(scenario, controller, seed, on_window, journal, guard)
    gather(trained)
    return ship_module(scenario, trained)


def gather(trained: TrainedStudent) -> None:
    """Make a student with sharded weights whole; every process must call this, before one of them ships it."""
    students = trained.episodes.students
    assert isinstance(students, ModuleStudent)
    students.gather()


def ship_module(scenario: RealScenario, trained: TrainedStudent) -> DistilledModule:
    """Evaluate a trained student once on test data, cut it, and time it beside dense one and teacher."""
    episodes, students = trained.episodes, trained.episodes.students
    assert isinstance(students, ModuleStudent)
    controls = decode(episodes.u, scenario.config.controls, scenario.data.num_classes)
    figures, metrics, cost = shared_figures(trained)
    unit_masks = tuple(mask[0] for mask in students.masks()[1:]) if scenario.student.plan.groups else ()
    keep = float(controls.feature_keep[0]) if scenario.student.plan.select_after is not None else 1.0
    shipped = ship(scenario.student, scenario.kind, unit_masks, keep, float(episodes.threshold[0]))
    full = tuple(torch.ones_like(mask) for mask in unit_masks)
    dense = ship(scenario.student, scenario.kind, full, 1.0, 1.0)
    test = scenario.data.splits["test"]
    if scenario.kind == "causal_lm":
        figures |= token_figures(shipped, scenario, metrics)
    else:
        figures |= class_figures(shipped, scenario, students)
    figures |= {
        "macs_of_dense_student": scenario.profile.work.dense_macs,
        "macs_of_teacher": scenario.teacher_work.dense_macs,
        "parameters_of_teacher": scenario.teacher_work.parameters,
        "energy_of_teacher_j": scenario.profile.energy_j(scenario.teacher_work.dense),
        "energy_kind": scenario.profile.energy["kind"],
    }
    figures["shipped_difference"] = _shipped_difference(
        shipped, scenario, unit_masks, keep=keep, threshold=float(episodes.threshold[0])
    )
    batches = sorted({*MEASURED_BATCHES, scenario.profile.batch_size})
    measured: dict[str, Any] = {f"batch_{b}": _timed(shipped, dense, scenario, test, b) for b in batches}
    measured["profile_batch"] = scenario.profile.batch_size
    measured["profile_latency_s"] = float(cost.latency_s[0])
    return DistilledModule(shipped, figures, measured, is_lost(trained))


def check_shipped_module(figures: dict[str, Any], scenario: RealScenario) -> str:
    """As `check_shipped`: a cross entropy adds up in another order, and half precision or a GPU rounds otherwise."""
    difference = figures["shipped_difference"]
    if difference > TOLERANCE:
        return (
            f"the shipped student answers otherwise than the trained one, by {difference:.1e} of its largest answer; "
            "do not ship it"
        )
    train = scenario.config.train
    if train.precision != "float32" or train.torch_device().type != "cpu":
        return check_shipped(figures, ROUNDED)
    return check_shipped(figures, SUMMED if scenario.kind == "causal_lm" else SAME)


def _shipped_difference(
    shipped: ShippedStudent, scenario: RealScenario, unit_masks: Masks, *, keep: float, threshold: float
) -> float:
    """Return the largest difference between answers of shipped and trained student on the first test samples."""
    student, data = scenario.student.cpu().eval(), scenario.data
    num_samples, size = COMPARED[scenario.kind]
    parts = torch.split(data.splits["test"][:num_samples], size)
    return max(
        largest_difference(student, shipped, data.batch(rows), unit_masks, keep=keep, threshold=threshold)
        for rows in parts
    )


def _by_class(exits: ExitsByClass, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exit statistics by the classes' names, for `result.json`."""
    rows = zip(names, exits.num_samples.tolist(), exits.exit_rates.tolist(), exits.accuracy.tolist(), strict=True)
    return {name: {"num_samples": n, "exit_rates": rates, "accuracy": acc} for name, n, rates, acc in rows}


def class_figures(shipped: ShippedStudent, scenario: RealScenario, students: ModuleStudent) -> dict[str, Any]:
    """Accuracy on test data of the shipped student and of the teacher, and where each class leaves."""
    test = scenario.data.splits["test"]
    right = scenario.signals.logits[0, test].argmax(-1) == scenario.data.labels[test]
    return {
        "compacted_accuracy": shipped_accuracy(shipped, scenario.data, test),
        "teacher_accuracy": float(right.float().mean()),
        "exits_by_class": _by_class(students.exits_by_class("test"), scenario.class_names),
    }


def token_figures(shipped: ShippedStudent, scenario: RealScenario, metrics: Metrics) -> dict[str, Any]:
    """How the shipped language model, its exits and the teacher predict the next tokens of the test texts.

    Args:
        shipped: gives logits [B, L, V].
        scenario: of the model.
        metrics: of the student on test data, as it was trained.
    """
    data, signals = scenario.data, scenario.signals
    assert isinstance(data, TokenExamples)
    assert isinstance(signals, TokenSignals)
    test = data.splits["test"]
    teacher_nats = signals.mean(signals.losses, test)
    return {
        **shipped_perplexity(shipped, data, test, signals.anchors),
        "teacher_accuracy": float(signals.anchors.quality(teacher_nats)),
        "exit_perplexities": metrics.exit_loss[0].exp().tolist(),
        "teacher_perplexity": float(teacher_nats.exp()),
        "teacher_next_token_accuracy": float(signals.mean(signals.hits, test)),
    }


@torch.inference_mode()
def shipped_perplexity(student: ShippedStudent, data: TokenExamples, index: Tensor, anchors: Anchors) -> dict[str, Any]:
    """How the shipped language model predicts the counted tokens of the texts at `index` [B]."""
    sums = torch.zeros(3, dtype=torch.float64)  # nats, hits, tokens
    for rows in torch.split(index[data.by_length(index)], 16):
        inputs = data.batch(rows)
        ids = inputs["input_ids"]
        counted = data.counted_of(rows, ids.shape[1])  # [B, L - 1]
        logits, target = student(**inputs)[:, :-1][counted], ids[:, 1:][counted]  # [M, V], [M]
        nats = F.cross_entropy(logits, target, reduction="sum")
        sums += torch.stack([nats, (logits.argmax(-1) == target).sum(), counted.sum()]).double()
    nats, hits = sums[0] / sums[2], sums[1] / sums[2]
    return {
        "compacted_accuracy": float(anchors.quality(nats)),
        "perplexity": float(nats.exp()),
        "next_token_accuracy": float(hits),
        "num_test_tokens": int(sums[2]),
    }


@torch.inference_mode()
def shipped_accuracy(student: ShippedStudent, data: Examples, index: Tensor, batch_size: int = 32) -> float:
    """Share of the samples at `index` [B] that the shipped student answers rightly."""
    right = 0
    for rows in torch.split(index, batch_size):
        right += int((student(**data.batch(rows)).argmax(-1) == data.labels[rows]).sum())
    return right / len(index)


def _timed(
    small: ShippedStudent, dense: ShippedStudent, scenario: RealScenario, index: Tensor, batch_size: int
) -> dict[str, float]:
    """Latency of the shipped student, the dense one and the teacher on the first samples at `index`.

    The teacher is left out where it is spread over devices.
    """
    rows = index[torch.arange(batch_size) % len(index)]
    inputs = scenario.data.batch(rows)
    teacher = None
    if scenario.teacher is not None and scenario.teacher_data is not None:
        teacher = partial(scenario.teacher.cpu().eval(), **scenario.teacher_data.batch(rows))
    return compare_latency(partial(small, **inputs), partial(dense, **inputs), batch_size, teacher)
