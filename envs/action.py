"""Controls as numbers in [0, 1], settings of them, and actions as changes.

Every control has a range; its *position* u in [0, 1] runs through the range linearly, in log steps, or, for
the loss weights, in logits whose softmax gives the weights. A *setting* is a vector of all positions.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from rlkd.errors import UserError
from rlkd.losses import FAMILIES
from rlkd.students import Controls

WEIGHT_LOGIT = 4.0  # a family's logit runs from -4 to 4: weights differ by a factor of up to e^8, about 3,000

# The lowest fifth of the exit control lets all samples leave at the first exit, the highest fifth none leave
# early: these two cost no decision at inference, so a search must be able to hit them exactly.
EXIT_DEAD_ZONE = 0.2

HIGHEST = 1e30  # of a temperature or learning rate: nothing sensible, but still a float32

SCALARS = ("temperature", "feature_keep", "unit_keep", "exit_threshold", "learning_rate")
CONTROLS = (*(f"weight_{family}" for family in FAMILIES), *SCALARS)
NUM_CONTROLS = len(CONTROLS)


@dataclass(frozen=True)
class ControlConfig:
    """Ranges of the controls and the size of a change."""

    step: float = 0.35
    """Share of a control's range that an action of 1 moves it by."""
    temperature: tuple[float, float] = (1.0, 10.0)
    """Softening of teacher and student; log steps."""
    feature_keep: tuple[float, float] = (0.1, 1.0)
    """Share of inputs kept; log steps."""
    unit_keep: tuple[float, float] = (0.05, 1.0)
    """Share of each block's units kept; log steps."""
    learning_rate: tuple[float, float] = (5e-4, 3e-2)
    """Adam's step size; log steps."""

    def check(self) -> None:
        """Raises UserError for an empty range or one that cannot be run through in log steps."""
        if not 0 < self.step <= 1:
            raise UserError(f"controls.step: got {self.step:g}; allowed: above 0, at most 1")
        for name in ("temperature", "feature_keep", "unit_keep", "learning_rate"):
            low, high = getattr(self, name)
            highest = 1.0 if name.endswith("keep") else HIGHEST
            if not (0 < low <= high <= highest and math.isfinite(high / low)):  # decode raises high / low to powers
                raise UserError(f"controls.{name}: got [{low:g}, {high:g}]; allowed: 0 < low <= high <= {highest:g}")


def decode(position: Tensor, config: ControlConfig, num_classes: int) -> Controls:
    """Controls at `position` [N, 9] in [0, 1]."""

    def log_steps(name: str) -> Tensor:
        low, high = getattr(config, name)
        u = position[:, CONTROLS.index(name)]
        return torch.as_tensor(low * (high / low) ** u)

    logits = (2 * position[:, : len(FAMILIES)] - 1) * WEIGHT_LOGIT  # [N, 4]
    chance = 1.0 / num_classes
    exit_position = position[:, CONTROLS.index("exit_threshold")]
    inner = ((exit_position - EXIT_DEAD_ZONE) / (1.0 - 2 * EXIT_DEAD_ZONE)).clamp(0.0, 1.0)  # [N]
    return Controls(
        weights=logits.softmax(-1),
        temperature=log_steps("temperature"),
        feature_keep=log_steps("feature_keep"),
        unit_keep=log_steps("unit_keep"),
        exit_threshold=chance + (1.0 - chance) * inner,
        learning_rate=log_steps("learning_rate"),
    )


def encode(controls: Mapping[str, float | Tensor], config: ControlConfig) -> Tensor:
    """Position [9] of named controls, every one given; values as in `with_values`."""
    missing = [name for name in CONTROLS if name not in controls]
    if missing:
        raise ValueError(f"encode: no value for {', '.join(missing)}")
    return with_values(torch.zeros(1, NUM_CONTROLS), controls, config)[0]


def with_values(position: Tensor, controls: Mapping[str, float | Tensor], config: ControlConfig) -> Tensor:
    """Positions [N, 9] with some controls set to values, clipped to their ranges; the others stay.

    Args:
        position: [N, 9].
        controls: numbers or [N] by name. Weights come all four or not at all, as `weight_<family>` >= 0, and are
            scaled so that the largest has u = 1. `exit_threshold` is a position (0: all leave at once, 1: none
            leaves early), because its range depends on the number of classes.
        config: ranges.
    """
    result = position.clone()
    families = [f"weight_{family}" for family in FAMILIES]
    values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in controls.items()}
    given = [name for name in families if name in values]
    if given and given != families:
        raise ValueError(f"with_values: got {', '.join(given)}; give the weights of all families or of none")
    largest = functools.reduce(torch.maximum, (values[n] for n in families)) if given else None
    for name, value in values.items():
        if largest is not None and name in families:
            logit = WEIGHT_LOGIT + (value / largest).clamp_min(1e-9).log()
            u = (logit / WEIGHT_LOGIT + 1) / 2
        elif name == "exit_threshold":
            u = value
        else:
            low, high = getattr(config, name)
            u = (value / low).log() / math.log(high / low) if high > low else torch.zeros_like(value)
        result[:, CONTROLS.index(name)] = u.clamp(0.0, 1.0)
    return result


def published_setting(config: ControlConfig) -> Tensor:
    """[9]: CE : KL : feature : attention = 0.5 : 0.3 : 0.15 : 0.05 at T = 4, nothing pruned, no early exit."""
    weights = dict(zip((f"weight_{f}" for f in FAMILIES), (0.5, 0.3, 0.15, 0.05), strict=True))
    rate = min(max(3e-3, config.learning_rate[0]), config.learning_rate[1])
    return encode(
        {
            **weights,
            "temperature": min(max(4.0, config.temperature[0]), config.temperature[1]),
            "feature_keep": 1.0,
            "unit_keep": 1.0,
            "exit_threshold": 1.0,
            "learning_rate": rate,
        },
        config,
    )


def change(start: Tensor, action: Tensor, config: ControlConfig) -> Tensor:
    """Position [N, 9] after `action` [N, 9] in [-1, 1] moved the controls from `start` [N, 9]."""
    return (start + config.step * action.clamp(-1.0, 1.0)).clamp(0.0, 1.0)


def action_space() -> spaces.Dict:
    """One bounded box a control, the loss weights together."""
    boxes: dict[str, spaces.Space[Any]] = {"loss_weights": spaces.Box(-1.0, 1.0, (len(FAMILIES),), np.float32)}
    for name in SCALARS:
        boxes[name] = spaces.Box(-1.0, 1.0, (1,), np.float32)
    # a list of pairs keeps this order; a dict would be sorted by name
    return spaces.Dict(list(boxes.items()))


def flat_action(action: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """[*N, 9] from the values of `action_space`, each [*N, size]."""
    return np.concatenate([action["loss_weights"], *(action[name] for name in SCALARS)], axis=-1, dtype=np.float32)


def dict_action(flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The inverse of `flat_action`."""
    split = len(FAMILIES)
    parts = {name: flat[..., split + i : split + i + 1] for i, name in enumerate(SCALARS)}
    return {"loss_weights": flat[..., :split], **parts}


class FlattenAction(gymnasium.ActionWrapper[Any, NDArray[np.float32], Any]):
    """Presents the Dict of changes as one Box [9] in the order of `CONTROLS`, as PPO needs it."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32)

    def action(self, action: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The Dict that the wrapped environment takes."""
        return dict_action(action)
