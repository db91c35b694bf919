"""Search over the task distribution for static settings and simple schedules, tuned once for all tasks.

The best static setting is the baseline of every policy and what a policy's actions change. Settings are proposed by
the multivariate tree-structured Parzen estimator (Bergstra et al. 2011; Falkner et al. 2018), as Optuna has it,
with one study for each of a row of preferences. What a setting reaches (accuracy, latency, energy) does not
depend on the preference of its tasks, so every study learns from every setting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import create_trial
from torch import Tensor

from rlkd.agents.baselines.schedules import Shape, as_point, num_axes, run_plans, to_plan
from rlkd.agents.policy.controllers import Controller
from rlkd.data import Preference
from rlkd.envs.action import CONTROLS, published_setting
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import Journal

ACCURACY_WEIGHTS = (0.6, 0.4, 0.9, 0.75)  # of the studies' preferences
OnWindow = Callable[[int], object] | None

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class SearchConfig:
    """Search for the best static setting over the task distribution."""

    num_settings: int = 60
    """Settings tried, the published one first."""
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
class Shortlist:
    """The best plans of a search over the task distribution, and what each reached on validation."""

    points: Tensor  # [M, A] plans in the numbers of their shape; static: [M, 9] settings
    terms: Tensor  # [M, 3], mean accuracy, 1 - latency ratio, 1 - energy ratio
    shape: Shape = "static"

    def best(self, preference: Tensor) -> Tensor:
        """[N, A], the plan with the best mean score under each `preference` [N, 3]; ties: the lower index."""
        return self.points[(preference @ self.terms.T).argmax(-1)]

    def controller(self) -> Controller:
        """The best plan for each student's own preference, followed: the baseline of every policy."""
        first = OBSERVATIONS.index("preference_accuracy")

        def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
            num_windows = episodes.scenario.config.num_windows
            return to_plan(self.best(observation[:, first : first + 3]), self.shape, num_windows)[:, window]

        return controller


def search_plans(
    scenarios: Sequence[Scenario],
    config: SearchConfig,
    generator: torch.Generator,
    on_window: OnWindow = None,
    shape: Shape = "static",
    known: Tensor | None = None,
    journal: Journal | None = None,
) -> Shortlist:
    """A shortlist of plans of one shape and what each reaches on validation.

    Args:
        scenarios: give the distributions of tasks, and share the tasks that every plan is tried on.
        config: checked here.
        generator: of tasks and proposals.
        on_window: called with the number of students after every window.
        shape: of the plans.
        known: [K, A], plans tried before all others; by default the published setting, without and with its exit.
        journal: as of `rlkd.agents.policy.controllers.run`.
    """
    config.check()
    if known is None:
        whole = published_setting(scenarios[0].config.controls)
        early = whole.clone()
        early[CONTROLS.index("exit_threshold")] = 0.0
        known = as_point(torch.stack([whole, early]), shape)
    known = known[: config.num_settings]
    seeds = torch.randint(2**60, (config.tasks_per_setting,), generator=generator).tolist()
    studies = [_new_study(generator) for _ in ACCURACY_WEIGHTS]
    points = torch.empty(0, num_axes(shape))
    terms = torch.empty(0, 3)
    while len(points) < config.num_settings:
        left = config.num_settings - len(points)
        asked = known if len(points) == 0 else _propose(studies[:left], points.shape[1])
        reached = _terms(scenarios, asked, shape, seeds, on_window, journal)
        _tell(studies, asked, reached)
        points, terms = torch.cat([points, asked]), torch.cat([terms, reached])
    chosen = _finalists(terms, config.num_finalists)  # [F]
    more = torch.randint(2**60, (config.tasks_per_finalist,), generator=generator).tolist()
    second = _terms(scenarios, points[chosen], shape, more, on_window, journal)  # [F, 3]
    a, b = config.tasks_per_setting, config.tasks_per_finalist
    return Shortlist(points[chosen], (terms[chosen] * a + second * b) / (a + b), shape)


def _new_study(generator: torch.Generator) -> optuna.Study:
    seed = int(torch.randint(2**31, (), generator=generator))
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))


def _axes(count: int) -> dict[str, BaseDistribution]:
    return {f"u{i}": FloatDistribution(0.0, 1.0) for i in range(count)}


def _propose(studies: Sequence[optuna.Study], count: int) -> Tensor:
    """One point a study, [len(studies), count]."""
    asked = [study.ask(_axes(count)) for study in studies]
    for study, trial in zip(studies, asked, strict=True):
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # what it reached is told to all studies alike
    return torch.tensor([[trial.params[f"u{i}"] for i in range(count)] for trial in asked])


def _tell(studies: Sequence[optuna.Study], points: Tensor, terms: Tensor) -> None:
    axes = _axes(points.shape[1])
    for study, weight in zip(studies, ACCURACY_WEIGHTS, strict=True):
        scores = terms @ torch.tensor(Preference(weight).weights())  # [M]
        for point, score in zip(points.tolist(), scores.tolist(), strict=True):
            params = dict(zip(axes, point, strict=True))
            study.add_trial(create_trial(params=params, distributions=dict(axes), value=score))


def _finalists(terms: Tensor, num_finalists: int) -> Tensor:
    """Indices of the plans to look at more closely: in turn the next best for each accuracy weight."""
    preference = torch.tensor([Preference(weight).weights() for weight in (*ACCURACY_WEIGHTS, 0.3, 0.95)])
    ranked = (preference @ terms.T).argsort(dim=-1, descending=True)  # [W, M]
    order = list(dict.fromkeys(ranked.T.flatten().tolist()))
    return torch.tensor(order[:num_finalists])


def _terms(
    scenarios: Sequence[Scenario],
    points: Tensor,
    shape: Shape,
    seeds: Sequence[int],
    on_window: OnWindow,
    journal: Journal | None,
) -> Tensor:
    """[M, 3] mean terms of every plan over the same tasks, which the scenarios share out among them."""
    parts = []
    for k, scenario in enumerate(scenarios):
        some = list(seeds[k :: len(scenarios)])
        plans = to_plan(points, shape, scenario.config.num_windows).repeat_interleave(len(some), dim=0)
        results = run_plans(
            scenario,
            some * len(points),
            plans,
            scenario.config.task,
            "validation",
            on_window,
            journal=journal,
            label=f"search for {shape} plans",
        )
        columns = (results.accuracy, 1 - results.latency_ratio, 1 - results.energy_ratio)
        parts.append(np.stack(columns, axis=-1).reshape(len(points), len(some), 3))
    return torch.from_numpy(np.concatenate(parts, axis=1).mean(1)).float()
