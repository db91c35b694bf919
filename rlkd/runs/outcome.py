"""What a run of one student checks before it trains and writes while and after it trains."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.policy.bundle import Bundle
from rlkd.data import Goal
from rlkd.data.examples import TokenExamples
from rlkd.envs.action import CONTROLS
from rlkd.envs.episodes import cautious
from rlkd.envs.observation import OBSERVATIONS, unknown_observations
from rlkd.envs.scenario import EpisodeScenario
from rlkd.io.journal import Journal
from rlkd.io.records import JsonLines, plain, write_json
from rlkd.runs.folder import Progress
from rlkd.runs.goals import (
    PossibleStudent,
    check_floor,
    check_limits,
    possible_students,
    reference_accuracies,
    task_of,
)

logger = logging.getLogger(__name__)

FAR = 5.0  # training deviations; a bundle's own tasks stay below this nearly always
Show = Callable[[Sequence[PossibleStudent] | str], object]  # given the possible students, then the floor in words


class Done(Protocol):
    """What a training brought."""

    @property
    def student(self) -> nn.Module:
        """As it ships."""

    @property
    def figures(self) -> dict[str, Any]:
        """On test data."""

    @property
    def measured(self) -> dict[str, Any]:
        """Latency by the clock."""

    @property
    def diverged(self) -> bool:
        """Whether there is no student to ship."""


@dataclass(frozen=True)
class Outcome:
    """One student's run at its end."""

    folder: Path
    done: Done
    result: dict[str, Any]  # content of result.json
    history: list[dict[str, float]]  # one row a window: controls and validation metrics
    far: dict[int, float]  # windows in which the policy saw something far from its training, with the distance
    broken: str  # how the shipped student differs from the trained one; "" if it does not


def check_goal(
    scenario: EpisodeScenario, goal: Goal, seed: int, journal: Journal | None = None, show: Show = lambda found: None
) -> Tensor | None:
    """Tell what is possible before anything is trained, and train the dense student first if the floor needs it.

    Args:
        scenario: of the student.
        goal: of the student.
        seed: of its task.
        journal: answers in place of the dense student's training, if it was done before the run was stopped.
        show: given the students that can come out, then the floor in words.

    Returns:
        [2], the dense student's accuracy on validation and test, or None where it was not trained.

    Raises:
        UserError: a limit or a floor that no student reaches.
    """
    task = task_of(scenario, seed)
    limits = torch.tensor(task.limits)  # [4]
    show(possible_students(scenario, limits))
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
    show(
        f"floor: accuracy {float(floors[1]):.4f} on test, which is {keep:g} of {what} {float(reference[1]):.4f}; "
        f"{float(floors[0]):.4f} on validation, half a standard error of {num_samples} samples included"
    )
    chance = _commonest_share(scenario)
    if float(floors[1]) <= chance:
        logger.warning(
            f"note: the floor {float(floors[1]):.4f} is not above {chance:.4f}, the share of the commonest class on "
            "validation, which one constant answer reaches; look at the accuracy by class in the report"
        )
    return reference if name == "dense" else None


def _commonest_share(scenario: EpisodeScenario) -> float:
    """Return the share of the commonest class on validation; 0 for language models, whose texts have no class."""
    if isinstance(scenario.data, TokenExamples):
        return 0.0
    counts = scenario.data.labels[scenario.data.splits["validation"]].bincount()
    return float(counts.max()) / float(counts.sum())


class RunLog:
    """What is written of every window while a student trains."""

    def __init__(
        self,
        folder: Path,
        bundle: Bundle | None,
        progress: Progress,
        journal: Journal,
        *,
        scenario: EpisodeScenario,
    ) -> None:
        self.u: list[list[float]] = []
        self.rows: list[dict[str, float]] = []
        self.far: dict[int, float] = {}
        self.journal = journal
        self._metrics = JsonLines(folder / "metrics.jsonl", journal)
        self.logger = tb.new_logger(folder / "tensorboard")
        self._bundle, self._progress = bundle, progress
        self._unknown = unknown_observations(scenario.num_exits, scenario.group_sizes)

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
        self.rows.append(row)
        self.u.append([row[f"u_{name}"] for name in CONTROLS])
        if not self.journal.replaying:
            tb.record_window(self.logger, row)
        self._progress.advance(1)
        self._progress.figures(score=row["score"], accuracy=row["accuracy"], macs_ratio=row["macs_ratio"])

    def _distance(self, observation: Tensor) -> tuple[float, str]:
        """Largest distance of an observation [1, O] from the training mean in deviations, and of what."""
        if self._bundle is None:
            return 0.0, ""
        policy = self._bundle.policy
        read = policy.readable(observation, self._unknown)
        apart = ((read[0] - policy.mean) / policy.deviation).abs()
        return float(policy.spread_of(read)[0]), OBSERVATIONS[int(apart.argmax())]

    def close(self, config: Any, seed: int, figures: Mapping[str, Any]) -> None:
        """End the event file with the config and how the student did."""
        tb.write_config(self.logger, config)
        tb.write_controls_figure(self.logger, torch.tensor(self.u)[:, None])
        named = {"test_score": "score", "test_accuracy": "accuracy"}
        named |= {name: name for name in ("validation_score", "validation_accuracy")}
        metrics = {name: figures[key] for name, key in named.items()}
        tb.write_hparams(self.logger, config, seed, metrics=metrics, step=len(self.u))
        self.logger.close()


def write_outcome(
    folder: Path,
    config: Any,
    task: Any,
    watch: RunLog,
    done: Done,
    *,
    weights: Sequence[float],
    dense: Tensor | None = None,
    broken: str = "",
) -> Outcome:
    """Write result.json and report.html.

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
    result = {
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
    }
    write_json(folder / "result.json", result)
    write_report([read_run(folder)], folder)
    watch.journal.finish()
    return Outcome(folder, done, result, watch.rows, watch.far, broken)
