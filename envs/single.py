"""One student's distillation as a Gymnasium environment: `rlkd/Distillation-v0`, and with flat actions."""

from collections.abc import Mapping
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
from rlkd.envs.scenario import EnvConfig, Scenario, check_type
from rlkd.errors import UserError
from rlkd.io.settings import with_settings

Action = dict[str, NDArray[np.float32]]
Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]
MAX_SEED = 2**60


class DistillationEnv(gymnasium.Env[NDArray[np.float32], Action]):
    """One student learns from its teacher; every step is a window of training under the controls just set.

    The tables of actions and observations, reward, episode end, example and version history follow below; they are
    made by `rlkd.envs.page` from the tables that the code reads.

    Args:
        config: the environment's parts; `scenario`, if given, takes its place.
        scenario: data, teachers and cost profile, shared between environments.
        render_mode: None.
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

    @property
    def scenario(self) -> Scenario:
        """What all episodes share."""
        return self._scenario

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


def make_env(
    config: EnvConfig | None = None, scenario: Scenario | None = None, render_mode: str | None = None, **settings: Any
) -> DistillationEnv:
    """Make `rlkd/Distillation-v0`; `gymnasium.make` calls this, too.

    A function has no metadata, so Gymnasium does not warn where stable-baselines3 asks for a render mode at first.

    Args:
        config: the environment's parts.
        scenario: takes the place of `config`.
        render_mode: None.
        settings: fields of `EnvConfig` that differ from `config`: `num_windows=4`, `task={"dataset": "wine"}`.

    Raises:
        UserError: an unknown field, or an impossible value.
    """
    return DistillationEnv(changed_config(config, scenario, settings), scenario, render_mode)


def make_flat_env(
    config: EnvConfig | None = None, scenario: Scenario | None = None, render_mode: str | None = None, **settings: Any
) -> FlatDistillationEnv:
    """Make `rlkd/DistillationFlat-v0`; arguments and errors as of `make_env`."""
    return FlatDistillationEnv(changed_config(config, scenario, settings), scenario, render_mode)


def changed_config(
    config: EnvConfig | None, scenario: Scenario | None, settings: Mapping[str, Any]
) -> EnvConfig | None:
    """Return the config with `settings`.

    Raises:
        UserError: `settings` beside a scenario, an unknown field, or a value of another type.
    """
    if not settings:
        return config
    if scenario is not None:
        raise UserError(f"make: got {', '.join(settings)} with a scenario, which has them already; give one of the two")
    config = EnvConfig() if config is None else config
    check_type(config, "make")
    changed: EnvConfig = with_settings(config, settings, "make")
    return changed


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
