"""Score a policy on validation scenarios while it learns, and keep the best one.

Validation scenarios are neither trained nor reported on, so the choice says nothing about them. Every evaluation has
the same tasks, and the policy's mean action sets the controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, Controller, RunOptions, run
from rlkd.agents.policy.policy import Policy
from rlkd.envs.episodes import Episodes
from rlkd.envs.prepare import Group, train_missing
from rlkd.envs.references import References
from rlkd.envs.scenario import Scenario
from rlkd.workers import Work

FIRST_SEED = 2**58  # of the tasks; scenario k has those from k * 2**20 on


@dataclass(frozen=True)
class Evaluation:
    """Means over students at the end of their training, on validation data; every scenario counts alike.

    A diverged student has accuracy 0 and saves nothing.
    """

    iteration: int  # updates before it; 0: the start alone
    score: float
    goal_met: float  # share of the students with a floor that reach it; 1 where no student has one
    shortfall: float  # mean accuracy that is missing to the floor, over the students with a floor
    latency_saving: float  # mean of 1 - latency ratio to the dense student
    mean_reward: float  # mean return of an episode: the final score less the first


class Acting(Protocol):
    """What can be evaluated: `Policy`, or the agent of another algorithm."""

    def controller(self) -> Controller:
        """Return what sets the controls of an episode's students."""


def evaluate(
    policy: Acting,
    scenarios: Sequence[Scenario],
    *,
    num_tasks: int,
    iteration: int,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Evaluation:
    """Train one student a task in every scenario under the policy's mean action.

    Args:
        policy: scored as it is.
        scenarios: at least one.
        num_tasks: of every scenario; the same at every call.
        iteration: as of `Evaluation`.
        options: progress and workers; each scenario is a piece of work.
    """
    groups = [
        Group(scenario, range(first, first + num_tasks), scenario.config.task)
        for scenario, first in zip(scenarios, (FIRST_SEED + k * 2**20 for k in range(len(scenarios))), strict=True)
    ]
    found = train_missing(groups, options.workers)
    works = [
        Work(
            ("evaluation", iteration, "scenario", k),
            _reached,
            (policy, options.workers.share(group.scenario), known, group.seeds),
            num_tasks,
            group.scenario.config.num_windows,
        )
        for k, (group, known) in enumerate(zip(groups, found, strict=True))
    ]
    rows = list(options.workers.run(works, options.on_window))
    return Evaluation(iteration, *(float(value) for value in np.mean(rows, axis=0)))


def _reached(
    policy: Acting, scenario: Scenario, known: References, seeds: Sequence[int], *, on_window: Callable[[int], object]
) -> tuple[float, float, float, float, float]:
    """Return the means of one scenario, in the order of `Evaluation`."""
    scenario.known.add(known)
    tasks = scenario.config.task
    firsts: list[Tensor] = []
    acts = policy.controller()

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        if window == 0:
            firsts.append(episodes.score.clone())
        return acts(observation, episodes, window)

    options = RunOptions(on_window=on_window)
    results = run(scenario, controller, seeds, tasks, final_split="validation", options=options)
    has_floor = results.floor > 0
    met = results.goal_met[has_floor].mean() if has_floor.any() else 1.0
    shortfall = results.shortfall[has_floor].mean() if has_floor.any() else 0.0
    reward = results.score - torch.cat(firsts).double().numpy()
    saving = (1 - results.latency_ratio).mean()
    return float(results.score.mean()), float(met), float(shortfall), float(saving), float(reward.mean())


class Choice:
    """The evaluations of a policy that learns, and the weights that did best.

    Args:
        scenarios: of validation; without any the last weights are chosen.
        iterations: at which the policy is evaluated, ascending.
        num_tasks: of every scenario.
        weights: of the policy at the beginning; they tell names and shapes.
        on_evaluation: called after each.
        options: as of `evaluate`.
        on_best: called with the policy before `on_evaluation` where it does better than all before.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        iterations: Sequence[int],
        num_tasks: int,
        weights: Mapping[str, Tensor],
        *,
        on_evaluation: Callable[[Evaluation], object],
        options: RunOptions,
        on_best: Callable[[Policy], object] = lambda policy: None,
    ) -> None:
        self._scenarios, self._num_tasks = tuple(scenarios), num_tasks
        self.iterations = tuple(iterations) if scenarios else ()
        self._on_evaluation, self._options, self._on_best = on_evaluation, options, on_best
        self.evaluations: list[Evaluation] = []
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}

    def consider(self, policy: Policy, iteration: int) -> None:
        """Evaluate the policy if it is time, and keep its weights if it does better than all before."""
        if not self._scenarios:
            self.weights = policy.weights
        if iteration not in self.iterations:
            return
        now = evaluate(policy, self._scenarios, num_tasks=self._num_tasks, iteration=iteration, options=self._options)
        if all(now.score > before.score for before in self.evaluations):
            self.weights = {name: tensor.clone() for name, tensor in policy.weights.items()}
            self._on_best(policy)
        self.evaluations.append(now)
        self._on_evaluation(now)

    def table(self) -> NDArray[np.float64]:
        """[len(iterations), 6], the evaluations by the fields of `Evaluation`; 0 in those to come."""
        table = np.zeros((len(self.iterations), len(fields(Evaluation))))
        for row, evaluation in zip(table, self.evaluations, strict=False):
            row[:] = astuple(evaluation)
        return table

    def training_state(self) -> dict[str, Tensor]:
        """All that `load_training_state` needs; shapes do not depend on how many evaluations are done."""
        weights = {f"weights.{name}": tensor.clone() for name, tensor in self.weights.items()}
        return {**weights, "table": torch.from_numpy(self.table()), "count": torch.tensor([len(self.evaluations)])}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state`.

        Raises:
            ValueError: more evaluations than there are.
        """
        count = int(state["count"])
        if not 0 <= count <= len(self.iterations):
            raise ValueError(f"{count} evaluations; at most {len(self.iterations)} are made")
        self.weights = {name: state[f"weights.{name}"].clone() for name in self.weights}
        self.evaluations = from_table(state["table"].numpy()[:count])


def from_table(table: NDArray[np.float64]) -> list[Evaluation]:
    """Return the evaluations in the rows of `Choice.table`."""
    return [Evaluation(int(row[0]), *(float(value) for value in row[1:])) for row in table]
