"""Signals of the teachers for every sample: logits, features, attention maps, computed once."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data import DataSet, Labelled, Task
from rlkd.losses.gradient import logit_gradient
from rlkd.models import ChainStudent, Outputs
from rlkd.models.adapters import pooled
from rlkd.models.attention_map import attention_map
from rlkd.teachers.landmarks import landmarks

NUM_POSITIONS = 16


@dataclass(frozen=True)
class Signals:
    """Signals of T teachers for all S samples of a data set."""

    logits: Tensor  # [T, S, C]
    features: Tensor  # [T, S, F], last block, scaled to a mean square of one over the train split
    maps: Tensor  # [T, S, P], attention maps of the last block, rows of unit norm
    accuracy: Tensor  # [T], on validation
    entropy: Tensor  # [T], mean entropy of the answers on the train split, divided by log C
    are_conv: bool  # whether maps are over pixels
    more: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)  # each [T, S, *], for further loss terms

    def named(self) -> dict[str, Tensor]:
        """Return the signals [T, S, *] by the names that loss terms use (`rlkd.losses.SIGNALS`)."""
        first = {"teacher_logits": self.logits, "teacher_features": self.features, "teacher_map": self.maps}
        return {**first, **self.more}

    def agreement(self, teacher: int, samples: Tensor, labels: Tensor) -> Tensor:
        """Return the share of the samples [B] whose label [B] equals the teacher's answer, a scalar."""
        return (self.logits[teacher, samples].argmax(-1) == labels).float().mean()

    def landmarks(self, data: Labelled, tasks: Sequence[Task]) -> Tensor:
        """Return [N, 5], validation accuracies of closed-form classifiers on each task (`rlkd.teachers.landmarks`)."""
        return landmarks(self.logits, self.features, data, tasks)

    def mean_logits(self, teachers: Sequence[int], samples: Tensor) -> Tensor:
        """Return [B, C], the mean logits of those teachers."""
        return torch.stack([self.logits[teacher, samples] for teacher in teachers]).mean(0)


@torch.no_grad()
def compute_signals(teachers: Sequence[ChainStudent], data: DataSet, needs: Collection[str] = ()) -> Signals:
    """Compute signals by one forward pass of every teacher over the whole data set.

    Args:
        teachers: of one architecture.
        data: all of whose samples are answered.
        needs: names of signals; those of `EXTRA` among them are computed, too.
    """
    logits, features, maps = [], [], []
    extra: dict[str, list[Tensor]] = {name: [] for name in EXTRA if name in needs}
    for teacher in teachers:
        outputs = teacher(data.inputs, teacher.full_masks())
        last = outputs.features[-1]  # [S, U] or [S, U, H, W]
        mean = pooled(last)  # [S, U]
        scale = mean[data.splits["train"]].square().mean().sqrt().clamp_min(1e-8)
        logits.append(outputs.logits[-1])
        features.append(mean / scale)
        maps.append(attention_map(last, NUM_POSITIONS))
        for name, values in extra.items():
            values.append(EXTRA[name](teacher, data, outputs))
    stacked = torch.stack(logits)  # [T, S, C]
    validation, train = data.splits["validation"], data.splits["train"]
    accuracy = (stacked[:, validation].argmax(-1) == data.labels[validation]).float().mean(-1)  # [T]
    log_p = F.log_softmax(stacked[:, train], dim=-1)  # [T, S_train, C]
    entropy = -(log_p.exp() * log_p).sum(-1).mean(-1) / math.log(data.num_classes)  # [T]
    more = {name: torch.stack(values) for name, values in extra.items()}
    hidden = torch.stack(features), torch.stack(maps)
    return Signals(stacked, *hidden, accuracy, entropy, teachers[0].is_conv, more=more)


def _first_features(teacher: ChainStudent, data: DataSet, outputs: Outputs) -> Tensor:
    """Return [S, F1] of the first block, mean over positions, scaled to a mean square of one over the train split."""
    first = pooled(outputs.features[0])
    return first / first[data.splits["train"]].square().mean().sqrt().clamp_min(1e-8)


def _input_gradient(teacher: ChainStudent, data: DataSet, outputs: Outputs) -> Tensor:
    """Return [S, N], the gradient by the inputs of the logit of the likeliest class."""
    classes, masks = outputs.logits[-1].argmax(-1), teacher.full_masks()
    gradients = logit_gradient(lambda x: teacher(x, masks).logits[-1], data.inputs, classes)
    return gradients.flatten(1)


# Signals that are computed only for the loss terms that need them.
EXTRA = {"teacher_first": _first_features, "teacher_input_gradient": _input_gradient}
