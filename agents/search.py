"""Random search for static settings: the rival of every policy, and what a policy's actions change."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlkd.agents.controllers import Controller, hold_start, run
from rlkd.envs.action import NUM_CONTROLS, published_setting
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.world import World
from rlkd.errors import UserError


@dataclass(frozen=True)
class SearchConfig:
    """Random search for the best static setting over the task distribution."""

    num_settings: int = 40
    """The published setting, and the others drawn uniformly from the controls' ranges."""
    tasks_per_setting: int = 32
    """Tasks that every setting is tried on, the same for all."""
    num_finalists: int = 8
    """Best settings that are tried on more tasks before one is chosen for each preference."""
    tasks_per_finalist: int = 128
    """Further tasks, the same for all finalists."""

    def check(self) -> None:
        """Raises UserError for a search without a candidate or a task."""
        if min(self.num_settings, self.tasks_per_setting, self.num_finalists, self.tasks_per_finalist) < 1:
            raise UserError("search: got a number below 1; allowed: at least 1 for every number of the search")

    @property
    def num_trainings(self) -> int:
        """Student trainings that the search costs."""
        finalists = min(self.num_finalists, self.num_settings)
        return self.num_settings * self.tasks_per_setting + finalists * self.tasks_per_finalist


@dataclass(frozen=True)
class StaticSettings:
    """The best settings of a search, and what each reached on validation."""

    positions: Tensor  # [M, 9]
    terms: Tensor  # [M, 3], mean accuracy, 1 - latency ratio, 1 - energy ratio

    def best(self, preference: Tensor) -> Tensor:
        """[N, 9], the setting with the best mean score under each `preference` [N, 3]; ties go to the lower index."""
        return self.positions[(preference @ self.terms.T).argmax(-1)]

    def controller(self) -> Controller:
        """The best static setting for each student's own preference, held: the rival of every policy."""
        first = OBSERVATIONS.index("preference_accuracy")
        return lambda observation, start, window: self.best(observation[:, first : first + 3])


def search_static(
    world: World, config: SearchConfig, generator: torch.Generator, on_window: Callable[[int], object] | None = None
) -> StaticSettings:
    """Settings and what each reaches on validation; `StaticSettings.best` picks the best for a preference.

    The mean terms of a setting (accuracy, latency, energy) do not depend on the preference of its tasks, so one
    search serves every preference. Finalists are the settings that are best for at least one of a row of
    accuracy weights, then the best of the rest at the default weight.
    """
    config.check()
    drawn = torch.rand(config.num_settings - 1, NUM_CONTROLS, generator=generator)  # [M - 1, 9]
    settings = torch.cat([published_setting(world.config.controls)[None], drawn])  # [M, 9]
    first = _terms(world, settings, config.tasks_per_setting, generator, on_window)  # [M, 3]
    chosen = _finalists(first, config.num_finalists)  # [F]
    second = _terms(world, settings[chosen], config.tasks_per_finalist, generator, on_window)  # [F, 3]
    a, b = config.tasks_per_setting, config.tasks_per_finalist
    return StaticSettings(settings[chosen], (first[chosen] * a + second * b) / (a + b))


def _finalists(terms: Tensor, num_finalists: int) -> Tensor:
    """Indices of the settings to look at more closely: in turn the next best for each accuracy weight."""
    weights = torch.tensor([0.6, 0.3, 0.4, 0.75, 0.9, 0.95])
    preference = torch.stack([weights, 0.75 * (1 - weights), 0.25 * (1 - weights)], dim=-1)  # [W, 3]
    ranked = (preference @ terms.T).argsort(dim=-1, descending=True)  # [W, M]
    order = list(dict.fromkeys(ranked.T.flatten().tolist()))
    return torch.tensor(order[:num_finalists])


def _terms(
    world: World,
    settings: Tensor,
    num_tasks: int,
    generator: torch.Generator,
    on_window: Callable[[int], object] | None,
) -> Tensor:
    """[M, 3] mean terms of every setting over the same `num_tasks` fresh tasks."""
    seeds = torch.randint(2**60, (num_tasks,), generator=generator).tolist()
    results = run(
        world,
        hold_start,
        seeds * len(settings),
        world.config.task,
        start=settings.repeat_interleave(num_tasks, dim=0),
        final_split="validation",
        on_window=on_window,
    )
    columns = (results.accuracy, 1 - results.latency_ratio, 1 - results.energy_ratio)
    stacked = np.stack(columns, axis=-1).reshape(len(settings), num_tasks, 3)
    return torch.from_numpy(stacked.mean(1)).float()
