"""Controllers: from what is observed to the next position of the controls, and how to run one over tasks.

A controller is a plain function `(observation [N, O], start [N, 9], window) -> position [N, 9]`, with `window`
counted from 0. A PPO policy, a constant and a schedule are all of this kind, so they are compared alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.envs.action import ControlConfig, encode, published_setting
from rlkd.envs.episodes import Episodes
from rlkd.envs.world import World
from rlkd.objectives import FAMILIES
from rlkd.tasks import TaskDistribution

Controller = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Results:
    """Final figures of one controller on M tasks. Each [M]."""

    score: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    latency_ratio: NDArray[np.float64]
    energy_ratio: NDArray[np.float64]
    macs_ratio: NDArray[np.float64]
    diverged: NDArray[np.bool_]


def hold_start(observation: Tensor, start: Tensor, window: int) -> Tensor:
    """The static setting that the student started from."""
    return start


def published(config: ControlConfig) -> Controller:
    """The fixed published setting: 0.5 : 0.3 : 0.15 : 0.05 at T = 4, the whole student."""
    position = published_setting(config)
    return lambda observation, start, window: position.expand_as(start)


def schedule(config: ControlConfig, num_windows: int) -> Controller:
    """A hand-made schedule as published recipes have it: hot and dense first, then cold and sparse.

    Temperature falls geometrically from 5 to 1 (annealed distillation, Jafari et al. 2021), the kept share of
    units from 0.8 to 0.3 along the cubic schedule of gradual pruning (Zhu & Gupta 2018), the learning rate along
    a cosine, and weight moves from the teacher's answers to the labels; inputs stay, and no sample leaves early.
    Pruning inputs as well cost it 0.10 of accuracy and 0.04 of J (64 tasks), so it is not asked to.
    """
    return lambda observation, start, window: _scheduled(window, config, num_windows).expand_as(start)


def _scheduled(window: int, config: ControlConfig, num_windows: int) -> Tensor:
    done = window / max(1, num_windows - 1)
    keep = 0.3 + 0.5 * (1.0 - done) ** 3
    weights = dict(
        zip((f"weight_{f}" for f in FAMILIES), (0.2 + 0.3 * done, 0.6 - 0.3 * done, 0.15, 0.05), strict=True)
    )
    temperature = 5.0 ** (1.0 - done)
    rate = 1e-2 * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))
    return encode(
        {
            **weights,
            "temperature": temperature,
            "feature_keep": 1.0,
            "unit_keep": keep,
            "exit_threshold": 1.0,
            "learning_rate": rate,
        },
        config,
    )


def run(
    world: World,
    controller: Controller,
    seeds: Sequence[int],
    tasks: TaskDistribution,
    start: Tensor | None = None,
    final_split: str = "test",
    num_parallel: int = 128,
    on_window: Callable[[int], object] | None = None,
) -> Results:
    """Train one student a task under `controller` and evaluate each once, at the end.

    Args:
        world: what the tasks share.
        controller: sets the controls before every window.
        seeds: one a task.
        tasks: the distribution that the seeds draw from.
        start: [len(seeds), 9] settings to start from; by default the world's for each preference.
        final_split: "validation" for selection, "test" for the one result.
        num_parallel: students in lock-step.
        on_window: called with the number of students after every window, for progress.
    """
    parts = []
    for begin in range(0, len(seeds), num_parallel):
        chunk = list(seeds[begin : begin + num_parallel])
        episodes = Episodes(world, len(chunk), tasks)
        observation = episodes.reset(chunk, start=None if start is None else start[begin : begin + num_parallel])
        diverged = torch.zeros(len(chunk), dtype=torch.bool)
        for window in range(world.config.num_windows):
            outcome = episodes.step(controller(observation, episodes.start, window))
            observation, diverged = outcome.observation, diverged | outcome.diverged
            if on_window:
                on_window(len(chunk))
        parts.append(final_figures(episodes, diverged, final_split))
    return Results(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def final_figures(episodes: Episodes, diverged: Tensor, split: str) -> tuple[NDArray[np.generic], ...]:
    """The fields of `Results`; a diverged student has accuracy 0, saves nothing and scores worst."""
    if split not in ("validation", "test"):
        raise ValueError(f"split: got {split!r}; allowed: 'validation', 'test'")
    metrics, cost, score = episodes.evaluate("test" if split == "test" else "validation")
    worst = {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}
    columns = (score, metrics.accuracy, cost.latency_ratio, cost.energy_ratio, cost.macs_ratio)
    cleaned = [torch.where(diverged, torch.full_like(c, worst[i]), c) for i, c in enumerate(columns)]
    return (*(c.double().numpy() for c in cleaned), diverged.numpy())
