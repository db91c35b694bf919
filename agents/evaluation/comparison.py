"""Paired comparison of controllers: the same tasks, initial weights and batches for all; metrics with intervals.

Interquartile means and stratified bootstrap intervals follow Agarwal et al. 2021 ("Deep RL at the edge of the
statistical precipice"). Tasks are the units that are resampled, together for all methods.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

from rlkd.agents.policy.controllers import Results

NUM_RESAMPLES = 2000
METRICS = ("score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio")


def interval(values: NDArray[np.float64], statistic: str, generator: np.random.Generator) -> dict[str, Any]:
    """{statistic: value, "ci95": [low, high]} of [M] values by the percentile bootstrap over tasks."""
    index = generator.integers(len(values), size=(NUM_RESAMPLES, len(values)))  # [R, M]
    drawn = values[index]  # [R, M]
    if statistic == "iqm":
        value, resampled = trim_mean(values, 0.25), trim_mean(drawn, 0.25, axis=1)
    else:
        value, resampled = values.mean(), drawn.mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {statistic: float(value), "ci95": [float(low), float(high)]}


def feasible_tasks(results: Mapping[str, Results]) -> NDArray[np.bool_]:
    """[M], tasks whose goal at least one of the compared methods met on test within one point of accuracy."""
    feasible: NDArray[np.bool_] = np.logical_or.reduce([r.goal_met_within_1_point for r in results.values()])
    return feasible


def summarise(
    results: Results, trainings_per_task: float, feasible: NDArray[np.bool_], generator: np.random.Generator
) -> dict[str, Any]:
    """One method's entry of `result.json`: IQM with interval, and mean, of every metric; goals met.

    Shares of goals met are over the `feasible` tasks [M] bool, null without one; the shortfall is over all tasks.
    """
    entry: dict[str, Any] = {}
    for name in METRICS:
        values = getattr(results, name)
        entry[name] = {**interval(values, "iqm", generator), "mean": float(values.mean())}
    for name in ("goal_met", "goal_met_within_1_point"):
        met = getattr(results, name)[feasible]
        entry[name] = float(met.mean()) if len(met) else None
    entry["shortfall"] = float(results.shortfall.mean())
    entry["num_diverged"] = int(results.diverged.sum())
    entry["num_rollbacks"] = int(results.num_rollbacks.sum())
    entry["trainings_per_task"] = trainings_per_task
    return entry


def paired(method: Results, other: Results, generator: np.random.Generator) -> dict[str, Any]:
    """Mean lead in score over the same tasks, its interval, and how often `method` is better (ties count half)."""
    difference = method.score - other.score
    row = interval(difference, "difference", generator)
    row["probability_of_improvement"] = float(((difference > 0) + 0.5 * (difference == 0)).mean())
    return row


def compare(
    results: Mapping[str, Results], trainings_per_task: Mapping[str, float], seed: int, reference: str = "policy"
) -> dict[str, Any]:
    """One goal's entry of `result.json`; every other method is paired with `reference` if that is among them."""
    generator, feasible = np.random.default_rng(seed), feasible_tasks(results)
    methods = {name: summarise(r, trainings_per_task[name], feasible, generator) for name, r in results.items()}
    first = reference if reference in results else next(iter(results))
    pairs = {f"{first}-{name}": paired(results[first], r, generator) for name, r in results.items() if name != first}
    return {"num_feasible": int(feasible.sum()), "methods": methods, "paired": pairs}


def csv_rows(results: Mapping[str, Mapping[str, Results]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a goal, method and task, for `result.csv`."""
    rows = []
    for goal, methods in results.items():
        for method, r in methods.items():
            for i, seed in enumerate(seeds):
                metrics = {name: float(getattr(r, name)[i]) for name in (*METRICS, "floor", "shortfall")}
                met = bool(r.goal_met[i])
                rows.append({"goal": goal, "method": method, "task_seed": seed, **metrics, "goal_met": met})
    return rows
