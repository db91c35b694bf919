"""Paired comparison of controllers: the same tasks, initial weights and batches for all; figures with intervals.

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
FIGURES = ("score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio")


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


def summarise(results: Results, trainings_per_task: float, generator: np.random.Generator) -> dict[str, Any]:
    """One method's entry of `result.json`: IQM with interval, and mean, of every figure."""
    entry: dict[str, Any] = {}
    for name in FIGURES:
        values = getattr(results, name)
        entry[name] = {**interval(values, "iqm", generator), "mean": float(values.mean())}
    entry["num_diverged"] = int(results.diverged.sum())
    entry["num_rollbacks"] = int(results.num_rollbacks.sum())
    entry["trainings_per_task"] = trainings_per_task
    return entry


def paired(ours: Results, theirs: Results, generator: np.random.Generator) -> dict[str, Any]:
    """Mean difference in score over the same tasks, its interval, and how often ours is better (ties count half)."""
    difference = ours.score - theirs.score
    row = interval(difference, "difference", generator)
    row["probability_of_improvement"] = float(((difference > 0) + 0.5 * (difference == 0)).mean())
    return row


def compare(
    results: Mapping[str, Results], trainings_per_task: Mapping[str, float], seed: int, reference: str = "policy"
) -> dict[str, Any]:
    """`methods` and `paired` of `result.json`; every other method is paired with `reference` if that is among them."""
    generator = np.random.default_rng(seed)
    methods = {name: summarise(r, trainings_per_task[name], generator) for name, r in results.items()}
    first = reference if reference in results else next(iter(results))
    pairs = {f"{first}-{name}": paired(results[first], r, generator) for name, r in results.items() if name != first}
    return {"methods": methods, "paired": pairs}


def csv_rows(results: Mapping[str, Mapping[str, Results]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a preference, method and task, for `result.csv`."""
    rows = []
    for preference, methods in results.items():
        for method, r in methods.items():
            for i, seed in enumerate(seeds):
                figures = {name: float(getattr(r, name)[i]) for name in FIGURES}
                rows.append({"accuracy_weight": preference, "method": method, "task_seed": seed, **figures})
    return rows
