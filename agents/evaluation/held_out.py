"""Held-out tasks, and every method on them under each goal: what `train` ends with and `compare` is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlkd.agents.baselines.methods import METHODS, Request, build_methods
from rlkd.agents.policy.controllers import Batch, Results, run_all
from rlkd.data import Preference, TaskDistribution
from rlkd.envs.scenario import Scenario

SEARCH_STREAM, TRAIN_STREAM, TEST_STREAM, METHOD_STREAM = 1, 2, 3, 4


def stream_seed(seed: int, stream: int) -> int:
    """Return a separate seed for each part of a run, so that parts do not share tasks."""
    generator = torch.Generator().manual_seed(seed * 8 + stream)
    return int(torch.randint(2**31, (), generator=generator))


def held_out_seeds(seed: int, num_tasks: int) -> list[int]:
    """Task seeds of the comparison; drawn from a range of their own, so never trained on."""
    generator = torch.Generator().manual_seed(stream_seed(seed, TEST_STREAM))
    return [2**60 + int(s) for s in torch.randint(2**59, (num_tasks,), generator=generator)]


@dataclass(frozen=True)
class AskedGoal:
    """A goal of all tasks of a comparison."""

    name: str
    description: dict[str, Any]  # for result.json
    tasks: TaskDistribution


def asked_goals(tasks: TaskDistribution, keeps: Sequence[float], accuracy_weights: Sequence[float]) -> list[AskedGoal]:
    """Floors as shares of the reference accuracy, then weights."""
    floors = [
        AskedGoal(f"keep {keep:g}", {"keep": keep, "reference": tasks.reference}, tasks.with_keep(keep))
        for keep in keeps
    ]
    weights = [
        AskedGoal(
            f"accuracy weight {weight:g}",
            {"weights": list(Preference(weight).weights())},
            tasks.with_preference(Preference(weight)),
        )
        for weight in accuracy_weights
    ]
    return [*floors, *weights]


def run_methods(
    names: Sequence[str], request: Request, goals: Sequence[AskedGoal], tune_exit: bool = False
) -> dict[str, dict[str, Results]]:
    """Test results of every method on the same tasks under each goal, by the goal's name; test data are read once.

    Args:
        names: of `METHODS`.
        request: its tasks are replaced by those of each goal in turn.
        goals: all tasks have each of them in turn.
        tune_exit: tune every student's exit threshold on validation after its training.
    """
    tables: dict[str, dict[str, Results]] = {}
    for goal in goals:
        asked = replace(request, tasks=goal.tasks, found={})
        built = build_methods(names, asked)
        batches = [
            Batch(_beginning(name, asked), controller, asked.seeds, asked.tasks, tune_exit=tune_exit, label=name)
            for name, controller in built.items()
        ]
        tables[goal.name] = dict(zip(built, run_all(batches, asked.options), strict=True))
    return tables


def _beginning(name: str, request: Request) -> Scenario:
    """Return the scenario with the setting that a method begins with."""
    start = METHODS[name].start
    return replace(request.scenario, start=start(request)) if start else request.scenario
