"""Replay: distil one new student under a controller, in one training run, and make it physically small."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlkd.agents.policy.controllers import Controller
from rlkd.compression import CompactStudent, compact, save_student
from rlkd.cost import compare_latency
from rlkd.data import Preference
from rlkd.data.samples import InputScale
from rlkd.envs.action import decode
from rlkd.envs.episodes import Episodes
from rlkd.envs.reward import DIVERGED_SCORE
from rlkd.envs.rows import window_row
from rlkd.envs.scenario import EpisodeScenario, Scenario
from rlkd.errors import UserError
from rlkd.io.files import number, reason
from rlkd.io.journal import Journal
from rlkd.io.records import plain
from rlkd.students import SoloStudent

MEASURED_BATCHES = (1, 64)


@dataclass(frozen=True)
class Distilled:
    """What one replay brings."""

    student: CompactStudent
    figures: dict[str, Any]  # on test data, with the profile's prediction; the same for the same seed
    measured: dict[str, Any]  # latency by the clock
    diverged: bool
    input_scale: InputScale  # from raw inputs to what the student takes


def run_windows(
    scenario: EpisodeScenario,
    controller: Controller,
    seed: int,
    on_window: Callable[[dict[str, float], torch.Tensor], object],
    journal: Journal | None = None,
) -> tuple[Episodes, dict[str, float]]:
    """Train one student to the end, or until it diverges; returns the row of its last window, too.

    Args:
        scenario: of chains or of a real model.
        controller: sets the controls before every window, from what it is given alone.
        seed: task, parameters and batches.
        on_window: as in `distil`; called for windows of before a stop, too, while `journal.replaying`.
        journal: keeps the student's state after every window; the training goes on from the last one.
    """
    episodes = Episodes(scenario, 1)
    observation = episodes.reset([seed])
    rows: list[dict[str, float]] = []
    seen = torch.full((scenario.config.num_windows, observation.shape[1]), torch.nan)  # [W, O], of the windows done
    if journal:
        rows = _go_on(episodes, seen, journal, on_window)
        observation = seen[None, len(rows) - 1] if rows else observation
    for window in range(len(rows), scenario.config.num_windows):
        if rows and rows[-1]["num_diverged"]:
            break
        position = controller(observation, episodes, window)
        outcome = episodes.step(position)
        rows.append(window_row(window, position, outcome, scenario))
        on_window(rows[-1], outcome.observation)
        observation = outcome.observation
        seen[window] = observation[0]
        if journal:
            journal.save_state(window + 1, {**episodes.training_state(), "seen": seen}, {"rows": rows})
    return episodes, rows[-1]


def _go_on(
    episodes: Episodes,
    seen: torch.Tensor,
    journal: Journal,
    on_window: Callable[[dict[str, float], torch.Tensor], object],
) -> list[dict[str, float]]:
    """Put reset `episodes` and `seen` where the journal's last state has them; returns the windows' rows.

    Raises:
        UserError: a state that is not of this training.
    """
    saved = journal.pending
    if saved is None:
        journal.take_state()
        return []
    state = {**episodes.training_state(), "seen": seen}
    tensors = saved.tensors({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()})
    try:
        rows = [{str(k): number(v, str(k)) for k, v in row.items()} for row in saved.note["state"]["rows"]]
        if not 1 <= len(rows) <= len(seen) or not {"num_diverged", "num_rollbacks"} <= set(rows[-1]):
            raise ValueError(f"{len(rows)} windows")
        episodes.load_training_state(tensors)
        seen.copy_(tensors["seen"])
        for i, row in enumerate(rows):
            on_window(row, seen[None, i])
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{saved.path}: not the state of this training, or a damaged one ({reason(error):.100})"
        ) from error
    journal.take_state()
    return rows


def distil(
    scenario: Scenario,
    controller: Controller,
    seed: int,
    on_window: Callable[[dict[str, float], torch.Tensor], object],
    journal: Journal | None = None,
) -> Distilled:
    """Train the task of `seed` under `controller`, evaluate it once on test data, compact it, time it.

    Args:
        scenario: its task distribution is what the seed draws from.
        controller: sets the controls before every window.
        seed: task, parameters and batches.
        on_window: given each window's row (controls and validation figures) and its observation [1, O].
        journal: as of `run_windows`.
    """
    return ship(scenario, *run_windows(scenario, controller, seed, on_window, journal))


def ship(scenario: Scenario, episodes: Episodes, last: dict[str, float]) -> Distilled:
    """Evaluate the one student of `episodes` on test data, compact it, time it; `last` is its last window's row."""
    diverged = bool(last["num_diverged"])
    students = episodes.students
    assert isinstance(students, SoloStudent)
    small = compact_now(episodes)
    dense = compact(students.student, students.student.full_masks(), 1.0)
    validation, _, validation_score = episodes.evaluate("validation")
    metrics, cost, score = episodes.evaluate("test")
    test = scenario.data.splits["test"]
    with torch.inference_mode():
        answers = small(scenario.data.inputs[test]).argmax(-1)
    figures = {
        "score": DIVERGED_SCORE if diverged else float(score[0]),
        "accuracy": float(metrics.accuracy[0]),
        "validation_score": DIVERGED_SCORE if diverged else float(validation_score[0]),
        "validation_accuracy": float(validation.accuracy[0]),
        "compacted_accuracy": float((answers == scenario.data.labels[test]).float().mean()),
        "teacher_agreement": float(metrics.agreement[0]),
        "teacher_accuracy": float(
            (scenario.signals.mean_logits(episodes.tasks[0].teachers, test).argmax(-1) == scenario.data.labels[test])
            .float()
            .mean()
        ),
        "exit_rates": [float(r) for r in metrics.exit_rates[0]],
        "macs": float(cost.macs[0]),
        "macs_ratio": float(cost.macs_ratio[0]),
        "latency_ratio": float(cost.latency_ratio[0]),
        "energy_ratio": float(cost.energy_ratio[0]),
        "energy_j": float(cost.energy_j[0]),
        "energy_kind": scenario.profile.energy["kind"],
        "num_diverged": int(diverged),
        "num_rollbacks": int(last["num_rollbacks"]),
    }
    batches = sorted({*MEASURED_BATCHES, scenario.profile.batch_size})
    measured: dict[str, Any] = {f"batch_{b}": _timed(small, dense, scenario.data.inputs[test], b) for b in batches}
    measured["profile_batch"] = scenario.profile.batch_size
    measured["profile_latency_s"] = float(cost.latency_s[0])
    return Distilled(small, figures, measured, diverged, scenario.data.scale)


