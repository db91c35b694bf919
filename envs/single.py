"""`rlkd/Distillation-v0`: one student's distillation as a Gymnasium environment."""

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from rlkd.envs.action import action_space, change, flat_action
from rlkd.envs.episodes import Episodes, Outcome
from rlkd.envs.observation import observation_space
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario

Action = dict[str, NDArray[np.float32]]
MAX_SEED = 2**60


class DistillationEnv(gymnasium.Env[NDArray[np.float32], Action]):
    """One student learns from its teacher; every step is a window of training under the controls just set.

    Action space:
        A Dict of boxes in [-1, 1]: `loss_weights` (4: hard label, response, feature, attention, as logits),
        `temperature`, `feature_keep`, `unit_keep`, `exit_threshold`, `learning_rate` (1 each). An action is a
        change from the setting that the episode started with; zero holds that setting.

    Observation space:
        A Box of named figures, see `rlkd.envs.OBSERVATIONS`: the student's progress, losses, accuracy, cost and
        gradients, its teacher, the preference, the controls. Nothing in it depends on the architecture.

    Reward:
        The change of J = w_acc A + w_lat L + w_eng E on validation data over the window, so that an episode's
        return is its final J less its first. Never training loss, never test data.

    Episode end:
        Terminated after `num_windows` steps (the observation tells the progress, so nothing is cut off) and when
        the student diverges (a parameter or loss is not finite), with J = 0. Never truncated.

    Args:
        config: the environment's parts; `scenario`, if given, takes its place.
        scenario: data, teachers and cost profile, shared between environments.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self, config: EnvConfig | None = None, scenario: Scenario | None = None, render_mode: str | None = None
    ) -> None:
        if render_mode is not None:
            raise ValueError(f"render_mode: got {render_mode!r}; allowed: None")
        self._scenario = scenario or build_scenario(config or EnvConfig())
        self._episodes = Episodes(self._scenario, 1)
        self.action_space = action_space()  # type: ignore[assignment]
        self.observation_space = observation_space()  # type: ignore[assignment]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a task and start its student; the same seed gives the same task, parameters and batches."""
        super().reset(seed=seed)
        task_seed = int(self.np_random.integers(MAX_SEED))
        observation = self._episodes.reset([task_seed])
        return observation[0].numpy(), {"task_seed": task_seed}

    def step(self, action: Action) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move the controls, train one window, evaluate on validation."""
        changes = torch.from_numpy(flat_action(action))[None]  # [1, 9]
        outcome = self._episodes.step(change(self._episodes.start, changes, self._scenario.config.controls))
        info = {name: float(values[0]) for name, values in figures(outcome).items()}
        return outcome.observation[0].numpy(), float(outcome.reward[0]), bool(outcome.terminated[0]), False, info


def figures(outcome: Outcome) -> dict[str, NDArray[Any]]:
    """What `info` reports of N students, each [N]."""
    values = {
        "score": outcome.score,
        "accuracy": outcome.metrics.accuracy,
        "latency_ratio": outcome.cost.latency_ratio,
        "energy_ratio": outcome.cost.energy_ratio,
        "macs_ratio": outcome.cost.macs_ratio,
        "diverged": outcome.diverged,
        "num_rollbacks": outcome.telemetry.num_rollbacks,
    }
    return {name: tensor.numpy() for name, tensor in values.items()}
