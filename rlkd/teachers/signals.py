"""Signals of the teachers for every sample: logits, features, attention maps, computed once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data import DataSet, Labelled, Task
from rlkd.models import ChainStudent
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
def compute_signals(teachers: Sequence[ChainStudent], data: DataSet) -> Signals:
    """Compute signals by one forward pass of every teacher over the whole data set."""
    logits, features, maps = [], [], []
    for teacher in teachers:
        outputs = teacher(data.inputs, teacher.full_masks())
        last = outputs.features[-1]  # [S, U] or [S, U, H, W]
        pooled = last.mean((-2, -1)) if last.ndim == 4 else last  # [S, U]
        scale = pooled[data.splits["train"]].square().mean().sqrt().clamp_min(1e-8)
        logits.append(outputs.logits[-1])
        features.append(pooled / scale)
        maps.append(attention_map(last, NUM_POSITIONS))
    stacked = torch.stack(logits)  # [T, S, C]
    validation, train = data.splits["validation"], data.splits["train"]
    accuracy = (stacked[:, validation].argmax(-1) == data.labels[validation]).float().mean(-1)  # [T]
    log_p = F.log_softmax(stacked[:, train], dim=-1)  # [T, S_train, C]
    entropy = -(log_p.exp() * log_p).sum(-1).mean(-1) / math.log(data.num_classes)  # [T]
    return Signals(stacked, torch.stack(features), torch.stack(maps), accuracy, entropy, teachers[0].is_conv)
