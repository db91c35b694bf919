"""Check what a caller gives an environment, before any student trains on it."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlkd.envs.action import CONTROLS
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario


def scenario_of(config: EnvConfig | None, scenario: Scenario | None, render_mode: str | None) -> Scenario:
    """Return `scenario`, or build the one that `config` describes.

    Raises:
        TypeError: an argument of another type. stable-baselines3 asks for a render mode first and takes this as "none".
    """
    if render_mode is not None:
        raise TypeError(f"render_mode: got {render_mode!r}; allowed: None, because nothing is drawn")
    for name, given, wanted in (("config", config, EnvConfig), ("scenario", scenario, Scenario)):
        if not isinstance(given, wanted | None):
            raise TypeError(f"{name}: got {type(given).__name__}; allowed: an rlkd.envs.{wanted.__name__}")
    return scenario or build_scenario(config or EnvConfig())


def check_options(options: Mapping[str, Any] | None) -> None:
    """Raise ValueError for options of `reset`, which has none: what is not used is not taken."""
    if options:
        raise ValueError(f"options: got {', '.join(map(str, options))}; allowed: none; tasks are drawn from the config")


def check_started(is_running: bool) -> None:
    """Raise Gymnasium's ResetNeeded for a step without an episode."""
    if not is_running:
        raise gymnasium.error.ResetNeeded("step: no episode is running; call reset first, and after every episode")


def check_parts(action: Any, space: gymnasium.spaces.Dict) -> None:
    """Raise ValueError for an action that is no mapping with the arrays of `space`; their numbers are not looked at."""
    names = list(space.spaces)
    if not isinstance(action, Mapping):
        raise ValueError(
            f"action: got {type(action).__name__}; allowed: a mapping with {', '.join(names)}, or one array for "
            "rlkd/DistillationFlat-v0"
        )
    for name in names:
        if name not in action:
            raise ValueError(f"action: {name} is missing; allowed: a mapping with {', '.join(names)}")
        if np.shape(action[name]) != space[name].shape:
            raise ValueError(f"action: {name} has shape {np.shape(action[name])}; allowed: {space[name].shape}")
    strangers = [str(name) for name in action if name not in names]
    if strangers:
        raise ValueError(f"action: got {', '.join(strangers)}; allowed: {', '.join(names)}")


def checked_changes(changes: Any, num_students: int) -> NDArray[np.float32]:
    """Return changes of N students as float32 [N, 12], in the order of `CONTROLS`.

    Raises:
        ValueError: another shape; a number that is not finite, with its control.
    """
    checked = np.asarray(changes, dtype=np.float32)
    if checked.shape != (num_students, len(CONTROLS)):
        raise ValueError(f"action: got shape {checked.shape}; allowed: {(num_students, len(CONTROLS))}")
    broken = np.argwhere(~np.isfinite(checked))
    if len(broken):
        student, control = broken[0]
        where = f" of student {student}" if num_students > 1 else ""
        raise ValueError(
            f"action: {CONTROLS[control]}{where} is {checked[student, control]}; allowed: finite numbers, clipped to "
            "[-1, 1]"
        )
    return checked
