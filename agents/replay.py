"""Replay: distil one new student under a controller, in one training run, and make it physically small."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlkd.agents.controllers import Controller
from rlkd.compression import CompactStudent, compact, save_student
from rlkd.cost import median_latency_s
from rlkd.envs.action import CONTROLS, decode
from rlkd.envs.episodes import Episodes, Outcome
from rlkd.envs.reward import DIVERGED_SCORE
from rlkd.envs.world import EpisodeWorld, World
from rlkd.objectives import FAMILIES
from rlkd.students import Controls, SoloStudent
from rlkd.tasks import Preference

MEASURED_BATCHES = (1, 64)


@dataclass(frozen=True)
class Distilled:
    """What one replay brings."""

    student: CompactStudent
    figures: dict[str, Any]  # on test data, with the profile's prediction; the same for the same seed
    measured: dict[str, Any]  # latency by the clock
    diverged: bool


def run_windows(
    world: EpisodeWorld,
    controller: Controller,
    seed: int,
    on_window: Callable[[dict[str, float], torch.Tensor], object],
) -> tuple[Episodes, Outcome]:
    """Train one student to the end, or until it diverges; returns what its last window brought, too.

    Args:
        world: of chains or of a real model.
        controller: sets the controls before every window.
        seed: task, parameters and batches.
        on_window: as in `distil`.
    """
    episodes = Episodes(world, 1)
    observation = episodes.reset([seed])
    for window in range(world.config.num_windows):
        position = controller(observation, episodes, window)
        outcome = episodes.step(position)
        controls = decode(position, world.config.controls, world.data.num_classes)
        row = {
            "window": window + 1,
            **_named(controls),
            **{f"position_{name}": float(position[0, i]) for i, name in enumerate(CONTROLS)},
            "score": float(outcome.score[0]),
            "accuracy": float(outcome.metrics.accuracy[0]),
            "macs_ratio": float(outcome.cost.macs_ratio[0]),
            "latency_ratio": float(outcome.cost.latency_ratio[0]),
            "energy_ratio": float(outcome.cost.energy_ratio[0]),
            "num_diverged": float(outcome.diverged[0]),
            "num_rollbacks": float(outcome.telemetry.num_rollbacks[0]),
        }
        on_window(row, outcome.observation)
        observation = outcome.observation
        if outcome.diverged[0]:
            break
    return episodes, outcome


def distil(
    world: World,
    controller: Controller,
    seed: int,
    on_window: Callable[[dict[str, float], torch.Tensor], object],
) -> Distilled:
    """Train the task of `seed` under `controller`, evaluate it once on test data, compact it, time it.

    Args:
        world: its task distribution is what the seed draws from.
        controller: sets the controls before every window.
        seed: task, parameters and batches.
        on_window: given each window's row (controls and validation figures) and its observation [1, O].
    """
    episodes, last = run_windows(world, controller, seed, on_window)
    diverged = bool(last.diverged[0])
    students = episodes.students
    assert isinstance(students, SoloStudent)
    threshold = float(decode(episodes.position, world.config.controls, world.data.num_classes).exit_threshold[0])
    small = compact(students.student, tuple(mask[0] for mask in students.masks()), threshold)
    dense = compact(students.student, students.student.full_masks(), 1.0)
    metrics, cost, score = episodes.evaluate("test")
    test = world.data.splits["test"]
    with torch.inference_mode():
        answers = small(world.data.inputs[test]).argmax(-1)
    figures = {
        "score": DIVERGED_SCORE if diverged else float(score[0]),
        "accuracy": float(metrics.accuracy[0]),
        "compacted_accuracy": float((answers == world.data.labels[test]).float().mean()),
        "teacher_agreement": float(metrics.agreement[0]),
        "teacher_accuracy": float(
            (world.signals.logits[episodes.tasks[0].teacher, test].argmax(-1) == world.data.labels[test]).float().mean()
        ),
        "exit_rates": [float(r) for r in metrics.exit_rates[0]],
        "macs": float(cost.macs[0]),
        "macs_ratio": float(cost.macs_ratio[0]),
        "latency_ratio": float(cost.latency_ratio[0]),
        "energy_ratio": float(cost.energy_ratio[0]),
        "energy_j": float(cost.energy_j[0]),
        "energy_kind": world.profile.energy["kind"],
        "num_rollbacks": int(last.telemetry.num_rollbacks[0]),
    }
    batches = sorted({*MEASURED_BATCHES, world.profile.batch_size})
    measured: dict[str, Any] = {f"batch_{b}": _timed(small, dense, world.data.inputs[test], b) for b in batches}
    measured["profile_batch"] = world.profile.batch_size
    measured["profile_latency_s"] = float(cost.latency_s[0])
    return Distilled(small, figures, measured, diverged)


def student_card(figures: dict[str, Any], preference: Preference, policy_sha256: str) -> dict[str, Any]:
    """What is written beside a student: test figures, the preference, and which policy made it."""
    weights = dict(zip(("accuracy", "latency", "energy"), preference.weights(), strict=True))
    return {"figures": figures, "preference": weights, "policy_sha256": policy_sha256}


def write_student(folder: Path, done: Distilled, preference: Preference, policy_sha256: str) -> None:
    """Save the compacted student with its test figures, in `folder`."""
    save_student(done.student, folder, student_card(done.figures, preference, policy_sha256))


def _named(controls: Controls) -> dict[str, float]:
    named = {f"weight_{family}": float(controls.weights[0, i]) for i, family in enumerate(FAMILIES)}
    others = ("temperature", "feature_keep", "unit_keep", "exit_threshold", "learning_rate")
    return {**named, **{name: float(getattr(controls, name)[0]) for name in others}}


def _timed(small: CompactStudent, dense: CompactStudent, inputs: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Latency of the compacted and of the dense student on real inputs, one thread, medians of the same rounds."""
    batch = inputs[torch.arange(batch_size) % len(inputs)]
    (small_s, small_iqr), (dense_s, dense_iqr) = median_latency_s([small, dense], batch)
    return {
        "latency_s": small_s,
        "spread_s": small_iqr,
        "dense_latency_s": dense_s,
        "dense_spread_s": dense_iqr,
        "speedup": dense_s / small_s,
    }
