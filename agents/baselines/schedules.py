"""Plans: positions of the controls in every window, fixed before a training begins, and their controllers."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rlkd.agents.policy.controllers import Controller, Results, join, run
from rlkd.data import TaskDistribution
from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.io.journal import Journal, digest

Shape = Literal["static", "linear", "cosine"]
_AXES: dict[Shape, int] = {"static": 9, "linear": 18, "cosine": 18}


def num_axes(shape: Shape) -> int:
    """Numbers in [0, 1] that describe a plan of this shape."""
    return _AXES[shape]


def as_point(setting: Tensor, shape: Shape) -> Tensor:
    """[K, num_axes], the plans of this shape that hold each `setting` [K, 9]."""
    if shape == "static":
        return setting
    return torch.cat([setting, setting], dim=-1)


def to_plan(point: Tensor, shape: Shape, num_windows: int) -> Tensor:
    """Positions [*N, W, 9] of `point` [*N, num_axes].

    A static plan holds its setting. A linear one goes from a first setting to a last one in a line, a cosine one
    along half a cosine (slow, fast, slow).
    """
    if shape == "static":
        return point[..., None, :].expand(*point.shape[:-1], num_windows, NUM_CONTROLS)
    start, end = point[..., None, :NUM_CONTROLS], point[..., None, NUM_CONTROLS:]  # each [*N, 1, 9]
    done = torch.linspace(0, 1, num_windows)[:, None]  # [W, 1]
    share = done if shape == "linear" else 0.5 * (1.0 - torch.cos(torch.pi * done))
    return start + (end - start) * share


def follow_each(seeds: Sequence[int], plans: Tensor) -> Controller:
    """A controller that gives each task its own plan.

    Args:
        seeds: M task seeds.
        plans: [M, W, 9].
    """
    row_of = {seed: row for row, seed in enumerate(seeds)}

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        rows = torch.tensor([row_of[task.seed] for task in episodes.tasks])
        return plans[rows, window]

    return controller


def run_plans(
    scenario: Scenario,
    seeds: Sequence[int],
    plans: Tensor,
    tasks: TaskDistribution,
    split: str,
    on_window: Callable[[int], object] | None = None,
    num_parallel: int = 128,
    journal: Journal | None = None,
    label: str = "plans",
) -> Results:
    """Train task `seeds[i]` under `plans[i]` ([M, W, 9]) and evaluate it on `split`; seeds may repeat.

    `journal` and `label` as of `run`.
    """
    parts = []
    for begin in range(0, len(seeds), num_parallel):
        some, chunk = plans[begin : begin + num_parallel], list(seeds[begin : begin + num_parallel])
        parts.append(
            run(
                scenario,
                _follow_rows(some),
                chunk,
                tasks,
                final_split=split,
                on_window=on_window,
                journal=journal,
                label=f"{label} {digest(some)}",
            )
        )
    return join(parts)


def _follow_rows(plans: Tensor) -> Controller:
    """Plan i [N, W, 9] for student i."""
    return lambda observation, episodes, window: plans[:, window]


def follow(plan: Tensor) -> Controller:
    """A controller that gives every task the same plan [W, 9]; past its end the last setting holds."""
    return lambda observation, episodes, window: plan[min(window, len(plan) - 1)].expand_as(episodes.start)
