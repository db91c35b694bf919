"""Controls as numbers in [0, 1], settings of them, and actions as changes.

Every control has a range; its unit control u in [0, 1] runs through the range linearly, on a logarithmic scale, or, for
the loss weights, in logits whose softmax gives the weights. A *setting* is a vector of all unit controls. Three of them
choose the kind of exit: the largest decides whether no sample leaves early, all leave at the first exit if its
validation accuracy meets the floor, or each sample leaves by its confidence.
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
from rlkd.losses import FAMILIES, PUBLISHED
from rlkd.students import Controls

WEIGHT_LOGIT = 4.0  # a family's logit runs from -4 to 4: weights differ by a factor of up to e^8, about 3,000

HIGHEST = 1e30  # of a temperature or learning rate: nothing sensible, but still a float32

KIND_LEAD = 0.2  # half of what the action can move a kind by: exploration flips it now and then

SCALARS = ("temperature", "feature_keep", "unit_keep", "exit_threshold", "learning_rate")
EXIT_KINDS = ("never", "first", "threshold")
CONTROLS = (
    *(f"weight_{family}" for family in FAMILIES),
    *SCALARS,
    *("exit_never", "exit_first", "exit_by_threshold"),
)
NUM_CONTROLS = len(CONTROLS)


@dataclass(frozen=True)
class ControlConfig:
    """Ranges of the controls and the size of a change."""

    step: float = 0.25
    """Share of a control's range that an action of 1 moves it by in one window."""
    temperature: tuple[float, float] = (1.0, 10.0)
    """Softening of teacher and student, on a logarithmic scale."""
    feature_keep: tuple[float, float] = (0.1, 1.0)
    """Share of inputs kept, on a logarithmic scale."""
    unit_keep: tuple[float, float] = (0.05, 1.0)
    """Share of each block's units kept, on a logarithmic scale."""
    learning_rate: tuple[float, float] = (5e-4, 3e-2)
    """Adam's step size, on a logarithmic scale."""

    def check(self) -> None:
        """Raise UserError for an empty range, or one on a log scale that is not positive."""
        if not 0 < self.step <= 1:
            raise UserError(f"controls.step: got {self.step:g}; allowed: above 0, at most 1")
        for name in ("temperature", "feature_keep", "unit_keep", "learning_rate"):
            low, high = getattr(self, name)
            highest = 1.0 if name.endswith("keep") else HIGHEST
            if not (0 < low <= high <= highest and math.isfinite(high / low)):  # decode raises high / low to powers
                raise UserError(f"controls.{name}: got [{low:g}, {high:g}]; allowed: 0 < low <= high <= {highest:g}")


def exit_kind(u: Tensor) -> Tensor:
    """[N] int64, index into EXIT_KINDS of the largest of the three exit controls in `u` [N, 12]; ties: the first."""
    return u[:, -len(EXIT_KINDS) :].argmax(-1)


def with_exit_kind(u: Tensor, kind: str) -> Tensor:
    """`u` [N, 12] with the exit controls at 1 for `kind` and at 0 for the others."""
    result = u.clone()
    result[:, -len(EXIT_KINDS) :] = torch.eye(len(EXIT_KINDS))[EXIT_KINDS.index(kind)].to(u)
    return result


def whole(u: Tensor) -> Tensor:
    """`u` [N, 12] with all units and inputs kept and no sample leaving early."""
    result = with_exit_kind(u, "never")
    result[:, [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]] = 1.0
    return result


def decode(u: Tensor, config: ControlConfig, num_classes: int) -> Controls:
    """Return the controls at `u` [N, 12] in [0, 1].

    The exit threshold is above 1/C and below 1 by kind `threshold`, 1/C by kind `first` and 1 by kind `never`.
    """

    def log_steps(name: str) -> Tensor:
        low, high = getattr(config, name)
        return torch.as_tensor(low * (high / low) ** u[:, CONTROLS.index(name)])

    logits = (2 * u[:, : len(FAMILIES)] - 1) * WEIGHT_LOGIT  # [N, 4]
    chance = 1.0 / num_classes
    inner = chance + (1.0 - chance) * (0.01 + 0.98 * u[:, CONTROLS.index("exit_threshold")])  # [N]
    kind = exit_kind(u)
    threshold = torch.where(kind == 0, torch.ones_like(inner), torch.where(kind == 1, chance, inner))
    return Controls(
        weights=logits.softmax(-1),
        temperature=log_steps("temperature"),
        feature_keep=log_steps("feature_keep"),
        unit_keep=log_steps("unit_keep"),
        exit_threshold=threshold,
        learning_rate=log_steps("learning_rate"),
    )


