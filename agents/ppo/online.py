"""PPO within a single run: the agent learns while the only student that it has trains.

Unlike `rlkd.agents.ppo.train`, which learns over many students and is replayed on others, this has one long training.
Every few windows PPO (Schulman et al. 2017, by stable-baselines3) is updated on what was just observed. The reward of a
window is the change of J on validation that it brought. Actions change what a base controller would do: a learned
policy's controls, or the setting that the scenario starts with. The head starts at zero, so before its first update the
agent is its base and exploration. The best window's student ships (`rlkd.envs.guard`). The agent never resets the
episode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from rlkd.agents.policy.controllers import Controller
from rlkd.agents.ppo.train import begin_unchanged
from rlkd.envs.action import NUM_CONTROLS, change
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import NO_WINDOW, Guard
from rlkd.envs.observation import HIGH, LOW, OBSERVATIONS
from rlkd.envs.rows import window_row
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError

OnWindow = Callable[[dict[str, float], Tensor, Episodes], object]


@dataclass(frozen=True)
class OnlineAgentConfig:
    """The agent that learns within one run."""

    windows_per_update: int = 8
    """Windows between two updates of the agent; num_windows must be a multiple."""
    num_epochs: int = 8
    """Passes over those windows in one update."""
    learning_rate: float = 3e-3
    """Adam's step size for policy and value function."""
    gamma: float = 0.9
    """Discount: how far a window is credited with what later windows bring."""
    gae_lambda: float = 0.9
    hidden: int = 32
    """Units of each of the two layers, of the actor and of the critic."""
    log_std: float = -1.6
    """Log of the standard deviation of exploration, in units of an action; constant."""
    clip_range: float = 0.2

    def check(self, num_windows: int) -> None:
        """Raise UserError for an impossible value."""
        if self.windows_per_update < 2 or num_windows % self.windows_per_update:
            raise UserError(
                f"agent.windows_per_update: got {self.windows_per_update} for num_windows {num_windows}; "
                "allowed: divisors of num_windows from 2"
            )
        if min(self.num_epochs, self.hidden) < 1:
            raise UserError(f"agent: got num_epochs {self.num_epochs}, hidden {self.hidden}; allowed: at least 1")
        if not (self.learning_rate > 0 and self.clip_range > 0):
            raise UserError(
                f"agent: got learning_rate {self.learning_rate:g}, clip_range {self.clip_range:g}; allowed: above 0"
            )
        if not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise UserError(f"agent: got gamma {self.gamma:g}, gae_lambda {self.gae_lambda:g}; allowed: 0 to 1")


class OneRun(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """The only student's training, from its first window on; it remembers the best student so far.

    Args:
        scenario: gives task, start and horizon.
        base: what actions change.
        seed: of task, parameters and batches.
        on_window: given each window's row, its observation [1, O] and the episodes as they then are.
    """

    def __init__(self, scenario: Scenario, base: Controller, seed: int, on_window: OnWindow) -> None:
        self.action_space = spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32)
        self.observation_space = spaces.Box(-1.0, 1.0, (len(OBSERVATIONS),), np.float32)
        self.episodes = Episodes(scenario, 1)
        self.diverged = False
        self._scenario, self._base, self._on_window = scenario, base, on_window
        self._observation = self.episodes.reset([seed])
        self._guard, self._window = Guard(self.episodes), 0

    def reset(self, **_: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Return the present observation; the one training goes on, though the caller begins an episode."""
        return self._seen(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Train one window under the base's controls, changed by `action` [12]."""
        base = self._base(self._observation, self.episodes, self._window)  # [1, 12]
        changes = torch.from_numpy(np.asarray(action, dtype=np.float32))[None]
        outcome = self.episodes.step(change(base, changes, base, self._scenario.config.controls))
        self._observation, self._window = self._guard.after_window(outcome), self._window + 1
        self.diverged = bool(outcome.diverged[0])
        row = self.last = window_row(self._window - 1, self.episodes.u, outcome, self._scenario)
        self._on_window(row, outcome.observation, self.episodes)
        return self._seen(), float(outcome.reward[0]), False, False, {}

    @property
    def best_window(self) -> int:
        """Return the window that ships if the run ends now, as of `Guard.best_window`."""
        return int(self._guard.best_window[0])

    def bring_back_best(self) -> None:
        """Put the student of the best window back into the episodes.

        Raises:
            UserError: the first window diverged, so there is none.
        """
        if self.best_window == NO_WINDOW:
            raise UserError("online: the student diverged in its first window; lower its learning rate")
        self._guard.finish()

    def _seen(self) -> NDArray[np.float32]:
        """Return the observation scaled from its bounds to [-1, 1]; there are no earlier runs to standardise by."""
        scaled: NDArray[np.float32] = (2 * (self._observation[0].numpy() - LOW) / (HIGH - LOW) - 1).astype(np.float32)
        return scaled


class _UntilDiverged(BaseCallback):
    def __init__(self, run: OneRun) -> None:
        super().__init__()
        self._run = run

    def _on_step(self) -> bool:
        return not self._run.diverged


def learn_online(run: OneRun, num_windows: int, config: OnlineAgentConfig, *, seed: int, logger: Logger | None) -> int:
    """Train `run`'s student for `num_windows` windows while PPO learns from them; returns how often PPO was updated.

    It ends early where the student diverges.
    """
    config.check(num_windows)
    agent = PPO(
        "MlpPolicy",
        DummyVecEnv([lambda: run]),
        learning_rate=config.learning_rate,
        n_steps=config.windows_per_update,
        batch_size=config.windows_per_update,
        n_epochs=config.num_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        policy_kwargs={"net_arch": [config.hidden, config.hidden], "log_std_init": config.log_std},
        seed=seed,
        device="cpu",
    )
    begin_unchanged(agent)
    agent.policy.log_std.requires_grad_(False)
    if logger is not None:
        agent.set_logger(logger)
    agent.learn(num_windows, callback=_UntilDiverged(run), log_interval=1)
    return int(agent._n_updates) // config.num_epochs
