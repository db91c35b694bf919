"""Population-based training over the lock-step population (Jaderberg et al. 2017), and the schedule it finds.

Members of a group train the same task side by side; before every window the worse ones copy the weights of the
better ones and change their settings a little. As in the paper, new tasks get the settings that led to the winner,
window by window. Unlike in the paper, one schedule must serve a distribution of tasks, so the winners of several groups
are tried on further tasks, and the one with the best mean is taken.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, RunOptions, follow, run
from rlkd.data import TaskDistribution
from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import Arrays, digest, recall


@dataclass(frozen=True)
class PBTConfig:
    """Population-based training."""

    num_groups: int = 32
    """Tasks, each with a population of its own; each gives one candidate schedule."""
    group_size: int = 8
    """Students that train one task side by side."""
    replaced: float = 0.25
    """Share of a group that is replaced by copies of as many of its best before every window."""
    spread: float = 0.2
    """Standard deviation of the first settings around the start, in shares of the range; half of it afterwards."""
    num_trials: int = 32
    """Further tasks that every candidate schedule is tried on."""

    def check(self) -> None:
        """Raise UserError for a population that is too small to copy from."""
        if self.group_size < 2 or min(self.num_groups, self.num_trials) < 1 or not 0 < self.replaced <= 0.5:
            raise UserError(
                f"pbt: got group_size {self.group_size}, num_groups {self.num_groups}, num_trials {self.num_trials}, "
                f"replaced {self.replaced:g}; allowed: at least 2, 1, 1, and above 0 up to 0.5"
            )

    @property
    def num_trainings(self) -> int:
        """Student trainings that finding a schedule costs."""
        return self.num_groups * (self.group_size + self.num_trials)


def find_schedule(
    scenario: Scenario,
    config: PBTConfig,
    tasks: TaskDistribution,
    *,
    first: Tensor,
    generator: torch.Generator,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """[W, 12], unit controls of the best schedule in every window, chosen on validation.

    Args:
        scenario: what the tasks share.
        config: checked here.
        tasks: training tasks, their goal fixed.
        first: [12], setting around which the populations begin; the first member of each holds exactly it.
        generator: of tasks and settings.
        options: of every training; its guard serves the trials alone.
    """
    config.check()
    lines = _winners(scenario, config, tasks, first=first, generator=generator, options=options)  # [G, W, 12]
    seeds = torch.randint(2**59, (config.num_trials,), generator=generator).tolist()
    means = []
    for line in lines:
        results = run(
            scenario,
            follow(line),
            seeds,
            tasks,
            final_split="validation",
            options=options,
            label=f"schedule {digest(line)}",
        )
        means.append(results.score.mean())
    return lines[int(torch.tensor(means).argmax())]


def _winners(
    scenario: Scenario,
    config: PBTConfig,
    tasks: TaskDistribution,
    *,
    first: Tensor,
    generator: torch.Generator,
    options: RunOptions,
) -> Tensor:
    """[G, W, 12], the line of settings behind the best student of every group."""
    num_windows, num_students = scenario.config.num_windows, config.num_groups * config.group_size
    # drawn before training, so that the generator ends in the same state whether results are computed or read
    seeds = torch.randint(2**59, (config.num_groups,), generator=generator).tolist()
    noise = torch.stack([torch.randn(num_students, NUM_CONTROLS, generator=generator) for _ in range(num_windows)])
    inputs = {"pbt": asdict(config), "tasks": asdict(tasks), "seeds": seeds, "settings": digest(first, noise)}
    shapes = {"lines": ("float32", (config.num_groups, num_windows, NUM_CONTROLS))}

    def train() -> Arrays:
        episodes = Episodes(scenario, num_students, tasks)
        episodes.reset([seed for seed in seeds for _ in range(config.group_size)])
        return {"lines": _train_groups(episodes, config, first, noise, on_window=options.on_window).numpy()}

    return torch.from_numpy(
        recall(options.journal, "population-based training", inputs, shapes=shapes, compute=train)["lines"]
    )


def _train_groups(
    episodes: Episodes, config: PBTConfig, first: Tensor, noise: Tensor, *, on_window: Callable[[int], object]
) -> Tensor:
    """[G, W, 12], as `_winners`; `noise` [W, N, 12] is standard normal."""
    groups, size = config.num_groups, config.group_size
    num_students, num_replaced = groups * size, max(1, round(config.replaced * size))
    is_first = torch.arange(num_students) % size == 0
    u = (first + config.spread * noise[0].masked_fill(is_first[:, None], 0.0)).clamp(0.0, 1.0)  # [N, 12]
    history = torch.empty(num_students, 0, NUM_CONTROLS)
    for window in range(len(noise)):
        outcome = episodes.step(u)
        history = torch.cat([history, u[:, None]], dim=1)  # [N, w, 12]
        on_window(num_students)
        ranked = outcome.score.view(groups, size).argsort(dim=-1, descending=True, stable=True)  # [G, S]
        ranked = ranked + torch.arange(groups)[:, None] * size
        if window == len(noise) - 1:
            return history[ranked[:, 0]]
        sources = torch.arange(num_students)
        worst, best = ranked[:, size - num_replaced :], ranked[:, :num_replaced]
        sources[worst.flatten()] = best.flatten()
        episodes.copy_rows(sources)
        history = history[sources]
        changed = torch.zeros(num_students, dtype=torch.bool)
        changed[worst.flatten()] = True
        moved = u[sources] + 0.5 * config.spread * noise[window + 1]
        u = torch.where(changed[:, None], moved.clamp(0.0, 1.0), u)
    raise AssertionError("an episode has at least one window")
