"""One student's distillation as a Gymnasium environment: `rlkd/Distillation-v0`, and with flat actions."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from rlkd.envs.action import NUM_CONTROLS, action_space, change, flat_action
from rlkd.envs.checks import check_options, check_parts, check_started, checked_changes, scenario_of
from rlkd.envs.episodes import Episodes, Outcome
from rlkd.envs.observation import observation_space
from rlkd.envs.scenario import EnvConfig, Scenario

Action = dict[str, NDArray[np.float32]]
Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]
MAX_SEED = 2**60


class DistillationEnv(gymnasium.Env[NDArray[np.float32], Action]):
    """One student learns from its teacher; every step is a window of training under the controls just set.

    Action space:
        A Dict of boxes in [-1, 1]: `loss_weights` (4: hard label, response, feature, attention, as logits),
        `temperature`, `feature_keep`, `unit_keep`, `exit_threshold`, `learning_rate` (1 each), `exit_kind` (3: never,
        first, threshold; the largest decides). An action is a change of the controls
        as they are; zero leaves them there.

    Observation space:
        A Box of named figures, see `rlkd.envs.OBSERVATIONS`: the student's progress, losses, accuracy, cost and
        gradients, its teacher, the preference, the controls. Nothing in it depends on the architecture.

    Reward:
        The change of J (`rlkd.envs.reward`) on validation data over the window, so that an episode's return is its
        final J less its first. Never training loss, never test data.

    Episode end:
        Terminated after `num_windows` steps (the observation tells the progress, so nothing is cut off) and when
        the student diverges (a parameter or loss is not finite), with the worst J, -min(2, 10 floor). Never truncated.

    Args:
        config: the environment's parts; `scenario`, if given, takes its place.
        scenario: data, teachers and cost profile, shared between environments.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self, config: EnvConfig | None = None, scenario: Scenario | None = None, render_mode: str | None = None
    ) -> None:
        self._scenario = scenario_of(config, scenario, render_mode)
        self._episodes = Episodes(self._scenario, 1)
        self._is_running = False
        self.action_space = action_space()  # type: ignore[assignment]
        self.observation_space = observation_space()  # type: ignore[assignment]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a task and start its student; the same seed gives the same task, parameters and batches.

        Raises:
            ValueError: `options` holds anything; there are none.
        """
        check_options(options)
        super().reset(seed=seed)
        task_seed = int(self.np_random.integers(MAX_SEED))
        observation = self._episodes.reset([task_seed])
        self._is_running = True
        return observation[0].numpy(), {"task_seed": task_seed}

    def step(self, action: Action) -> Step:
        """Move the controls, train one window, evaluate on validation.

        Raises:
            ValueError: the action has another form, or holds a number that is not finite.
            gymnasium.error.ResetNeeded: no episode is running.
        """
        check_started(self._is_running)
        check_parts(action, self.action_space)  # type: ignore[arg-type]
        return self.step_flat(flat_action(action))

    def step_flat(self, changes: NDArray[np.float32]) -> Step:
        """As `step`, with the changes as one array [12] in the order of `CONTROLS`."""
        check_started(self._is_running)
        rows = torch.from_numpy(checked_changes(np.asarray(changes)[None], 1))  # [1, 12]
        e = self._episodes
        outcome = e.step(change(e.u, rows, e.start, self._scenario.config.controls))
        info = {name: float(values[0]) for name, values in figures(outcome).items()}
        self._is_running = not bool(outcome.terminated[0])
        return outcome.observation[0].numpy(), float(outcome.reward[0]), not self._is_running, False, info


class FlatDistillationEnv(DistillationEnv):
    """`DistillationEnv` with one Box [12] of changes in the order of `CONTROLS`, as stable-baselines3 needs it."""

    def __init__(
        self, config: EnvConfig | None = None, scenario: Scenario | None = None, render_mode: str | None = None
    ) -> None:
        super().__init__(config, scenario, render_mode)
        self.action_space = spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32)  # type: ignore[assignment]

    def step(self, action: NDArray[np.float32]) -> Step:  # type: ignore[override]
        """Move the controls by `action` [12], train one window, evaluate on validation; errors as of the parent's."""
        return self.step_flat(action)


def make_env(**arguments: Any) -> DistillationEnv:
    """Make `rlkd/Distillation-v0`.

    A function has no metadata, so Gymnasium does not warn where stable-baselines3 asks for a render mode at first.
    """
    return DistillationEnv(**arguments)


def make_flat_env(**arguments: Any) -> FlatDistillationEnv:
    """Make `rlkd/DistillationFlat-v0`, as `make_env` does."""
    return FlatDistillationEnv(**arguments)


def figures(outcome: Outcome) -> dict[str, NDArray[Any]]:
    """Return the entries of `info` for N students, each [N]."""
    values = {
        "score": outcome.score,
        "accuracy": outcome.metrics.accuracy,
        "margin": outcome.margin,
        "has_floor": outcome.floor > 0,
        "goal_met": outcome.metrics.accuracy >= outcome.floor,
        "shortfall": (outcome.floor - outcome.metrics.accuracy).clamp_min(0.0),
        "latency_ratio": outcome.cost.latency_ratio,
        "energy_ratio": outcome.cost.energy_ratio,
        "macs_ratio": outcome.cost.macs_ratio,
        "diverged": outcome.diverged,
        "num_rollbacks": outcome.telemetry.num_rollbacks,
    }
    return {name: tensor.numpy() for name, tensor in values.items()}
