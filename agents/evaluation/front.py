"""The plane of accuracy and cost: one preference-conditioned policy against a multi-objective search per task.

The policy trains one student a preference; the search spends all its trials on each task and keeps those that
nothing dominates on validation. Both fronts are then read on test data and compared by the area they dominate.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkd.agents.baselines.methods import Request
from rlkd.agents.baselines.recipes import RECIPES
from rlkd.agents.baselines.search import run_points
from rlkd.agents.baselines.task_search import Trials, cost_of, hypervolume, search_fronts
from rlkd.agents.evaluation.comparison import interval
from rlkd.agents.policy.controllers import Batch, Results, run_all
from rlkd.data import Preference

Points = list[tuple[NDArray[np.float64], NDArray[np.float64]]]  # accuracy [P_m] and cost [P_m] of every task


def compare_fronts(request: Request, accuracy_weights: Sequence[float], num_trials: int) -> dict[str, Any]:
    """Hypervolumes of the policy's and the searched fronts, and their paired difference.

    Args:
        request: with a policy; `tasks` gives the distribution.
        accuracy_weights: preferences that the policy gets.
        num_trials: full trainings that the search spends on each task.

    Returns:
        `methods`: name -> hypervolume (IQM, interval), trainings per task and the mean front by preference;
        `paired`: policy minus each.
    """
    if request.policy is None:
        raise ValueError("compare_fronts: the request has no policy")
    options = replace(request.options, guard=None)
    batches = [
        Batch(
            request.scenario,
            request.policy.controller(),
            request.seeds,
            request.tasks.with_preference(Preference(weight)),
            label=f"policy's front at {weight}",
        )
        for weight in accuracy_weights
    ]
    results = run_all(batches, options)
    accuracy = np.stack([r.accuracy for r in results], axis=1)  # [M, P]
    cost = np.stack([cost_of(r.latency_ratio, r.energy_ratio) for r in results], axis=1)
    fronts: dict[str, Points] = {"policy": list(zip(accuracy, cost, strict=True))}
    means = [
        {"accuracy_weight": w, "accuracy": float(a), "cost": float(c)}
        for w, a, c in zip(accuracy_weights, accuracy.mean(0), cost.mean(0), strict=True)
    ]
    middle = request.tasks.with_preference(Preference(0.6))
    trials = search_fronts(
        request.scenario,
        request.seeds,
        middle,
        num_trials=num_trials,
        first=request.policy.start,
        seed=request.seed,
        options=options,
    )
    baseline = f"search_{num_trials}"
    fronts[baseline] = _on_test(trials, request)
    generator = np.random.default_rng(request.seed)
    areas = {name: np.array([hypervolume(a, c) for a, c in points]) for name, points in fronts.items()}
    spent = {"policy": len(accuracy_weights), baseline: num_trials}
    methods = {
        name: {
            "hypervolume": {**interval(area, "iqm", generator), "mean": float(area.mean())},
            "trainings_per_task": spent[name],
            "front": means if name == "policy" else [],
        }
        for name, area in areas.items()
    }
    lead = areas["policy"] - areas[baseline]
    row = interval(lead, "difference", generator)
    row["probability_of_improvement"] = float(((lead > 0) + 0.5 * (lead == 0)).mean())
    return {"num_tasks": len(request.seeds), "methods": methods, "paired": {f"policy-{baseline}": row}}


def undominated(accuracy: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return [P] bool: no other point is at least as good in both metrics and better in one (the Pareto front)."""
    better = (accuracy[:, None] >= accuracy) & (cost[:, None] <= cost)  # [P, P], row at least as good as column
    strictly = (accuracy[:, None] > accuracy) | (cost[:, None] < cost)
    dominated: NDArray[np.bool_] = np.any(better & strictly, axis=0)
    return ~dominated


def _on_test(trials: Trials, request: Request) -> Points:
    """Test points of every task's undominated trials."""
    cost = cost_of(trials.latency_ratio, trials.energy_ratio)
    rows, columns = np.nonzero(np.stack([undominated(a, c) for a, c in zip(trials.accuracy, cost, strict=True)]))
    seeds = [trials.seeds[i] for i in rows]
    tasks = request.tasks.with_preference(Preference(0.6))  # changes J alone, which is not read here
    results: Results = run_points(
        request.scenario,
        RECIPES["constant"],
        seeds,
        trials.points[rows, columns],
        tasks=tasks,
        split="test",
        options=replace(request.options, guard=None),
    )
    test_cost = cost_of(results.latency_ratio, results.energy_ratio)
    return [(results.accuracy[rows == i], test_cost[rows == i]) for i in range(len(trials.seeds))]