def encode(controls: Mapping[str, float | Tensor], config: ControlConfig, exit_kind: str = "never") -> Tensor:
    """Return the unit controls [12] of named controls, values as in `with_values`; `exit_kind` is of EXIT_KINDS."""
    missing = [name for name in CONTROLS[: -len(EXIT_KINDS)] if name not in controls]
    if missing:
        raise ValueError(f"encode: no value for {', '.join(missing)}")
    return with_exit_kind(with_values(torch.zeros(1, NUM_CONTROLS), controls, config), exit_kind)[0]


def with_values(u: Tensor, controls: Mapping[str, float | Tensor], config: ControlConfig) -> Tensor:
    """Return unit controls [N, 12] with some controls set to values, clipped to their ranges.

    Args:
        u: [N, 12].
        controls: numbers or [N] by name. Weights come all four or not at all, as `weight_<family>` >= 0, and are
            scaled so that the largest has u = 1. `exit_threshold` is given as its unit control, because its range
            depends on the number of classes.
        config: ranges.
    """
    result = u.clone()
    families = [f"weight_{family}" for family in FAMILIES]
    values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in controls.items()}
    given = [name for name in families if name in values]
    if given and given != families:
        raise ValueError(f"with_values: got {', '.join(given)}; give the weights of all families or of none")
    largest = functools.reduce(torch.maximum, (values[n] for n in families)) if given else None
    for name, value in values.items():
        if largest is not None and name in families:
            logit = WEIGHT_LOGIT + (value / largest).clamp_min(1e-9).log()
            column = (logit / WEIGHT_LOGIT + 1) / 2
        elif name == "exit_threshold":
            column = value
        else:
            low, high = getattr(config, name)
            column = (value / low).log() / math.log(high / low) if high > low else torch.zeros_like(value)
        result[:, CONTROLS.index(name)] = column.clamp(0.0, 1.0)
    return result


def published_setting(config: ControlConfig) -> Tensor:
    """[12]: CE : KL : feature : attention = 0.5 : 0.3 : 0.15 : 0.05 at T = 4, nothing pruned, no early exit."""
    weights = {f"weight_{family}": weight for family, weight in PUBLISHED.items()}
    rate = min(max(3e-3, config.learning_rate[0]), config.learning_rate[1])
    return encode(
        {
            **weights,
            "temperature": min(max(4.0, config.temperature[0]), config.temperature[1]),
            "feature_keep": 1.0,
            "unit_keep": 1.0,
            "exit_threshold": 0.5,
            "learning_rate": rate,
        },
        config,
    )


def change(u: Tensor, action: Tensor, start: Tensor, config: ControlConfig) -> Tensor:
    """Return the unit controls [N, 12] after `action` [N, 12] in [-1, 1].

    The controls move from where they are by `config.step` times the action: a zero action keeps them, and exploration
    is a random walk instead of noise around the start. The kind of exit is chosen anew every time, with a lead of
    KIND_LEAD for the kind of `start`.

    Args:
        u: [N, 12], unit controls now.
        action: [N, 12].
        start: [N, 12], the setting that the episode began with.
        config: size of a change.
    """
    num_kinds = len(EXIT_KINDS)
    moved = u[:, :-num_kinds] + config.step * action[:, :-num_kinds].clamp(-1.0, 1.0)
    kinds = 0.4 + KIND_LEAD * start[:, -num_kinds:] + 0.4 * action[:, -num_kinds:].clamp(-1.0, 1.0)
    return torch.cat([moved, kinds], dim=-1).clamp(0.0, 1.0)


def action_space() -> spaces.Dict:
    """One bounded box a control, the loss weights together."""
    boxes: dict[str, spaces.Space[Any]] = {"loss_weights": spaces.Box(-1.0, 1.0, (len(FAMILIES),), np.float32)}
    for name in SCALARS:
        boxes[name] = spaces.Box(-1.0, 1.0, (1,), np.float32)
    boxes["exit_kind"] = spaces.Box(-1.0, 1.0, (len(EXIT_KINDS),), np.float32)
    # a list of pairs keeps this order; a dict would be sorted by name
    return spaces.Dict(list(boxes.items()))


def flat_action(action: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """[*N, 12] from the values of `action_space`, each [*N, size]."""
    parts = [action["loss_weights"], *(action[name] for name in SCALARS), action["exit_kind"]]
    return np.concatenate(parts, axis=-1, dtype=np.float32)


def dict_action(flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return the Dict action of a flat one; the inverse of `flat_action`."""
    split = len(FAMILIES)
    parts = {name: flat[..., split + i : split + i + 1] for i, name in enumerate(SCALARS)}
    return {"loss_weights": flat[..., :split], **parts, "exit_kind": flat[..., -len(EXIT_KINDS) :]}


class FlattenAction(gymnasium.ActionWrapper[Any, NDArray[np.float32], Any]):
    """Presents the Dict of changes as one Box [12] in the order of `CONTROLS`, as PPO needs it."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32)

    def action(self, action: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the Dict action that the wrapped environment takes."""
        return dict_action(action)
