"""What the agent sees of a student: named, bounded, relative to its goal, and independent of data set and architecture.

Accuracies are differences to an anchor: the floor, or the reference accuracy of a task without a floor. No observation
merely identifies the data set: such observations made policies worse on new data. Version 4 of the schema. Names,
order and bounds go into the policy bundle, and loading compares them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlkd.cost import Cost
from rlkd.envs.action import CONTROLS
from rlkd.students import Metrics, Telemetry
from rlkd.teachers.landmarks import LANDMARKS

VERSION = 4

# Savings beside the dense student if all samples leave at the first exit: shares of inputs and units kept.
REFERENCES = {"exit": (1.0, 1.0), "exit_quarter_inputs": (0.25, 1.0), "exit_quarter_units": (1.0, 0.25)}
SAVINGS = tuple(f"{cost}_saving_{name}" for cost in ("latency", "energy") for name in REFERENCES)

_OF_STUDENT = ("", " of a student with a quarter of the inputs", " of a student with a quarter of the units")

# What the probes leave out: shares of the inputs and units that are kept now.
PROBES = {"units": (1.0, 0.7), "inputs": (0.7, 1.0)}

_TARGETS = (  # of the landmarks
    "the labels",
    "the teacher's answers",
    "both",
    "both, on 4 principal directions",
    "both, on 10 principal directions",
)

# Group of observations -> name -> (bounds, meaning).
TABLE: dict[str, dict[str, tuple[tuple[float, float], str]]] = {
    "time": {
        "progress": ((0.0, 1.0), "share of the windows done"),
        "windows_left": ((0.0, 1.0), "log2 of windows left plus 1, divided by 8"),
    },
    "margin": {
        "margin": ((-1.0, 1.0), "validation accuracy less the anchor"),
        "margin_change": ((-1.0, 1.0), "change of the margin in the last window"),
        "first_exit_margin": ((-1.0, 1.0), "accuracy of the first exit less the anchor"),
        "last_exit_margin": ((-1.0, 1.0), "accuracy of the last exit less the anchor"),
        "first_exit_change": ((-1.0, 1.0), "change of the first exit's accuracy in the last window"),
        "last_exit_change": ((-1.0, 1.0), "change of the last exit's accuracy in the last window"),
        "score_change": ((-2.0, 2.0), "change of J in the last window: the reward"),
    },
    "goal": {
        "has_floor": ((0.0, 1.0), "1 if the goal has an accuracy floor"),
        "preference_accuracy": ((0.0, 1.0), "weight of accuracy in J"),
        "preference_latency": ((0.0, 1.0), "weight of latency in J"),
        "preference_energy": ((0.0, 1.0), "weight of energy in J"),
        "has_limit": ((0.0, 1.0), "1 if the goal limits a cost"),
        "limit_slack": ((-1.0, 1.0), "least distance of a cost ratio below its limit; 1 without a limit"),
    },
    "cost": {
        "latency_saving": ((-3.0, 1.0), "1 - latency ratio to the dense student"),
        "energy_saving": ((-1.0, 1.0), "1 - energy ratio to the dense student"),
        "inputs_kept": ((0.0, 1.0), "share of the inputs kept"),
        "units_kept": ((0.0, 1.0), "share of the units kept"),
        "first_exit_rate": ((0.0, 1.0), "share of samples that leave at the first exit"),
    },
    "savings": {
        **{
            f"{cost}_saving_{name}": ((-1.0, 1.0), f"1 - {cost} ratio if all samples left at the first exit{what}")
            for cost in ("latency", "energy")
            for name, what in zip(REFERENCES, _OF_STUDENT, strict=True)
        },
    },
    "probe": {
        f"probe_{name}": ((-1.0, 1.0), f"accuracy lost now if 30 % of the kept {name} were left out") for name in PROBES
    },
    "training": {
        "label_loss": ((0.0, 3.0), "hard label loss over the window, ratio to chance"),
        "generalisation_gap": ((-3.0, 3.0), "validation loss of the last exit less training loss, ratio to chance"),
        "gradient_cosine": ((-1.0, 1.0), "between the gradients of hard label and response"),
    },
    "teacher": {
        "teacher_margin": ((-1.0, 1.0), "the teacher's validation accuracy less the anchor"),
        "teacher_label_agreement": ((0.0, 1.0), "share of the student's labels that the teacher agrees with"),
        **{
            f"landmark_{name}": (
                (-1.0, 1.0),
                f"validation accuracy of ridge regression from the teacher's features to {what}, less the anchor",
            )
            for name, what in zip(LANDMARKS, _TARGETS, strict=True)
        },
    },
    "controls": {f"control_{name}": ((0.0, 1.0), "unit control now") for name in CONTROLS},
}
_BOUNDS = {name: bounds for group in TABLE.values() for name, (bounds, _) in group.items()}
OBSERVATIONS = tuple(_BOUNDS)
LOW, HIGH = (np.array(side, dtype=np.float32) for side in zip(*_BOUNDS.values(), strict=True))


def unknown_observations(num_exits: int, group_sizes: tuple[int, ...]) -> Tensor:
    """[O] bool, the savings that a student lacks the control for: without early exits, or with inputs that all stay.

    Their values say nothing of what can be saved. A policy reads the training mean in place of them: on own modules
    without exits, values that no training had shown made it prune on and on below the floor.
    """
    lacking = [n for n in SAVINGS if num_exits == 1 or (n.endswith("quarter_inputs") and group_sizes[0] == 1)]
    return torch.tensor([name in lacking for name in OBSERVATIONS])


def observation_space() -> spaces.Box:
    """Return the box of the bounds of `OBSERVATIONS`."""
    return spaces.Box(LOW, HIGH, dtype=np.float32)


@dataclass(frozen=True)
class TaskFeatures:
    """Values that stay the same during an episode. Each is [N] unless stated otherwise."""

    teacher_accuracy: Tensor
    teacher_label_agreement: Tensor
    landmarks: Tensor  # [N, 5]
    preference: Tensor  # [N, 3]
    anchor: Tensor  # validation floor, or the reference accuracy of a task without one
    has_floor: Tensor  # bool
    limits: Tensor  # [N, 4], cost ratios to the dense student in the order of COSTS; inf for no limit


@dataclass(frozen=True)
class Snapshot:
    """Values of N students after a window that observations are computed from. Each is [N] unless stated otherwise."""

    windows_done: Tensor
    num_windows: int
    u: Tensor  # [N, 12], unit controls
    score_change: Tensor
    metrics: Metrics  # on validation
    previous: Tensor | None  # [N, 1 + E], accuracy and every exit's after the window before; None at the beginning
    cost: Cost
    probes: Mapping[str, Tensor]  # accuracy lost, by the names of PROBES
    telemetry: Telemetry | None  # of the last window; None before the first


def observe(
    features: TaskFeatures, now: Snapshot, savings: Tensor, *, group_sizes: tuple[int, ...], num_classes: int
) -> Tensor:
    """[N, len(OBSERVATIONS)] float32 within bounds; non-finite values (of a diverged student) go to the upper bound.

    Args:
        features: of the tasks.
        now: the students after their last window.
        savings: [6], in the order of `SAVINGS`.
        group_sizes: of the student.
        num_classes: C.
    """
    values = {
        **_margins(features, now),
        **_goal_and_cost(features, now, savings, group_sizes),
        **{f"probe_{name}": lost for name, lost in now.probes.items()},
        **_training(now, math.log(num_classes)),
        "teacher_margin": features.teacher_accuracy - features.anchor,
        "teacher_label_agreement": features.teacher_label_agreement,
        **{f"landmark_{n}": features.landmarks[:, i] - features.anchor for i, n in enumerate(LANDMARKS)},
        **{f"control_{name}": now.u[:, i] for i, name in enumerate(CONTROLS)},
    }
    stacked = torch.stack([values[name] for name in OBSERVATIONS], dim=-1).float()  # [N, O]
    low, high = torch.from_numpy(LOW), torch.from_numpy(HIGH)
    return torch.where(stacked.isfinite(), stacked, high).clamp(low, high)


def _margins(features: TaskFeatures, now: Snapshot) -> dict[str, Tensor]:
    metrics = now.metrics
    first, last = metrics.exit_accuracy[:, 0], metrics.exit_accuracy[:, -1]
    before = torch.cat([metrics.accuracy[:, None], metrics.exit_accuracy], dim=-1)  # [N, 1 + E]
    before = before if now.previous is None else now.previous
    left = now.num_windows - now.windows_done
    return {
        "progress": now.windows_done / now.num_windows,
        "windows_left": (left + 1).log2() / 8,
        "margin": metrics.accuracy - features.anchor,
        "margin_change": metrics.accuracy - before[:, 0],
        "first_exit_margin": first - features.anchor,
        "last_exit_margin": last - features.anchor,
        "first_exit_change": first - before[:, 1],
        "last_exit_change": last - before[:, -1],
        "score_change": now.score_change,
    }


def _goal_and_cost(
    features: TaskFeatures, now: Snapshot, savings: Tensor, group_sizes: tuple[int, ...]
) -> dict[str, Tensor]:
    metrics, cost = now.metrics, now.cost
    has_limit = features.limits.isfinite().any(-1)
    slack = (features.limits - cost.ratios).amin(-1)
    return {
        "has_floor": features.has_floor.float(),
        "preference_accuracy": features.preference[:, 0],
        "preference_latency": features.preference[:, 1],
        "preference_energy": features.preference[:, 2],
        "has_limit": has_limit.float(),
        "limit_slack": torch.where(has_limit, slack, torch.ones_like(slack)),
        "latency_saving": 1 - cost.latency_ratio,
        "energy_saving": 1 - cost.energy_ratio,
        "inputs_kept": metrics.kept[:, 0] / group_sizes[0],
        "units_kept": metrics.kept[:, 1:].sum(-1) / sum(group_sizes[1:]),
        "first_exit_rate": metrics.exit_rates[:, 0],
        **{name: savings[i].expand_as(slack) for i, name in enumerate(SAVINGS)},
    }


def _training(now: Snapshot, chance: float) -> dict[str, Tensor]:
    """Return losses as ratios to `chance`, the loss of a uniform answer; before the first window they are 1."""
    validation = now.metrics.exit_loss[:, -1] / chance
    if now.telemetry is None:
        label_loss, cosine = torch.ones_like(validation), torch.zeros_like(validation)
    else:
        label_loss, cosine = now.telemetry.losses[:, 0] / chance, now.telemetry.gradient_cosine
    return {"label_loss": label_loss, "generalisation_gap": validation - label_loss, "gradient_cosine": cosine}
