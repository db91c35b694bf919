"""Controllers: from what is observed to the next unit controls, and how to run one over tasks.

A controller is a plain function `(observation [N, O], episodes, window) -> u [N, 12]`, with `window` counted from 0. A
PPO policy, a constant setting, a schedule and a per-task search's winner are all of this kind, so they are compared
alike. `episodes` gives the tasks and floors, and to gradient-based baselines the students themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.data import TaskDistribution
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import NO_WINDOW, Guard, GuardConfig, meets_goal
from rlkd.envs.prepare import Group, train_missing
from rlkd.envs.references import References
from rlkd.envs.reward import worst_score
from rlkd.envs.scenario import Scenario
from rlkd.io.journal import Journal, Shapes, digest
from rlkd.workers import IN_PROCESS, Work, Workers, ignore

EXIT_GRID = tuple(i / 20 for i in range(21))  # shares of the way from chance to certainty
Controller = Callable[[Tensor, Episodes, int], Tensor]


@dataclass(frozen=True)
class Results:
    """Final metrics of one controller on M tasks. Each [M]."""

    score: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    latency_ratio: NDArray[np.float64]
    energy_ratio: NDArray[np.float64]
    macs_ratio: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    num_rollbacks: NDArray[np.int64]
    floor: NDArray[np.float64]  # least accuracy that meets the goal; 0: no floor
    shortfall: NDArray[np.float64]  # accuracy below the floor
    goal_met: NDArray[np.bool_]  # exactly; limits on costs count, too
    goal_met_within_1_point: NDArray[np.bool_]


@dataclass(frozen=True)
class RunOptions:
    """How trainings run, whatever sets their controls."""

    guard: GuardConfig | None = None
    """Ships each student's best window instead of its last; by default the last."""
    on_window: Callable[[int], object] = ignore
    """Called with the number of students after every window, for progress."""
    journal: Journal | None = None
    """Gives results of trainings that were done before the run was stopped."""
    num_parallel: int = 128
    """Most students in lock-step; results depend on it by float rounding."""
    workers: Workers = IN_PROCESS
    """Do the trainings that are independent of each other; results do not depend on them."""


DEFAULT_OPTIONS = RunOptions()


def hold_start(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
    """Return the setting that every student started with."""
    return episodes.start


def follow(schedule: Tensor) -> Controller:
    """Return a controller that gives every task the same `schedule` [W, 12], and repeats its last row past the end."""
    return lambda observation, episodes, window: schedule[min(window, len(schedule) - 1)].expand_as(episodes.start)


@dataclass(frozen=True)
class Batch:
    """One student a task under one controller, each evaluated once, at the end."""

    scenario: Scenario
    controller: Controller
    """Sets the controls before every window."""
    seeds: Sequence[int]
    """One a task."""
    tasks: TaskDistribution
    """The distribution that the seeds draw from."""
    final_split: str = "test"
    """"validation" for selection, "test" for the one result."""
    tune_exit: bool = False
    """Choose each student's exit threshold on validation once it is trained."""
    label: str = "batch"
    """Name of the trainings in the journal; it must identify the controller, which the journal cannot compare."""

    def inputs(self, guard: GuardConfig | None) -> dict[str, Any]:
        """Return what the journal compares."""
        return {
            "tasks": asdict(self.tasks),
            "seeds": list(self.seeds),
            "split": self.final_split,
            "tune_exit": self.tune_exit,
            "guard": asdict(guard) if guard else None,
            "scenario": [
                list(self.scenario.group_sizes),
                self.scenario.config.num_windows,
                digest(self.scenario.start),
            ],
        }

    def shapes(self) -> Shapes:
        """Types and shapes of its results in the journal."""
        kinds = {
            "diverged": "bool",
            "num_rollbacks": "int64",
            "goal_met": "bool",
            "goal_met_within_1_point": "bool",
        }
        return {f.name: (kinds.get(f.name, "float64"), (len(self.seeds),)) for f in fields(Results)}


def run(
    scenario: Scenario,
    controller: Controller,
    seeds: Sequence[int],
    tasks: TaskDistribution,
    *,
    final_split: str = "test",
    tune_exit: bool = False,
    label: str = "batch",
    options: RunOptions = DEFAULT_OPTIONS,
) -> Results:
    """Train one `Batch` in this process, whatever the workers are, so that `controller` may keep what it sees.

    Args:
        scenario: what the tasks share.
        controller: as of `Batch`, and all further arguments.
        seeds: one a task.
        tasks: the distribution that the seeds draw from.
        final_split: "validation" for selection, "test" for the one result.
        tune_exit: choose each student's exit threshold on validation once it is trained.
        label: name of the trainings in the journal.
        options: guard, progress and journal; a journal that has the results gives them without calling `controller`.
    """
    batch = Batch(scenario, controller, seeds, tasks, final_split=final_split, tune_exit=tune_exit, label=label)
    return run_all([batch], replace(options, workers=IN_PROCESS))[0]


def run_all(batches: Sequence[Batch], options: RunOptions) -> list[Results]:
    """Train independent batches, each of which is a piece of work, and return their results in the same order.

    Controllers run in other processes where there are workers; what they keep there is lost.
    """
    journal = options.journal
    results: list[Results] = []
    for batch in batches:
        arrays = journal.find(batch.label, batch.inputs(options.guard), batch.shapes()) if journal else None
        if arrays is None:
            break
        for _ in range(batch.scenario.config.num_windows):
            options.on_window(len(batch.seeds))
        results.append(Results(**arrays))
    missing = batches[len(results) :]
    for batch, computed in zip(missing, _computed(missing, options), strict=True):
        if journal:
            arrays = {name: getattr(computed, name) for name in batch.shapes()}
            journal.add(batch.label, batch.inputs(options.guard), batch.shapes(), arrays)
        results.append(computed)
    return results


def _computed(batches: Sequence[Batch], options: RunOptions) -> Iterator[Results]:
    """Yield the results of batches one by one."""
    workers, known = options.workers, [References()] * len(batches)
    if workers is not IN_PROCESS:  # where all is trained here, references are trained when they are met
        known = train_missing([Group(b.scenario, b.seeds, b.tasks, options.num_parallel) for b in batches], workers)
    own = RunOptions(guard=options.guard, num_parallel=options.num_parallel)
    works = [
        Work(
            ("batch", number, batch.label),
            _train_batch,
            (workers.share(batch.scenario), found, replace(batch, scenario=None), own),  # type: ignore[arg-type]
            len(batch.seeds),
            batch.scenario.config.num_windows,
        )
        for number, (batch, found) in enumerate(zip(batches, known, strict=True))
    ]
    yield from workers.run(works, options.on_window)


def _train_batch(
    scenario: Scenario, known: References, batch: Batch, options: RunOptions, *, on_window: Callable[[int], object]
) -> Results:
    """Do a piece of work: the batch without its scenario, which comes apart."""
    scenario.known.add(known)
    options = replace(options, on_window=on_window)
    parts = []
    for begin in range(0, len(batch.seeds), options.num_parallel):
        chunk = list(batch.seeds[begin : begin + options.num_parallel])
        episodes = Episodes(scenario, len(chunk), batch.tasks)
        diverged, num_rollbacks = _train(episodes, batch.controller, chunk, options)
        if batch.tune_exit:
            _tune_exit(episodes)
        parts.append(final_results(episodes, diverged, num_rollbacks, batch.final_split))
    return join(parts)


def _train(
    episodes: Episodes, controller: Controller, seeds: Sequence[int], options: RunOptions
) -> tuple[Tensor, Tensor]:
    """Train the students of `episodes`, one a seed; return which diverged and how often each was rolled back, [N]."""
    observation = episodes.reset(seeds)
    guard = Guard(episodes, options.guard) if options.guard else None
    diverged = torch.zeros(len(seeds), dtype=torch.bool)
    for window in range(episodes.scenario.config.num_windows):
        u = controller(observation, episodes, window)
        outcome = episodes.step(guard.before_window(u) if guard else u)
        observation, diverged = outcome.observation, diverged | outcome.diverged
        if guard:
            observation = guard.after_window(outcome)
        options.on_window(len(seeds))
    if guard:
        diverged = diverged & (guard.finish() == NO_WINDOW)
    return diverged, outcome.telemetry.num_rollbacks


def join(parts: Sequence[Results]) -> Results:
    """Results of several runs, one after the other."""
    return Results(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Results)))


