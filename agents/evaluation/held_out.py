"""Held-out tasks, and every method on them under each preference: what `train` ends with and `compare` is."""

import dataclasses
from collections.abc import Sequence

import torch

from rlkd.agents.baselines.methods import Request, build_methods, tune
from rlkd.agents.policy.controllers import Results, run
from rlkd.data import Preference

SEARCH_STREAM, TRAIN_STREAM, TEST_STREAM, METHOD_STREAM, PLAN_STREAM, GATE_STREAM = 1, 2, 3, 4, 5, 6


def stream_seed(seed: int, stream: int) -> int:
    """A seed of its own for each part of a run, so that parts do not share tasks."""
    generator = torch.Generator().manual_seed(seed * 8 + stream)
    return int(torch.randint(2**31, (), generator=generator))


def held_out_seeds(seed: int, num_tasks: int) -> list[int]:
    """Task seeds of the comparison; drawn from a range of their own, so never trained on."""
    generator = torch.Generator().manual_seed(stream_seed(seed, TEST_STREAM))
    return [2**60 + int(s) for s in torch.randint(2**59, (num_tasks,), generator=generator)]


def run_methods(
    names: Sequence[str], request: Request, accuracy_weights: Sequence[float], tune_exit: bool = False
) -> dict[float, dict[str, Results]]:
    """Test results of every method on the same tasks under each accuracy weight.

    Args:
        names: of `METHODS`.
        request: its tasks' preference is replaced by each of `accuracy_weights` in turn.
        accuracy_weights: of the preferences.
        tune_exit: tune every student's exit threshold on validation after its training.
    """
    request = dataclasses.replace(request, tuned=tune(names, request))
    tables: dict[float, dict[str, Results]] = {}
    for weight in accuracy_weights:
        asked = dataclasses.replace(request, tasks=request.tasks.with_preference(Preference(weight)))
        tables[weight] = {
            name: run(
                asked.scenario,
                controller,
                asked.seeds,
                asked.tasks,
                on_window=asked.on_window,
                tune_exit=tune_exit,
                journal=asked.journal,
                label=name,
            )
            for name, controller in build_methods(names, asked).items()
        }
    return tables
