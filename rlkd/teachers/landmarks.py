"""Landmarks of a task: validation accuracies of classifiers that are solved in closed form, before any training.

How good a student can become depends on how good its labels and its teacher are on clean data, and on how many
directions of the input are needed. Noise rates are unknown in practice. Simple, fast learners measure it instead
(landmarking: Pfahringer, Bensusan & Giraud-Carrier 2000): ridge regression on the teacher's features, from the given
labels, from the teacher's answers, from both, and from both on the first few principal directions.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data import Labelled, Task

LANDMARKS = ("labels", "teacher", "both", "both_4", "both_10")
FEW = (4, 10)  # principal directions
RIDGE = 30.0  # weight of the penalty in samples, at features of mean square one
MAX_SAMPLES = 4096  # of a task and of a split; more would not change an accuracy by much
MAX_FEATURES = 1024  # the last ones, nearest to the answers; solving takes the cube of their number
NUM_TOGETHER = 128  # tasks solved at once


@torch.no_grad()
def landmarks(logits: Tensor, features: Tensor, data: Labelled, tasks: Sequence[Task]) -> Tensor:
    """Return the validation accuracy of every landmark on every task.

    Args:
        logits: [T, S, C], of the teachers.
        features: [T, S, F], of the teachers.
        data: true labels and splits; only labels of the validation split are read.
        tasks: with teacher, samples and the labels of the student.

    Returns:
        [N, 5], in the order of `LANDMARKS`; the mean over the teachers of a task.
    """
    each = [dataclasses.replace(task, teacher=teacher, others=()) for task in tasks for teacher in task.teachers]
    if len(each) > len(tasks):
        counts = [len(task.teachers) for task in tasks]
        reached = torch.split(landmarks(logits, features, data, each), counts)
        return torch.stack([of_one.mean(0) for of_one in reached])
    train, validation = (data.splits[split][:MAX_SAMPLES] for split in ("train", "validation"))
    rows = torch.unique(torch.cat([train, validation, *(task.samples[:MAX_SAMPLES] for task in tasks)]))  # [R]
    used = sorted({task.teacher for task in tasks})
    directions = {teacher: _directions(features[teacher, rows], torch.searchsorted(rows, train)) for teacher in used}
    shared = _Shared(logits, directions, rows, validation, data.labels, data.num_classes)
    return torch.cat([_solve(shared, tasks[i : i + NUM_TOGETHER]) for i in range(0, len(tasks), NUM_TOGETHER)])


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Data shared by all tasks. Samples are looked up by their place in `rows`."""

    logits: Tensor  # [T, S, C]
    directions: dict[int, Tensor]  # by teacher, [R, 1 + F]
    rows: Tensor  # [R] int64, ascending: the samples that count
    validation: Tensor  # [V] int64
    labels: Tensor  # [S]
    num_classes: int

    def inputs(self, teacher: int, samples: Tensor) -> Tensor:
        """Return [B, 1 + F], inputs of the classifiers for samples [B] among `rows`."""
        return self.directions[teacher][torch.searchsorted(self.rows, samples)]


def _directions(features: Tensor, train: Tensor) -> Tensor:
    """Return [R, 1 + F]: a constant, then centred features at mean square one along their principal directions.

    A value that is not finite counts as 0; the training reports such teachers.
    """
    numbers = features[:, -MAX_FEATURES:].double().nan_to_num(0.0, 0.0, 0.0)
    centred = numbers - numbers[train].mean(0)
    centred = centred / centred[train].square().mean().sqrt().clamp_min(1e-8)
    _, vectors = torch.linalg.eigh(centred[train].T @ centred[train])  # ascending
    along = (centred @ vectors.flip(1)).float()
    return torch.cat([torch.ones(len(along), 1), along], dim=1)


def _solve(shared: _Shared, tasks: Sequence[Task]) -> Tensor:
    """Return [N, 5], landmarks of some tasks at once."""
    samples = [task.samples[:MAX_SAMPLES] for task in tasks]
    most, num_classes = max(len(s) for s in samples), shared.num_classes
    size = next(iter(shared.directions.values())).shape[1]
    inputs = torch.zeros(len(tasks), most, size)  # rows beyond a task's samples stay zero and add nothing
    targets = torch.zeros(len(tasks), most, 2 * num_classes)
    for row, (task, seen) in enumerate(zip(tasks, samples, strict=True)):
        inputs[row, : len(seen)] = shared.inputs(task.teacher, seen)
        given = F.one_hot(task.labels[: len(seen)], num_classes).float()
        answers = shared.logits[task.teacher, seen].softmax(-1).nan_to_num(0.0)
        targets[row, : len(seen)] = torch.cat([given, answers], dim=-1)
    gram = inputs.transpose(1, 2) @ inputs + RIDGE * torch.eye(size)  # [N, 1 + F, 1 + F]
    moments = inputs.transpose(1, 2) @ targets  # [N, 1 + F, 2C]
    columns: list[Tensor] = []
    for kept in (size, *(min(1 + few, size) for few in FEW)):
        weights = torch.linalg.solve(gram[:, :kept, :kept], moments[:, :kept])  # [N, kept, 2C]
        labels, teacher = weights.split(num_classes, dim=-1)
        kinds = (labels, teacher, labels + teacher) if kept == size and not columns else (labels + teacher,)
        columns += [_accuracy(kind, shared, tasks) for kind in kinds]
    return torch.stack(columns, dim=-1)


def _accuracy(weights: Tensor, shared: _Shared, tasks: Sequence[Task]) -> Tensor:
    """Return [N], validation accuracies of the linear classifiers [N, K, C]."""
    truth, reached = shared.labels[shared.validation], torch.zeros(len(tasks))
    for teacher in {task.teacher for task in tasks}:
        rows = torch.tensor([i for i, task in enumerate(tasks) if task.teacher == teacher], dtype=torch.int64)
        along = shared.inputs(teacher, shared.validation)[:, : weights.shape[1]]  # [V, K]
        reached[rows] = ((along @ weights[rows]).argmax(-1) == truth).to(reached).mean(-1)
    return reached