def final_results(episodes: Episodes, diverged: Tensor, num_rollbacks: Tensor, split: str) -> Results:
    """`Results` of the students as they are; a diverged student has accuracy 0, saves nothing and scores worst."""
    if split not in ("validation", "test"):
        raise ValueError(f"split: got {split!r}; allowed: 'validation', 'test'")
    metrics, cost, score = episodes.evaluate("test" if split == "test" else "validation")
    floor = episodes.floors[:, 1 if split == "test" else 0]  # [N]
    accuracy = torch.where(diverged, 0.0, metrics.accuracy)
    latency_ratio = torch.where(diverged, 1.0, cost.latency_ratio)
    ratios = torch.where(diverged[:, None], 1.0, cost.ratios)  # [N, 4]
    within_limit = (ratios <= episodes.limits + 1e-6).all(-1)

    def array(values: Tensor) -> NDArray[np.float64]:
        return values.double().numpy()

    return Results(
        score=array(torch.where(diverged, worst_score(floor), score)),
        accuracy=array(accuracy),
        latency_ratio=array(latency_ratio),
        energy_ratio=array(torch.where(diverged, 1.0, cost.energy_ratio)),
        macs_ratio=array(torch.where(diverged, 1.0, cost.macs_ratio)),
        diverged=diverged.numpy(),
        num_rollbacks=num_rollbacks.numpy(),
        floor=array(floor),
        shortfall=array((floor - accuracy).clamp_min(0.0)),
        goal_met=(meets_goal(accuracy, floor) & within_limit).numpy(),
        goal_met_within_1_point=(meets_goal(accuracy, floor, 0.01) & within_limit).numpy(),
    )


def _tune_exit(episodes: Episodes) -> None:
    """Set every student's exit threshold to the one of EXIT_GRID, or its own, with the best score on validation."""
    best = episodes.threshold.clone()  # [N]
    best_score = episodes.evaluate("validation")[2]  # [N]
    chance = 1.0 / episodes.scenario.data.num_classes
    for share in EXIT_GRID:
        candidate = torch.full_like(best, chance + (1.0 - chance) * share)
        episodes.set_exit(candidate)
        now = episodes.evaluate("validation")[2]
        best = torch.where(now > best_score, candidate, best)
        best_score = torch.maximum(now, best_score)
    episodes.set_exit(best)
