"""The plane of accuracy and cost: one preference-conditioned policy against a multi-objective search per task.

The policy trains one student a preference; the search spends all its trials on each task and keeps those that
nothing dominates on validation. Both fronts are then read on test data and compared by the area they dominate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rlkd.agents.baselines.schedules import run_plans

from rlkd.agents.baselines.methods import Request
from rlkd.agents.baselines.task_search import Trials, cost_of, hypervolume, search_fronts
from rlkd.agents.evaluation.comparison import interval
from rlkd.agents.policy.controllers import Controller, Results, run
from rlkd.data import Preference

Points = list[tuple[NDArray[np.float64], NDArray[np.float64]]]  # accuracy [P_m] and cost [P_m] of every task


def compare_fronts(request: Request, accuracy_weights: Sequence[float], num_trials: int) -> dict[str, Any]:
    """Hypervolumes of the policy's, the static shortlist's and the searched fronts, and paired differences.

    Args:
        request: with a policy; `tasks` gives the distribution.
        accuracy_weights: preferences that the policy and the shortlist are asked for.
        num_trials: full trainings that the search spends on each task.

    Returns:
        `methods`: name -> hypervolume (IQM, interval), trainings per task and the mean front by preference;
        `paired`: policy minus each.
    """
    if request.policy is None:
        raise ValueError("compare_fronts: the request has no policy")
    fronts: dict[str, Points] = {}
    means: dict[str, list[dict[str, float]]] = {}
    controllers: dict[str, Controller] = {
        "policy": request.policy.controller(),
        "static": request.static.controller(),
    }
    for name, controller in controllers.items():
        results = []
        for weight in accuracy_weights:
            tasks = request.tasks.with_preference(Preference(weight))
            results.append(
                run(
                    request.scenario,
                    controller,
                    request.seeds,
                    tasks,
                    on_window=request.on_window,
                    journal=request.journal,
                    label=f"{name}'s front at {weight}",
                )
            )
        accuracy = np.stack([r.accuracy for r in results], axis=1)  # [M, P]
        cost = np.stack([cost_of(r.latency_ratio, r.energy_ratio) for r in results], axis=1)
        fronts[name] = list(zip(accuracy, cost, strict=True))
        means[name] = [
            {"accuracy_weight": w, "accuracy": float(a), "cost": float(c)}
            for w, a, c in zip(accuracy_weights, accuracy.mean(0), cost.mean(0), strict=True)
        ]
    middle = request.tasks.with_preference(Preference(0.6))
    first = request.static.best(torch.tensor([Preference(0.6).weights()]))[0]
    trials = search_fronts(
        request.scenario, request.seeds, middle, num_trials, first, request.seed, request.on_window, request.journal
    )
    baseline = f"search_{num_trials}"
    fronts[baseline] = _on_test(trials, request)
    generator = np.random.default_rng(request.seed)
    areas = {name: np.array([hypervolume(a, c) for a, c in points]) for name, points in fronts.items()}
    spent = {"policy": len(accuracy_weights), "static": len(accuracy_weights), baseline: num_trials}
    methods = {
        name: {
            "hypervolume": {**interval(area, "iqm", generator), "mean": float(area.mean())},
            "trainings_per_task": spent[name],
            "front": means.get(name, []),
        }
        for name, area in areas.items()
    }
    paired = {}
    for name in ("static", baseline):
        gap = areas["policy"] - areas[name]
        row = interval(gap, "difference", generator)
        row["probability_of_improvement"] = float(((gap > 0) + 0.5 * (gap == 0)).mean())
        paired[f"policy-{name}"] = row
    return {"num_tasks": len(request.seeds), "methods": methods, "paired": paired}


def undominated(accuracy: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[P], points than which no other is at least as good in both and better in one."""
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
    plans = trials.plans[rows, columns]
    results: Results = run_plans(
        request.scenario,
        seeds,
        plans,
        tasks,
        "test",
        request.on_window,
        journal=request.journal,
        label="searched fronts",
    )
    test_cost = cost_of(results.latency_ratio, results.energy_ratio)
    return [(results.accuracy[rows == i], test_cost[rows == i]) for i in range(len(trials.seeds))]
