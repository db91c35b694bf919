"""Controllers: from what is observed to the next unit controls, and how to run one over tasks.

A controller is a plain function `(observation [N, O], episodes, window) -> u [N, 12]`, with `window` counted from 0. A
PPO policy, a constant setting, a schedule and a per-task search's winner are all of this kind, so they are compared
alike. `episodes` gives the tasks and floors, and to gradient-based baselines the students themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.data import TaskDistribution
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.io.journal import Arrays, Journal, digest, recall

EXIT_GRID = tuple(i / 20 for i in range(21))  # shares of the way from chance to certainty
Controller = Callable[[Tensor, Episodes, int], Tensor]


@dataclass(frozen=True)
class Results:
    """Final figures of one controller on M tasks. Each [M]."""

    score: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    latency_ratio: NDArray[np.float64]
    energy_ratio: NDArray[np.float64]
    macs_ratio: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    num_rollbacks: NDArray[np.int64]


def hold_start(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
    """The setting that every student started with."""
    return episodes.start


def run(
    scenario: Scenario,
    controller: Controller,
    seeds: Sequence[int],
    tasks: TaskDistribution,
    final_split: str = "test",
    num_parallel: int = 128,
    on_window: Callable[[int], object] | None = None,
    tune_exit: bool = False,
    journal: Journal | None = None,
    label: str = "batch",
) -> Results:
    """Train one student a task under `controller` and evaluate each once, at the end.

    Args:
        scenario: what the tasks share.
        controller: sets the controls before every window.
        seeds: one a task.
        tasks: the distribution that the seeds draw from.
        final_split: "validation" for selection, "test" for the one result.
        num_parallel: students in lock-step.
        on_window: called with the number of students after every window, for progress.
        tune_exit: choose each student's exit threshold on validation once it is trained.
        journal: answers in place of the trainings, `controller` uncalled, if they were done before the run was stopped.
        label: tells what is trained, the controller above all.
    """
    inputs = {
        "tasks": asdict(tasks),
        "seeds": list(seeds),
        "split": final_split,
        "tune_exit": tune_exit,
        "scenario": [
            list(scenario.group_sizes),
            scenario.config.num_windows,
            digest(scenario.start),
        ],
    }
    kinds = {"diverged": "bool", "num_rollbacks": "int64"}
    shapes = {f.name: (kinds.get(f.name, "float64"), (len(seeds),)) for f in fields(Results)}

    def train() -> Arrays:
        results = _train(scenario, controller, seeds, tasks, final_split, num_parallel, on_window, tune_exit)
        return {name: getattr(results, name) for name in shapes}

    is_known = journal is not None and journal.has_answer
    results = Results(**recall(journal, label, inputs, shapes, train))
    if is_known and on_window:
        for _ in range(scenario.config.num_windows):
            on_window(len(seeds))
    return results


def _train(
    scenario: Scenario,
    controller: Controller,
    seeds: Sequence[int],
    tasks: TaskDistribution,
    final_split: str,
    num_parallel: int,
    on_window: Callable[[int], object] | None,
    tune_exit: bool,
) -> Results:
    """What `run` does where no journal has the answer."""
    parts = []
    for begin in range(0, len(seeds), num_parallel):
        chunk = list(seeds[begin : begin + num_parallel])
        episodes = Episodes(scenario, len(chunk), tasks)
        observation = episodes.reset(chunk)
        diverged = torch.zeros(len(chunk), dtype=torch.bool)
        for window in range(scenario.config.num_windows):
            outcome = episodes.step(controller(observation, episodes, window))
            observation, diverged = outcome.observation, diverged | outcome.diverged
            if on_window:
                on_window(len(chunk))
        if tune_exit:
            _tune_exit(episodes)
        parts.append(Results(*final_figures(episodes, diverged, outcome.telemetry.num_rollbacks, final_split)))
    return join(parts)


def join(parts: Sequence[Results]) -> Results:
    """Results of several runs, one after the other."""
    return Results(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Results)))


def final_figures(episodes: Episodes, diverged: Tensor, num_rollbacks: Tensor, split: str) -> tuple[Any, ...]:
    """The fields of `Results`; a diverged student has accuracy 0, saves nothing and scores worst."""
    if split not in ("validation", "test"):
        raise ValueError(f"split: got {split!r}; allowed: 'validation', 'test'")
    metrics, cost, score = episodes.evaluate("test" if split == "test" else "validation")
    worst = {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}
    columns = (score, metrics.accuracy, cost.latency_ratio, cost.energy_ratio, cost.macs_ratio)
    cleaned = [torch.where(diverged, torch.full_like(c, worst[i]), c) for i, c in enumerate(columns)]
    return (*(c.double().numpy() for c in cleaned), diverged.numpy(), num_rollbacks.numpy())


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
