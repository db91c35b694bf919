"""Search for the best controls of every single task, which is the alternative to a policy.

One trial is one full student training, scored on validation. The tasks are searched side by side: each has an
Optuna study of its own, and trial k of all of them trains in lock-step. The first B trials of a search are the
search with budget B, so one search answers for every smaller budget.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.baselines.recipes import RECIPES, Recipe, for_tasks
from rlkd.agents.baselines.search import axes, named, run_points
from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, Controller, Results, RunOptions
from rlkd.data import TaskDistribution
from rlkd.envs.scenario import Scenario

Sampler = Literal["random", "tpe"]


@dataclass(frozen=True)
class TaskSearch:
    """A search of each task for itself."""

    sampler: Sampler
    """"random", or "tpe" (Bergstra et al. 2011), multivariate."""
    recipe: Recipe
    """What is tuned."""
    num_trials: int
    """Full trainings a task."""


@dataclass(frozen=True)
class Trials:
    """All trials of M tasks."""

    seeds: tuple[int, ...]  # [M], of the tasks
    recipe: Recipe
    points: Tensor  # [M, B, A] of the recipe
    score: NDArray[np.float64]  # [M, B], J on validation
    accuracy: NDArray[np.float64]  # [M, B]
    latency_ratio: NDArray[np.float64]  # [M, B]
    energy_ratio: NDArray[np.float64]  # [M, B]

    def best(self, budget: int) -> Controller:
        """Every task's best of its first `budget` trials, as a controller for those tasks."""
        chosen = torch.from_numpy(self.score[:, :budget].argmax(1))  # [M]; ties go to the earlier trial
        points = self.points[torch.arange(len(self.seeds)), chosen]
        return self.recipe.controller(for_tasks(self.seeds, points))


def search_tasks(
    scenario: Scenario,
    seeds: Sequence[int],
    tasks: TaskDistribution,
    *,
    search: TaskSearch,
    first: Tensor,
    seed: int,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Trials:
    """Search each task for itself.

    Args:
        scenario: what the tasks share.
        seeds: M tasks.
        tasks: the distribution that the seeds draw from, its goal fixed.
        search: sampler, recipe and budget.
        first: [12], the first trial of every task: the best constant setting known before the search.
        seed: of the samplers.
        options: of every training.
    """
    studies = [
        optuna.create_study(direction="maximize", sampler=_sampler(search.sampler, seed + i)) for i in range(len(seeds))
    ]

    def train(points: Tensor) -> Results:
        return run_points(scenario, search.recipe, seeds, points, tasks=tasks, options=options)

    queue = search.recipe.first(first[None])
    points, results = _search(studies, search.num_trials, queue, train=train, values_of=lambda r: r.score[:, None])
    return _trials(seeds, search.recipe, points, results)


def search_fronts(
    scenario: Scenario,
    seeds: Sequence[int],
    tasks: TaskDistribution,
    *,
    num_trials: int,
    first: Tensor,
    seed: int,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Trials:
    """Search each task's constant settings for the front of accuracy against cost (multi-objective TPE).

    Ozaki et al. 2022, as Optuna has it; cost is 0.75 latency + 0.25 energy, both ratios to the dense student.
    Arguments as in `search_tasks`.
    """
    studies = [
        optuna.create_study(
            directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed + i, multivariate=True)
        )
        for i in range(len(seeds))
    ]
    recipe = RECIPES["constant"]

    def train(points: Tensor) -> Results:
        return run_points(scenario, recipe, seeds, points, tasks=tasks, options=options)

    def values(r: Results) -> NDArray[np.float64]:
        return np.stack([r.accuracy, cost_of(r.latency_ratio, r.energy_ratio)], axis=-1)

    points, results = _search(studies, num_trials, recipe.first(first[None]), train=train, values_of=values)
    return _trials(seeds, recipe, points, results)


def cost_of(latency_ratio: NDArray[np.float64], energy_ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """One cost from two ratios, in the proportion 3 : 1 of the default preference."""
    return 0.75 * latency_ratio + 0.25 * energy_ratio


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


def _search(
    studies: Sequence[optuna.Study],
    num_trials: int,
    queue: Tensor,
    *,
    train: Callable[[Tensor], Results],
    values_of: Callable[[Results], NDArray[np.float64]],
) -> tuple[list[Tensor], list[Results]]:
    """Ask every study, train all tasks, tell every study, `num_trials` times; `queue` [K, A] comes first.

    Returns:
        For each trial the points [M, A] and the results of M tasks.
    """
    for study in studies:
        for point in queue:
            study.enqueue_trial(named(point))
    points, columns = [], []
    for _ in range(num_trials):
        asked = [study.ask(axes(queue.shape[1])) for study in studies]
        drawn = torch.tensor([list(trial.params.values()) for trial in asked])  # [M, A]
        results = train(drawn)
        for study, trial, values in zip(studies, asked, values_of(results), strict=True):
            study.tell(trial, [float(v) for v in values])
        points.append(drawn)
        columns.append(results)
    return points, columns


def _trials(seeds: Sequence[int], recipe: Recipe, points: Sequence[Tensor], columns: Sequence[Results]) -> Trials:
    """Stack points [M, A] and results of every trial."""
    stacked = {
        name: np.stack([getattr(r, name) for r in columns], axis=1)
        for name in ("score", "accuracy", "latency_ratio", "energy_ratio")
    }
    return Trials(tuple(seeds), recipe, torch.stack(list(points), dim=1), **stacked)


def hypervolume(
    accuracy: NDArray[np.float64], cost: NDArray[np.float64], worst_accuracy: float = 0.0, worst_cost: float = 1.0
) -> float:
    """Area dominated by the points [P] in the plane of accuracy (up) and cost (down), beyond a reference point.

    Formula: the union of the rectangles [worst_accuracy, a] x [c, worst_cost] (Zitzler & Thiele 1998).
    Non-finite points raise ValueError.
    """
    if not (np.isfinite(accuracy).all() and np.isfinite(cost).all()):
        raise ValueError("hypervolume: got a non-finite point")
    area, right = 0.0, -math.inf
    best = worst_accuracy
    # from the cheapest on: between one cost and the next, the best accuracy so far counts
    for c, a in sorted(zip(cost.tolist(), accuracy.tolist(), strict=True)):
        if c >= worst_cost:
            break
        if right > -math.inf:
            area += (c - right) * (best - worst_accuracy)
        right, best = c, max(best, a)
    return area if right == -math.inf else area + (worst_cost - right) * (best - worst_accuracy)
