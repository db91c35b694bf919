"""What the commands that train one student show and write: the goal before, every window, and the outcome."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.policy.bundle import Bundle
from rlkd.cli.progress import Bar
from rlkd.data import Goal
from rlkd.envs.action import CONTROLS
from rlkd.envs.episodes import cautious
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.scenario import EpisodeScenario
from rlkd.io.journal import Journal
from rlkd.io.records import JsonLines, plain, write_json
from rlkd.runs.goals import (
    Possible,
    check_floor,
    check_limits,
    goal_line,
    possible_students,
    reference_accuracies,
    task_of,
)

logger = logging.getLogger(__name__)

TABLE_WIDTH = 110
FAR = 5.0  # training deviations; a bundle's own tasks stay below this nearly always


class Done(Protocol):
    """What a training brought."""

    @property
    def figures(self) -> dict[str, Any]:
        """On test data."""

    @property
    def measured(self) -> dict[str, Any]:
        """Latency by the clock."""

    @property
    def diverged(self) -> bool:
        """Whether there is no student to ship."""


def show_goal(scenario: EpisodeScenario, goal: Goal, seed: int, journal: Journal) -> Tensor | None:
    """Print what is possible before anything is trained, and train the dense student first if the floor needs it.

    Returns:
        [2], the dense student's accuracy on validation and test, or None where it was not trained.

    Raises:
        UserError: a limit or a floor that no student reaches.
    """
    task = task_of(scenario, seed)
    limits = torch.tensor(task.limits)  # [4]
    width = max(Console().width, TABLE_WIDTH)
    Console(width=width).print(_possible_table(possible_students(scenario, limits)))
    check_limits(scenario, limits)
    if not goal.has_floor:
        return None
    name, keep = goal.floor
    if name == "dense":
        logger.info(
            "training the dense student first, under the published setting: the floor is a share of its accuracy"
        )
    reference = reference_accuracies(scenario, task, journal)  # [2]
    what = {"teacher": "the teacher's", "dense": "the dense student's"}.get(name, "the stated")
    check_floor(keep * reference, reference, keep, what)
    num_samples = scenario.students(1).num_evaluated("validation")
    floors = cautious(keep * reference[None], num_samples)[0]  # [2]
    Console().print(
        f"floor: accuracy {float(floors[1]):.4f} on test, which is {keep:g} of {what} {float(reference[1]):.4f}; "
        f"{float(floors[0]):.4f} on validation, half a standard error of {num_samples} samples included",
        highlight=False,
        soft_wrap=True,
    )
    return reference if name == "dense" else None


def _possible_table(rows: Sequence[Possible]) -> Table:
    table = Table(title="what is possible (by the cost profile; ratios to the dense student)", title_justify="left")
    for column in ("student", "inputs kept", "units kept", "leaves at", "latency", "ms", "MACs", "energy", "size"):
        table.add_column(column, justify="left" if column in ("student", "leaves at") else "right", no_wrap=True)
    for row in rows:
        latency, energy, macs, size = row.cost.ratios[0].tolist()
        kept = [f"{row.feature_keep:.3f}", f"{row.unit_keep:.3f}", row.exit]
        costs = [f"{latency:.3f}", f"{float(row.cost.latency_s) * 1e3:.3g}"]
        table.add_row(row.name, *kept, *costs, *(f"{value:.3f}" for value in (macs, energy, size)))
    return table


class Watch:
    """What is written of every window while a student trains."""

    def __init__(self, folder: Path, bundle: Bundle | None, bar: Bar, journal: Journal) -> None:
        self.u: list[list[float]] = []
        self.far: dict[int, float] = {}
        self.journal = journal
        self._metrics = JsonLines(folder / "metrics.jsonl", journal)
        self.logger = tb.new_logger(folder / "tensorboard")
        self._bundle, self._bar = bundle, bar

    def window(self, row: dict[str, float], observation: Tensor) -> None:
        """Write one window's row, and how far its observation [1, O] is from the policy's training."""
        distance, name = self._distance(observation)
        window = int(row["window"])
        if distance > FAR:
            if not self.far:
                logger.warning(
                    f"note: after window {window}, {name} is {distance:.1f} deviations from what the policy was "
                    "trained on; its choices there are guesses"
                )
            self.far[window] = distance
        row = {**row, "distance_from_training": distance}
        self._metrics.write(row)
        self.u.append([row[f"u_{name}"] for name in CONTROLS])
        if not self.journal.replaying:
            tb.record_window(self.logger, row)
        self._bar.advance(1)
        self._bar.figures(score=row["score"], accuracy=row["accuracy"], macs_ratio=row["macs_ratio"])

    def _distance(self, observation: Tensor) -> tuple[float, str]:
        """Largest distance of an observation [1, O] from the training mean in deviations, and of what."""
        if self._bundle is None:
            return 0.0, ""
        policy = self._bundle.policy
        apart = ((observation[0] - policy.mean) / policy.deviation).abs()
        return float(policy.spread_of(observation)[0]), OBSERVATIONS[int(apart.argmax())]

    def close(self, config: Any, seed: int, figures: Mapping[str, Any]) -> None:
        """End the event file with the config and how the student did."""
        tb.write_config(self.logger, config)
        tb.write_controls_figure(self.logger, torch.tensor(self.u)[:, None])
        named = {"test_score": "score", "test_accuracy": "accuracy"}
        named |= {name: name for name in ("validation_score", "validation_accuracy")}
        metrics = {name: figures[key] for name, key in named.items()}
        tb.write_hparams(self.logger, config, seed, metrics=metrics, step=len(self.u))
        self.logger.close()


def finish(
    folder: Path,
    config: Any,
    task: Any,
    watch: Watch,
    done: Done,
    *,
    weights: Sequence[float],
    dense: Tensor | None = None,
    broken: str = "",
) -> int:
    """Write result.json and report.html, print the outcome, and give the exit code.

    Args:
        folder: of the run.
        config: of the run.
        task: what result.json says of the task.
        watch: saw the windows.
        done: what the training brought.
        weights: of accuracy, latency and energy.
        dense: [2], the dense student's accuracy on validation and test, if it was trained.
        broken: how the shipped student differs from the trained one; "" if it does not.
    """
    wall_s = watch.journal.elapsed_s()
    updates = config.num_windows * config.train.steps_per_window
    figures, measured = done.figures, done.measured
    row = measured[f"batch_{measured['profile_batch']}"]
    met = figures["goal_met"]
    methods: dict[str, Any] = {
        "policy": {**figures, "goal_met": None if met is None else float(met), "trainings_per_task": 1.0}
    }
    if dense is not None:
        ratios = dict.fromkeys(("macs_ratio", "latency_ratio", "energy_ratio", "size_ratio"), 1.0)
        accuracies = {"accuracy": float(dense[1]), "validation_accuracy": float(dense[0])}
        methods["dense"] = {**accuracies, **ratios, "trainings_per_task": 1.0}
    write_json(
        folder / "result.json",
        {
            "schema": 2,
            "task": task,
            "split": "test",
            "num_tasks": 1,
            "num_seeds": 1,
            "goal": plain(getattr(config, "goal", None)),
            "preference": dict(zip(("accuracy", "latency", "energy"), weights, strict=True)),
            "goal_met": met,
            "shortfall": figures.get("shortfall"),
            "speedup_over_teacher": row.get("speedup_over_teacher"),
            "speedup_over_dense": row["speedup"],
            "methods": methods,
            "paired": {},
            "measured": measured,
            "far_from_training": watch.far,
            "cost": {"agent_trainings": 0, "wall_s": wall_s, "updates_per_s": updates / wall_s},
        },
    )
    write_report([read_run(folder)], folder)
    watch.journal.finish()
    for line in _lines(folder, figures, measured, watch.far):
        Console().print(line, highlight=False, soft_wrap=True)
    if done.diverged:
        print(f"rlkd: the student diverged in window {len(watch.u)}; do not ship it", file=sys.stderr)
    if broken:
        print(f"rlkd: {broken}", file=sys.stderr)
    return 1 if done.diverged or broken else 0


def _lines(
    folder: Path, figures: dict[str, Any], measured: dict[str, dict[str, float]], far: dict[int, float]
) -> list[str]:
    """Return the lines that are printed at the end of a run."""
    lines = [
        f"validation, by which to choose among runs: J {figures['validation_score']:.4f}, accuracy "
        f"{figures['validation_accuracy']:.4f} (window {figures['best_window']} ships)",
        f"test, to report once and not to choose by: J {figures['score']:.4f}, accuracy {figures['accuracy']:.4f} "
        f"(teacher {figures['teacher_accuracy']:.4f}), MACs {figures['macs_ratio']:.3f} and parameters "
        f"{figures['size_ratio']:.3f} of the dense student's",
    ]
    if "perplexity" in figures:
        lines.append(
            f"perplexity {figures['perplexity']:.2f} (teacher {figures['teacher_perplexity']:.2f}), next token right "
            f"{figures['next_token_accuracy']:.4f} (teacher {figures['teacher_next_token_accuracy']:.4f}); accuracy "
            "above is that perplexity between the anchors in mapping.txt"
        )
    for name in (key for key in measured if key.startswith("batch_")):
        row = measured[name]
        teacher = (
            f", teacher {row['teacher_latency_s'] * 1e6:.1f} us, speed-up {row['speedup_over_teacher']:.2f}"
            if "teacher_latency_s" in row
            else ""
        )
        lines.append(
            f"measured on {row['threads']} thread, {name.replace('_', ' ')}: {row['latency_s'] * 1e6:.1f} us "
            f"(IQR {row['spread_s'] * 1e6:.1f}, 95th percentile {row['p95_s'] * 1e6:.1f}), dense "
            f"{row['dense_latency_s'] * 1e6:.1f} us, speed-up {row['speedup']:.2f}{teacher}"
        )
    profile_us = measured["profile_latency_s"] * 1e6  # type: ignore[operator]
    lines.append(f"the cost profile had predicted {profile_us:.1f} us at batch {measured['profile_batch']}")
    if far:
        lines.append(
            f"note: in {len(far)} windows the policy saw something over {FAR:g} deviations from its training tasks; "
            "its choices there are guesses"
        )
    if figures["num_undone"]:
        lines.append(f"note: {figures['num_undone']} windows fell below the floor and were undone")
    if figures["num_rollbacks"]:
        lines.append(
            f"note: {figures['num_rollbacks']} windows were undone, since their numbers were not finite; the student "
            "went on with smaller steps"
        )
    lines.append(f"student: {folder / 'student'}   figures: {folder / 'result.json'}")
    lines.append(goal_line(figures, measured))
    return lines
