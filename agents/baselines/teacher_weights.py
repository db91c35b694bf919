"""Weights of several teachers, sample by sample, learned by REINFORCE: a baseline after MTKD-RL (Yang et al. 2025).

In the paper an agent weighs each teacher's losses on every sample and learns within the one training that it guides.
Here a training has a dozen rewards, and learning within it cost more than it brought (docs/decisions/0043). So the
three numbers that decide the weights (`rlkd.students.fusion`) are learned over training tasks, as a policy is, and then
stay constant. Every student of a group trains the same task under its own weights, drawn around the mean, and the mean
moves towards those whose gain in J was above that of the others (Williams 1992, with the leave-one-out baseline of Kool
et al. 2019). A base controller sets all other controls.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, Controller, RunOptions
from rlkd.data import TaskDistribution
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import Arrays, recall
from rlkd.students import Population, SoloStudent
from rlkd.students.fusion import NUM_CUES

SPREAD = (0.5, 2.0, 2.0)  # standard deviation of theta around its mean: labels' log-probability varies most


@dataclass(frozen=True)
class TeacherWeightsConfig:
    """Learning of the weights."""

    num_iterations: int = 12
    num_groups: int = 32
    """Tasks of an iteration."""
    group_size: int = 4
    """Students that train one task side by side."""
    rate: float = 1.0
    """Step of the mean, in units of the spread, for a correlation of one between draw and gain."""

    def check(self) -> None:
        """Raise UserError for a group that is too small to compare within."""
        if self.group_size < 2 or min(self.num_iterations, self.num_groups) < 1 or not self.rate > 0:
            raise UserError(
                f"teacher weights: got group_size {self.group_size}, num_groups {self.num_groups}, num_iterations "
                f"{self.num_iterations}, rate {self.rate:g}; allowed: at least 2, 1, 1, and above 0"
            )

    @property
    def num_trainings(self) -> int:
        """Student trainings that learning costs."""
        return self.num_iterations * self.num_groups * self.group_size


def learn_teacher_weights(
    scenario: Scenario,
    config: TeacherWeightsConfig,
    tasks: TaskDistribution,
    *,
    base: Controller,
    generator: torch.Generator,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """[3], theta that raises J on validation, learned over training tasks.

    Args:
        scenario: what the tasks share.
        config: checked here.
        tasks: training tasks with several teachers, their preference fixed.
        base: sets the controls.
        generator: of tasks and draws.
        options: progress and journal; a guard is not used, because J at the end of the last window is learned from.
    """
    config.check()
    num_students = config.num_groups * config.group_size
    # drawn before training, so that the generator ends in the same state whether results are computed or read
    seeds = torch.randint(2**59, (config.num_iterations, config.num_groups), generator=generator).tolist()
    draws = torch.randn(config.num_iterations, num_students, NUM_CUES, generator=generator)

    def learn() -> Arrays:
        mean = torch.zeros(NUM_CUES)  # in units of SPREAD
        for some, drawn in zip(seeds, draws, strict=True):
            each = [seed for seed in some for _ in range(config.group_size)]
            theta = (mean + drawn) * torch.tensor(SPREAD)  # [N, 3]
            gain = _gains(scenario, weighing(base, theta), each, tasks, on_window=options.on_window)  # [N]
            mean = mean + config.rate * direction(drawn, gain, config.group_size)
        return {"theta": (mean * torch.tensor(SPREAD)).numpy()}

    inputs = {"config": asdict(config), "tasks": asdict(tasks), "seeds": seeds}
    shapes = {"theta": ("float32", (NUM_CUES,))}
    return torch.from_numpy(recall(options.journal, "teacher weights", inputs, shapes=shapes, compute=learn)["theta"])


def direction(drawn: Tensor, gain: Tensor, group_size: int) -> Tensor:
    """[3], mean of `drawn` [N, 3] times the advantage of each `gain` [N] over the others of its group, standardised.

    The score function of a normal distribution of unit deviation is the draw itself.
    """
    groups = gain.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    advantage = (groups - others).flatten()  # [N]
    return (drawn * (advantage / advantage.std().clamp_min(1e-8))[:, None]).mean(0)


def weighing(base: Controller, theta: Tensor) -> Controller:
    """Return `base` with each student's teachers weighted by `theta` [N, 3] or [3].

    Raises:
        UserError: a real model, whose teachers are combined before its training.
    """

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        students = episodes.students
        if not isinstance(students, Population | SoloStudent):
            raise UserError(
                "teacher_weights: got a policy or method that weighs teachers for a real model, whose teachers are "
                "combined beforehand (--teacher_weights); allowed: students that are chains"
            )
        students.weigh_teachers(theta.expand(len(observation), NUM_CUES))
        return base(observation, episodes, window)

    return controller


def _gains(
    scenario: Scenario,
    controller: Controller,
    seeds: list[int],
    tasks: TaskDistribution,
    *,
    on_window: Callable[[int], object],
) -> Tensor:
    """[N], the gain in J on validation of the training of each seed; divergence has the worst J."""
    episodes = Episodes(scenario, len(seeds), tasks)
    observation, total = episodes.reset(seeds), torch.zeros(len(seeds))
    for window in range(scenario.config.num_windows):
        outcome = episodes.step(controller(observation, episodes, window))
        observation, total = outcome.observation, total + outcome.reward
        on_window(len(seeds))
    return total
