"""Search over the task distribution for the best constant setting, or the best point of another recipe.

Points are proposed by the multivariate tree-structured Parzen estimator (Bergstra et al. 2011; Falkner et al. 2018), as
Optuna has it, and scored by the mean J on validation over the same tasks. The best few are tried on more tasks. J is
not linear in what a student reaches, so every goal has a search of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor

from rlkd.agents.baselines.recipes import RECIPES, Recipe, for_rows
from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, Batch, Results, RunOptions, join, run_all
from rlkd.data import TaskDistribution
from rlkd.envs.action import ControlConfig, published_setting, with_exit_kind, with_values
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import digest

NUM_ASKED = 4  # points proposed at once
FIRST_KEPT = (1.0, 0.5, 0.25)  # shares of units in the settings that are tried first

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class SearchConfig:
    """Search for the best constant setting over the task distribution."""

    num_settings: int = 60
    """Settings tried, the published one first."""
    tasks_per_setting: int = 32
    """Tasks that every setting is tried on, the same for all."""
    num_finalists: int = 8
    """Best settings that are tried on more tasks before one is chosen."""
    tasks_per_finalist: int = 128
    """Further tasks, the same for all finalists."""

    def check(self) -> None:
        """Raise UserError for a search without a candidate or a task."""
        if min(self.num_settings, self.tasks_per_setting, self.num_finalists, self.tasks_per_finalist) < 1:
            raise UserError("search: got a number below 1; allowed: at least 1 for every number of the search")

    @property
    def num_trainings(self) -> int:
        """Student trainings that the search costs."""
        finalists = min(self.num_finalists, self.num_settings)
        return self.num_settings * self.tasks_per_setting + finalists * self.tasks_per_finalist


def search_setting(
    scenarios: Sequence[Scenario],
    config: SearchConfig,
    generator: torch.Generator,
    *,
    tasks: Sequence[TaskDistribution] | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """[12], the constant setting with the highest mean J on validation. Arguments as of `search_recipe`."""
    recipe = RECIPES["constant"]
    return search_recipe(recipe, scenarios, config, generator, tasks=tasks, options=options)


def search_recipe(
    recipe: Recipe,
    scenarios: Sequence[Scenario],
    config: SearchConfig,
    generator: torch.Generator,
    *,
    tasks: Sequence[TaskDistribution] | None = None,
    known: Tensor | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Return the point [A] of `recipe` with the highest mean J on validation; of equals the one tried first.

    Args:
        recipe: what is tuned.
        scenarios: share the tasks that every point is tried on.
        config: checked here.
        generator: of tasks and proposals.
        tasks: one distribution a scenario; by default its own.
        known: [K, 12], settings tried before all others; by default `first_settings`.
        options: of every training.
    """
    config.check()
    drawn_from = [scenario.config.task for scenario in scenarios] if tasks is None else list(tasks)
    if known is None:
        known = first_settings(scenarios[0].config.controls)
    queue = recipe.first(known)[: config.num_settings]
    sampler_seed = int(torch.randint(2**31, (), generator=generator))
    few, more = (
        torch.randint(2**60, (count,), generator=generator).tolist()
        for count in (config.tasks_per_setting, config.tasks_per_finalist)
    )
    study = new_study(sampler_seed)

    def means(points: Tensor, seeds: Sequence[int]) -> NDArray[np.float64]:
        groups: list[list[Batch]] = []
        for k, (scenario, distribution) in enumerate(zip(scenarios, drawn_from, strict=True)):
            some = list(seeds[k :: len(scenarios)])
            if some:
                each, rows = some * len(points), points.repeat_interleave(len(some), dim=0)
                groups.append(point_batches(scenario, recipe, each, rows, tasks=distribution, options=options))
        results = iter(run_all([batch for group in groups for batch in group], options))
        parts = [join([next(results) for _ in group]).score.reshape(len(points), -1) for group in groups]
        mean: NDArray[np.float64] = np.concatenate(parts, axis=1).mean(axis=1)
        return mean

    points, values = torch.empty(0, recipe.num_axes), np.empty(0)
    while len(points) < config.num_settings:
        count = min(NUM_ASKED, config.num_settings - len(points))
        queued, queue = queue[:count], queue[count:]
        for point in queued:
            study.enqueue_trial(named(point))
        trials = [study.ask(axes(recipe.num_axes)) for _ in range(count)]
        asked = torch.tensor([list(trial.params.values()) for trial in trials])  # [K, A]
        reached = means(asked, few)
        for trial, value in zip(trials, reached.tolist(), strict=True):
            study.tell(trial, value)
        points, values = torch.cat([points, asked]), np.concatenate([values, reached])
    best = torch.from_numpy(np.argsort(-values, kind="stable")[: config.num_finalists].copy())
    weight = config.tasks_per_setting / (config.tasks_per_setting + config.tasks_per_finalist)
    final = weight * values[best] + (1 - weight) * means(points[best], more)
    return points[best[int(final.argmax())]]


def first_settings(config: ControlConfig) -> Tensor:
    """[9, 12], the published setting with every kind of exit and with fewer units."""
    whole = published_setting(config).expand(len(FIRST_KEPT), -1)
    fewer = with_values(whole, {"unit_keep": torch.tensor(FIRST_KEPT)}, config)
    return torch.cat([with_exit_kind(fewer, kind) for kind in ("never", "first", "threshold")])


def new_study(seed: int) -> optuna.Study:
    """Return a TPE study that proposes several points before the first result."""
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return optuna.create_study(direction="maximize", sampler=sampler)


def axes(count: int) -> dict[str, BaseDistribution]:
    """Return names and ranges of `count` axes for Optuna."""
    return {f"u{i}": FloatDistribution(0.0, 1.0) for i in range(count)}


def named(point: Tensor) -> dict[str, float]:
    """Return the values of a point [A] by the names of its axes."""
    return dict(zip(axes(len(point)), point.clamp(0.0, 1.0).tolist(), strict=True))


def run_points(
    scenario: Scenario,
    recipe: Recipe,
    seeds: Sequence[int],
    points: Tensor,
    *,
    tasks: TaskDistribution,
    split: str = "validation",
    options: RunOptions = DEFAULT_OPTIONS,
) -> Results:
    """Train task `seeds[i]` under `points[i]` ([M, A]) of `recipe` and evaluate it on `split`; seeds may repeat."""
    return join(
        run_all(point_batches(scenario, recipe, seeds, points, tasks=tasks, split=split, options=options), options)
    )


def point_batches(
    scenario: Scenario,
    recipe: Recipe,
    seeds: Sequence[int],
    points: Tensor,
    *,
    tasks: TaskDistribution,
    split: str = "validation",
    options: RunOptions,
) -> list[Batch]:
    """Return the batches of `run_points`, of at most `options.num_parallel` students each."""
    size = options.num_parallel
    return [
        Batch(
            scenario,
            recipe.controller(for_rows(some)),
            list(seeds[begin : begin + size]),
            tasks,
            final_split=split,
            label=f"{recipe.controller.__name__} {digest(some)}",
        )
        for begin, some in ((begin, points[begin : begin + size]) for begin in range(0, len(seeds), size))
    ]
