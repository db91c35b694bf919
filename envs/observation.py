"""What the agent sees of a student: named, bounded, independent of its architecture and of the losses' scale.

Version 3 of the schema. Names, order and bounds go into the policy bundle, and loading compares them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlkd.cost import Cost
from rlkd.envs.action import CONTROLS
from rlkd.losses import FAMILIES
from rlkd.students import Metrics, Telemetry
from rlkd.teachers.landmarks import LANDMARKS

VERSION = 3

# What is saved, beside the dense student, if all samples leave at the first exit: shares of inputs and units kept.
REFERENCES = {"exit": (1.0, 1.0), "exit_quarter_inputs": (0.25, 1.0), "exit_quarter_units": (1.0, 0.25)}
SAVINGS = tuple(f"{cost}_saving_{name}" for cost in ("latency", "energy") for name in REFERENCES)

_BOUNDS: dict[str, tuple[float, float]] = {
    "progress": (0.0, 1.0),  # share of the windows done
    "score": (-2.0, 1.0),  # J on validation
    "score_change": (-1.0, 1.0),
    "accuracy": (0.0, 1.0),  # validation, each sample at the exit it leaves at
    "first_exit_accuracy": (0.0, 1.0),
    "last_exit_accuracy": (0.0, 1.0),
    "first_exit_loss": (0.0, 3.0),  # validation, ratio to chance, log C
    "last_exit_loss": (0.0, 3.0),
    "first_exit_rate": (0.0, 1.0),
    "latency_saving": (-3.0, 1.0),  # 1 - ratio to the dense student
    "energy_saving": (-1.0, 1.0),
    "macs_ratio": (0.0, 2.0),
    "inputs_kept": (0.0, 1.0),
    "units_kept": (0.0, 1.0),
    "hard_label_loss": (0.0, 3.0),  # training, mean over the window, ratio to chance
    "response_loss": (0.0, 3.0),  # divided by T squared, ratio to chance
    "feature_loss": (0.0, 3.0),
    "attention_loss": (0.0, 2.0),
    **{f"gradient_share_{family}": (0.0, 1.0) for family in FAMILIES},
    "gradient_cosine": (-1.0, 1.0),
    "input_spread": (0.0, 1.0),
    "unit_spread": (0.0, 1.0),
    "teacher_accuracy": (0.0, 1.0),  # validation
    "teacher_entropy": (0.0, 1.0),  # ratio to log C
    "teacher_label_agreement": (0.0, 1.0),  # on the labels the student is given
    **{f"landmark_{name}": (0.0, 1.0) for name in LANDMARKS},  # accuracies of closed-form classifiers, validation
    "teacher_agreement": (0.0, 1.0),  # of the student's answers, validation
    "divergence": (0.0, 3.0),  # KL from teacher to student, ratio to log C
    "capacity_ratio": (-1.0, 1.0),  # log10 of dense student's to teacher's MACs, divided by 4
    "label_fraction": (0.0, 1.0),  # of the train split that the student is given
    "labels_per_class": (0.0, 1.0),  # log10, divided by 4
    "num_classes": (0.0, 1.0),  # log10, divided by 5
    "mean_width": (0.0, 1.0),  # units of a block that can be left out; log10, divided by 4
    "num_blocks": (0.0, 1.0),  # divided by 32
    **dict.fromkeys(SAVINGS, (-1.0, 1.0)),  # of the student as it would be, by the cost model
    "preference_accuracy": (0.0, 1.0),
    "preference_latency": (0.0, 1.0),
    "preference_energy": (0.0, 1.0),
    **{f"control_{name}": (0.0, 1.0) for name in CONTROLS},  # positions now
}
OBSERVATIONS = tuple(_BOUNDS)
LOW, HIGH = (np.array(side, dtype=np.float32) for side in zip(*_BOUNDS.values(), strict=True))


def observation_space() -> spaces.Box:
    """The bounds of `OBSERVATIONS`."""
    return spaces.Box(LOW, HIGH, dtype=np.float32)


@dataclass(frozen=True)
class TaskFeatures:
    """What stays the same during an episode. Each [N] unless said otherwise."""

    teacher_accuracy: Tensor
    teacher_entropy: Tensor
    teacher_label_agreement: Tensor
    num_labels: Tensor
    landmarks: Tensor  # [N, 5]
    preference: Tensor  # [N, 3]


def observe(
    features: TaskFeatures,
    progress: Tensor,
    position: Tensor,
    temperature: Tensor,
    score: Tensor,
    score_change: Tensor,
    metrics: Metrics,
    cost: Cost,
    telemetry: Telemetry | None,
    group_sizes: tuple[int, ...],
    num_classes: int,
    num_train: int,
    capacity: float,
    savings: Tensor,
) -> Tensor:
    """[N, len(OBSERVATIONS)] float32 within bounds; non-finite values (of a diverged student) go to the upper bound.

    Args:
        features: of the tasks.
        progress: [N], windows done over windows of the episode.
        position: [N, 9], current controls.
        temperature: [N], of the last window.
        score: [N], J on validation now.
        score_change: [N], since the window before.
        metrics: on validation.
        cost: under `metrics`.
        telemetry: of the last window; None before the first, then its entries read as an untrained student's.
        group_sizes: of the student.
        num_classes: C.
        num_train: size of the train split.
        capacity: dense student's MACs over the teacher's.
        savings: [6], in the order of `SAVINGS`.
    """
    chance = math.log(num_classes)
    num_students, num_blocks = len(progress), len(group_sizes) - 1
    width = sum(group_sizes[1:]) / max(1, num_blocks)
    if telemetry is None:
        losses = torch.tensor([chance, chance, 1.0, 1.0]).repeat(num_students, 1)
        shares = torch.full((num_students, len(FAMILIES)), 1.0 / len(FAMILIES))
        cosine, per_chance = torch.zeros(num_students), torch.full((num_students,), chance)
    else:
        losses, cosine, per_chance = telemetry.losses, telemetry.gradient_cosine, temperature.square() * chance
        shares = telemetry.gradient_norms / telemetry.gradient_norms.sum(-1, keepdim=True).clamp_min(1e-12)
    values = {
        "progress": progress,
        "score": score,
        "score_change": score_change,
        "accuracy": metrics.accuracy,
        "first_exit_accuracy": metrics.exit_accuracy[:, 0],
        "last_exit_accuracy": metrics.exit_accuracy[:, -1],
        "first_exit_loss": metrics.exit_loss[:, 0] / chance,
        "last_exit_loss": metrics.exit_loss[:, -1] / chance,
        "first_exit_rate": metrics.exit_rates[:, 0],
        "latency_saving": 1 - cost.latency_ratio,
        "energy_saving": 1 - cost.energy_ratio,
        "macs_ratio": cost.macs_ratio,
        "inputs_kept": metrics.kept[:, 0] / group_sizes[0],
        "units_kept": metrics.kept[:, 1:].sum(-1) / sum(group_sizes[1:]),
        "hard_label_loss": losses[:, 0] / chance,
        "response_loss": losses[:, 1] / per_chance,
        "feature_loss": losses[:, 2],
        "attention_loss": losses[:, 3],
        **{f"gradient_share_{family}": shares[:, i] for i, family in enumerate(FAMILIES)},
        "gradient_cosine": cosine,
        "input_spread": metrics.spread[:, 0],
        "unit_spread": metrics.spread[:, 1],
        "teacher_accuracy": features.teacher_accuracy,
        "teacher_entropy": features.teacher_entropy,
        "teacher_label_agreement": features.teacher_label_agreement,
        **{f"landmark_{name}": features.landmarks[:, i] for i, name in enumerate(LANDMARKS)},
        "teacher_agreement": metrics.agreement,
        "divergence": metrics.divergence / chance,
        "capacity_ratio": torch.full((num_students,), math.log10(capacity) / 4),
        "label_fraction": features.num_labels / num_train,
        "labels_per_class": (features.num_labels / num_classes).clamp_min(1.0).log10() / 4,
        "num_classes": torch.full((num_students,), math.log10(num_classes) / 5),
        "mean_width": torch.full((num_students,), math.log10(max(1.0, width)) / 4),
        "num_blocks": torch.full((num_students,), num_blocks / 32),
        **{name: savings[i].expand(num_students) for i, name in enumerate(SAVINGS)},
        "preference_accuracy": features.preference[:, 0],
        "preference_latency": features.preference[:, 1],
        "preference_energy": features.preference[:, 2],
        **{f"control_{name}": position[:, i] for i, name in enumerate(CONTROLS)},
    }
    stacked = torch.stack([values[name] for name in OBSERVATIONS], dim=-1).float()  # [N, O]
    low, high = torch.from_numpy(LOW), torch.from_numpy(HIGH)
    return torch.where(stacked.isfinite(), stacked, high).clamp(low, high)
