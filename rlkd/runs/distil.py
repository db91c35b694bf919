"""Distil one new student under a controller, in one training run, and make it physically small."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkd.agents.policy.controllers import Controller
from rlkd.compression import CompactStudent, compact, save_student
from rlkd.cost import Cost, compare_latency, dense_workload
from rlkd.data import Preference
from rlkd.data.samples import InputScale
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import NO_WINDOW, Guard, GuardConfig
from rlkd.envs.reward import worst_score
from rlkd.envs.rows import window_row
from rlkd.envs.scenario import EpisodeScenario, Scenario
from rlkd.errors import UserError
from rlkd.io.files import number, reason
from rlkd.io.journal import Journal
from rlkd.io.records import plain
from rlkd.runs.goals import goal_figures
from rlkd.students import Metrics, SoloStudent
from rlkd.teachers import load_teachers

MEASURED_BATCHES = (1, 64)
SAME = 1e-6  # of accuracies in single precision

OnWindow = Callable[[dict[str, float], Tensor], object]


@dataclass(frozen=True)
class Distilled:
    """What one run brings."""

    student: CompactStudent
    figures: dict[str, Any]  # on test data, with the profile's prediction; the same for the same seed
    measured: dict[str, Any]  # latency by the clock
    diverged: bool
    input_scale: InputScale  # from raw inputs to what the student takes


class TrainedStudent(NamedTuple):
    """One student after its training, as it ships."""

    episodes: Episodes
    last: dict[str, float]  # row of the last window
    best_window: int  # what ships, as of `Guard.best_window`
    num_undone: int  # windows that the guard undid
    num_held: int  # windows in which it held units or put them back


def run_windows(
    scenario: EpisodeScenario,
    controller: Controller,
    seed: int,
    on_window: OnWindow,
    journal: Journal | None = None,
    guard: GuardConfig | None = None,
) -> TrainedStudent:
    """Train one student to the end, or until it diverges, and bring back the best window.

    Args:
        scenario: of chains or of a real model.
        controller: sets the controls before every window, from what it is given alone.
        seed: task, parameters and batches.
        on_window: as in `distil`; after a resume also called for the windows before the stop (`journal.replaying`).
        journal: keeps the student's state after every window; the training goes on from the last one.
        guard: what is undone, and which window ships.
    """
    episodes = Episodes(scenario, 1)
    observation = episodes.reset([seed])
    watched = Guard(episodes, guard)
    rows: list[dict[str, float]] = []
    seen = torch.full((scenario.config.num_windows, observation.shape[1]), torch.nan)  # [W, O], of the windows done
    if journal:
        rows = _go_on(episodes, watched, seen, journal, on_window)
        observation = seen[None, len(rows) - 1] if rows else observation
    for window in range(len(rows), scenario.config.num_windows):
        if rows and rows[-1]["num_diverged"]:
            break
        outcome = episodes.step(watched.before_window(controller(observation, episodes, window)))
        acted = episodes.u  # what acted: the controller's choice, moved into the limits
        observation = watched.after_window(outcome)
        row = window_row(window, acted, outcome, scenario)
        guarded = {"num_undone": float(watched.num_undone[0]), "num_held": float(watched.num_held[0])}
        rows.append({**row, "floor": float(episodes.floors[0, 0]), **guarded})
        on_window(rows[-1], observation)
        seen[window] = observation[0]
        if journal:
            kept = watched.state()
            if bool(kept["is_current"].all()):  # the best window is this one: its state need not be saved twice
                kept = {name: tensor for name, tensor in kept.items() if not name.startswith("best.")}
            state = {**episodes.training_state(), "seen": seen, **{f"guard.{k}": t for k, t in kept.items()}}
            has_best = any(name.startswith("best.") for name in kept)
            journal.save_state(window + 1, state, {"rows": rows, "has_best": has_best})
    best = watched.finish()
    return TrainedStudent(episodes, rows[-1], int(best[0]), int(watched.num_undone[0]), int(watched.num_held[0]))


def _go_on(
    episodes: Episodes, guard: Guard, seen: Tensor, journal: Journal, on_window: OnWindow
) -> list[dict[str, float]]:
    """Put reset `episodes`, their guard and `seen` where the journal's last state has them; returns the windows' rows.

    Raises:
        UserError: a state that is not of this training.
    """
    saved = journal.pending
    if saved is None:
        journal.take_state()
        return []
    own = episodes.training_state()
    watched = {name: tensor for name, tensor in guard.state().items() if not name.startswith("best.")}
    state = {**own, "seen": seen, **{f"guard.{name}": tensor for name, tensor in watched.items()}}
    try:
        note = saved.note["state"]
        if note["has_best"]:
            state |= {f"guard.best.{name}": tensor for name, tensor in own.items()}
        tensors = saved.tensors({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()})
        rows = [{str(k): number(v, str(k)) for k, v in row.items()} for row in note["rows"]]
        if not 1 <= len(rows) <= len(seen) or not {"num_diverged", "num_rollbacks"} <= set(rows[-1]):
            raise ValueError(f"{len(rows)} windows")
        episodes.load_training_state({name: tensors[name] for name in own})
        kept = {k.removeprefix("guard."): t for k, t in tensors.items() if k.startswith("guard.")}
        if bool(kept["is_current"].all()):
            kept |= {f"best.{name}": tensors[name] for name in own}
        guard.load_state(kept)
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
    on_window: OnWindow,
    journal: Journal | None = None,
    guard: GuardConfig | None = None,
) -> Distilled:
    """Train the task of `seed` under `controller`, evaluate it once on test data, compact it, time it.

    Args:
        scenario: its task distribution is what the seed draws from.
        controller: sets the controls before every window.
        seed: task, parameters and batches.
        on_window: given each window's row (controls and validation metrics) and its observation [1, O].
        journal: as of `run_windows`.
        guard: as of `run_windows`.
    """
    return ship(scenario, run_windows(scenario, controller, seed, on_window, journal, guard))


def ship(scenario: Scenario, trained: TrainedStudent) -> Distilled:
    """Evaluate the one student on test data, compact it, and time it beside the dense student and the teacher."""
    episodes, diverged = trained.episodes, is_lost(trained)
    students = episodes.students
    assert isinstance(students, SoloStudent)
    small = compact_now(episodes)
    dense = compact(students.student, students.student.full_masks(), 1.0)
    test = scenario.data.splits["test"]
    with torch.inference_mode():
        answers = small(scenario.data.inputs[test]).argmax(-1)
    task = episodes.tasks[0]
    teacher_answers = scenario.signals.mean_logits(task.teachers, test).argmax(-1)
    figures, _, cost = shared_figures(trained)
    figures |= {
        "compacted_accuracy": float((answers == scenario.data.labels[test]).float().mean()),
        "teacher_accuracy": float((teacher_answers == scenario.data.labels[test]).float().mean()),
        "energy_kind": scenario.profile.energy["kind"],
        "macs_of_dense_student": float(cost.macs[0]) / max(float(cost.macs_ratio[0]), 1e-12),
        "macs_of_teacher": scenario.teacher_macs,
        "by_class": accuracy_by_class(answers, scenario.data.labels[test], scenario.data.num_classes),
    }
    teacher = load_teachers(scenario.config.teacher, scenario.data)[task.teacher]
    teacher_work = dense_workload(teacher, scenario.profile.batch_size)
    figures |= {
        "parameters_of_teacher": float(teacher_work.parameters),
        "energy_of_teacher_j": float(scenario.profile.energy_j(teacher_work)),
    }
    networks = (small, dense, compact(teacher, teacher.full_masks(), 1.0))
    batches = sorted({*MEASURED_BATCHES, scenario.profile.batch_size})
    measured: dict[str, Any] = {f"batch_{b}": _timed(networks, scenario.data.inputs[test], b) for b in batches}
    measured["profile_batch"] = scenario.profile.batch_size
    measured["profile_latency_s"] = float(cost.latency_s[0])
    return Distilled(small, figures, measured, diverged, scenario.data.scale)


def accuracy_by_class(answers: Tensor, labels: Tensor, num_classes: int) -> dict[str, dict[str, float]]:
    """Return number of samples and accuracy of every class that answers [B] and labels [B] hold."""
    counts = labels.bincount(minlength=num_classes)  # [C]
    right = labels[answers == labels].bincount(minlength=num_classes)  # [C]
    pairs = zip(counts.tolist(), right.tolist(), strict=True)
    return {str(i): {"num_samples": n, "accuracy": hits / n} for i, (n, hits) in enumerate(pairs) if n}


def is_lost(trained: TrainedStudent) -> bool:
    """Whether the student diverged and no earlier window can ship."""
    return bool(trained.last["num_diverged"]) and trained.best_window == NO_WINDOW


def shared_figures(trained: TrainedStudent) -> tuple[dict[str, Any], Metrics, Cost]:
    """Figures of any kind of student, and its metrics and cost on test data.

    Its accuracy on validation, by which its window was chosen, stands among the figures.
    """
    episodes, lost = trained.episodes, is_lost(trained)
    validation, _, validation_score = episodes.evaluate("validation")
    metrics, cost, score = episodes.evaluate("test")
    accuracy = (float(validation.accuracy[0]), float(metrics.accuracy[0]))
    figures: dict[str, Any] = {
        "score": float(worst_score(episodes.floors[:, 1])[0]) if lost else float(score[0]),
        "accuracy": accuracy[1],
        "validation_score": float(worst_score(episodes.floors[:, 0])[0]) if lost else float(validation_score[0]),
        "validation_accuracy": accuracy[0],
        **goal_figures(episodes, accuracy, cost, lost),
        "best_window": trained.best_window,
        "teacher_agreement": float(metrics.agreement[0]),
        "num_test_samples": len(episodes.scenario.data.splits["test"]),
        "exit_rates": [float(r) for r in metrics.exit_rates[0]],
        "macs": float(cost.macs[0]),
        "parameters": float(cost.parameters[0]),
        "macs_ratio": float(cost.macs_ratio[0]),
        "latency_ratio": float(cost.latency_ratio[0]),
        "energy_ratio": float(cost.energy_ratio[0]),
        "size_ratio": float(cost.size_ratio[0]),
        "energy_j": float(cost.energy_j[0]),
        "num_diverged": int(lost),
        "num_rollbacks": int(trained.last["num_rollbacks"]),
        "num_undone": trained.num_undone,
        "num_held": trained.num_held,
    }
    return figures, metrics, cost


def compact_now(episodes: Episodes) -> CompactStudent:
    """Return the single student in `episodes` of a chain as it would ship now."""
    students = episodes.students
    assert isinstance(students, SoloStudent)
    masks = tuple(mask[0] for mask in students.masks())
    return compact(students.student, masks, float(episodes.threshold[0]))


def check_shipped(figures: Mapping[str, Any], tolerance: float = SAME) -> str:
    """One line that says how the shipped student differs from the trained one; "" if both are as accurate."""
    shipped, trained = figures["compacted_accuracy"], figures["accuracy"]
    if abs(shipped - trained) <= tolerance:
        return ""
    return f"the shipped student has accuracy {shipped:.6f} on test, in training it had {trained:.6f}; do not ship it"


def student_card(figures: dict[str, Any], weights: Sequence[float], policy_sha256: str) -> dict[str, Any]:
    """Return the card of a student: test metrics, the weights of the goal, and the digest of the policy."""
    preference = dict(zip(("accuracy", "latency", "energy"), weights, strict=True))
    return {"figures": figures, "preference": preference, "policy_sha256": policy_sha256}


def write_student(folder: Path, done: Distilled, preference: Preference | Sequence[float], policy_sha256: str) -> None:
    """Save the compacted student with its test figures, in `folder`."""
    weights = preference.weights() if isinstance(preference, Preference) else preference
    card = student_card(done.figures, weights, policy_sha256)
    save_student(done.student, folder, {**card, "input_scale": plain(done.input_scale)})


def _timed(networks: Sequence[CompactStudent], inputs: Tensor, batch_size: int) -> dict[str, float]:
    """Latency of the compacted student, the dense one and the teacher on real inputs."""
    batch = inputs[torch.arange(batch_size) % len(inputs)]
    student, dense, teacher = (partial(network, batch) for network in networks)
    return compare_latency(student, dense, batch_size, teacher)