def compact_now(episodes: Episodes) -> CompactStudent:
    """The one student of `episodes` of a chain as it would ship now."""
    students = episodes.students
    assert isinstance(students, SoloStudent)
    controls = decode(episodes.position, episodes.scenario.config.controls, episodes.scenario.data.num_classes)
    masks = tuple(mask[0] for mask in students.masks())
    return compact(students.student, masks, float(controls.exit_threshold[0]))


def student_card(figures: dict[str, Any], preference: Preference, policy_sha256: str) -> dict[str, Any]:
    """What is written beside a student: test figures, the preference, and which policy made it."""
    weights = dict(zip(("accuracy", "latency", "energy"), preference.weights(), strict=True))
    return {"figures": figures, "preference": weights, "policy_sha256": policy_sha256}


def write_student(folder: Path, done: Distilled, preference: Preference, policy_sha256: str) -> None:
    """Save the compacted student with its test figures, in `folder`."""
    card = student_card(done.figures, preference, policy_sha256)
    save_student(done.student, folder, {**card, "input_scale": plain(done.input_scale)})


def _timed(small: CompactStudent, dense: CompactStudent, inputs: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Latency of the compacted and of the dense student on real inputs."""
    batch = inputs[torch.arange(batch_size) % len(inputs)]
    return compare_latency(partial(small, batch), partial(dense, batch), batch_size)
