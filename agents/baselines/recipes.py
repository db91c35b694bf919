"""Recipes: families of controllers, each of which a point in a unit cube sets.

A constant setting, a schedule, gradual and one-shot pruning and NNCF's rule are all of this kind, so one search tunes
any of them over training tasks (`search.py`) or for a single task (`task_search.py`). The first twelve numbers of a
point are unit controls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkd.agents.policy.controllers import Controller
from rlkd.envs.action import CONTROLS, NUM_CONTROLS, decode, published_setting, with_exit_kind, with_values
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS

Points = Callable[[Episodes], Tensor]  # [N, A], the point of every student

INPUTS, UNITS = CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")
MARGIN = OBSERVATIONS.index("margin")
NNCF_STEPS = (0.02, 0.5)  # range of the first step, in shares of the range of kept units


@dataclass(frozen=True)
class Recipe:
    """A family of controllers."""

    num_axes: int
    """Numbers in [0, 1] of a point."""
    more: tuple[tuple[float, ...], ...]
    """Values of the axes after the unit controls that a search tries first."""
    controller: Callable[[Points], Controller]

    def first(self, settings: Tensor) -> Tensor:
        """[K * len(more), A], points that begin with each of `settings` [K, 12]."""
        rest = torch.tensor(self.more).view(len(self.more), -1)  # [R, A - 12]
        if self.num_axes == 2 * NUM_CONTROLS:  # from a first to a last setting: the same one
            return torch.cat([settings, settings], dim=-1)
        return torch.cat([settings.repeat_interleave(len(rest), 0), rest.repeat(len(settings), 1)], dim=-1)


def for_all(point: Tensor) -> Points:
    """Give every student the same `point` [A]."""
    return lambda episodes: point.expand(episodes.num_students, -1)


def for_rows(points: Tensor) -> Points:
    """Give student i row i of `points` [N, A]."""
    return lambda episodes: points


def for_tasks(seeds: Sequence[int], points: Tensor) -> Points:
    """Give the students of M tasks their rows of `points` [M, A], by the tasks' seeds."""
    row_of = {seed: row for row, seed in enumerate(seeds)}
    return lambda episodes: points[[row_of[task.seed] for task in episodes.tasks]]


def constant(points: Points) -> Controller:
    """Return a controller that gives every window the same setting."""
    return lambda observation, episodes, window: points(episodes)


def two_phase(points: Points) -> Controller:
    """Return a controller with the dense published setting for a third of the windows, then the point's."""

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        setting = points(episodes)
        if 3 * window < episodes.scenario.config.num_windows:
            return published_setting(episodes.scenario.config.controls).expand_as(setting)
        return setting

    return controller


def linear(points: Points) -> Controller:
    """Move every control linearly from a first to a last value."""
    return _between(points, lambda done: done)


def cosine(points: Points) -> Controller:
    """Move every control from a first to a last value along half a cosine: slow, fast, slow."""
    return _between(points, lambda done: 0.5 * (1.0 - torch.cos(torch.pi * done)))


def cubic(points: Points) -> Controller:
    """Prune units and inputs gradually along the cubic schedule of Zhu & Gupta 2017.

    The share kept at time t is s + (1 - s) (1 - t / t_end)^3. The last number of a point places t_end between a
    quarter and the whole of the training; the shares s and all other controls are the point's own.
    """

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        point = points(episodes)
        end = 0.25 + 0.75 * point[:, -1]  # [N]
        left = (1.0 - _done(episodes, window) / end).clamp_min(0.0) ** 3
        return _kept_partly(point[:, :NUM_CONTROLS], left, episodes)

    return controller


def one_shot(points: Points) -> Controller:
    """Train dense without exits first, then prune once to the point's shares and fine-tune.

    The last number of a point places the moment of pruning between a tenth and nine tenths of the training.
    """

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        point = points(episodes)
        num_windows = episodes.scenario.config.num_windows
        is_dense = window < (0.1 + 0.8 * point[:, -1]) * num_windows  # [N]
        is_dense = is_dense & (window < num_windows - 1)
        setting = point[:, :NUM_CONTROLS]
        dense = _kept_partly(with_exit_kind(setting, "never"), torch.ones(len(point)), episodes)
        return torch.where(is_dense[:, None], dense, setting)

    return controller


def nncf(points: Points) -> Controller:
    """Prune while above the floor; below it go back, and halve the step at each reversal.

    After the accuracy-aware training of NNCF (Kozlov et al. 2020). A point's value for kept units sets the first step;
    its value for kept inputs how far inputs are pruned for each step of the units. Other controls are its own.
    """
    level = step = direction = torch.empty(0)

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        nonlocal level, step, direction
        point = points(episodes)
        if window == 0:
            low, high = NNCF_STEPS
            level, direction = torch.zeros(len(point)), torch.zeros(len(point))
            step = low * (high / low) ** point[:, UNITS]  # [N]
        else:
            now = torch.where(observation[:, MARGIN] >= 0, 1.0, -1.0)  # [N]
            step = torch.where((now != direction) & (direction != 0) & (level > 0), step / 2, step)
            level = (level + now * step).clamp(0.0, 1.0)
            direction = now
        u = point.clone()
        u[:, UNITS] = 1.0 - level
        u[:, INPUTS] = 1.0 - level * point[:, INPUTS]
        return u

    return controller


def _between(points: Points, share: Callable[[Tensor], Tensor]) -> Controller:
    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        point = points(episodes)
        first, last = point[:, :NUM_CONTROLS], point[:, NUM_CONTROLS:]
        return first + (last - first) * share(torch.tensor(_done(episodes, window)))

    return controller


def _done(episodes: Episodes, window: int) -> float:
    """0 in the first window, 1 in the last."""
    return window / max(1, episodes.scenario.config.num_windows - 1)


def _kept_partly(setting: Tensor, left: Tensor, episodes: Episodes) -> Tensor:
    """Return `setting` [N, 12] with its kept shares s raised to s + (1 - s) left; `left` [N] in [0, 1]."""
    scenario = episodes.scenario
    controls = decode(setting, scenario.config.controls, scenario.data.num_classes)
    shares = {"feature_keep": controls.feature_keep, "unit_keep": controls.unit_keep}
    kept: dict[str, float | Tensor] = {name: s + (1.0 - s) * left for name, s in shares.items()}
    return with_values(setting, kept, scenario.config.controls)


_SETTING = ((),)
RECIPES: dict[str, Recipe] = {
    "constant": Recipe(NUM_CONTROLS, _SETTING, constant),
    "two_phase": Recipe(NUM_CONTROLS, _SETTING, two_phase),
    "linear": Recipe(2 * NUM_CONTROLS, _SETTING, linear),
    "cosine": Recipe(2 * NUM_CONTROLS, _SETTING, cosine),
    "cubic": Recipe(NUM_CONTROLS + 1, ((0.6,),), cubic),
    "one_shot": Recipe(NUM_CONTROLS + 1, ((0.4,),), one_shot),
    "nncf": Recipe(NUM_CONTROLS, _SETTING, nncf),
}
