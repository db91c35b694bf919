"""Several real teachers as one: their answers are combined sample by sample, once, before any training."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data.examples import Examples
from rlkd.errors import UserError
from rlkd.models.real.pretrained import kind_of, load_config
from rlkd.models.real.sides import Side, Sources, load_teacher
from rlkd.teachers.real.module_signals import module_signals
from rlkd.teachers.real.sharded import shard_teacher
from rlkd.teachers.several import TeacherGate, combine, confidence_weights, mean_weights
from rlkd.teachers.signals import Signals

Weighting = Literal["mean", "confidence", "gate"]
GATE_STEPS, GATE_RATE = 200, 0.02


def combine_teachers(signals: Signals, more: Sequence[Tensor], data: Examples, weighting: Weighting) -> Signals:
    """Return the signals of a teacher whose answers are those of all teachers, combined.

    Features and attention maps stay the first teacher's. Labels of the train split alone are read: `confidence` weighs
    samples of the other splits equally, and `gate` is trained on the train split.

    Args:
        signals: of the first teacher.
        more: logits [S, C] of each further teacher, for the same samples and classes.
        data: gives labels and splits.
        weighting: as in `rlkd.teachers.several`.
    """
    logits = torch.stack([signals.logits[0], *more])  # [K, S, C]
    mixed = combine(logits, _weights(logits, data, weighting))  # [S, C]
    validation, train = data.splits["validation"], data.splits["train"]
    accuracy = (mixed[validation].argmax(-1) == data.labels[validation]).float().mean()
    log_p = F.log_softmax(mixed[train], -1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean() / math.log(data.num_classes)
    return dataclasses.replace(signals, logits=mixed[None], accuracy=accuracy[None], entropy=entropy[None])


def further_answers(
    sources: Sources, name: str, first: Side, device: torch.device, batch_size: int, *, shard: bool = False
) -> Tensor:
    """Return the logits [S, C] of a further teacher for the samples of the first.

    Args:
        sources: of the first teacher.
        name: folder or hub id of the further one, of any architecture.
        first: the first teacher with its data.
        device: where the pass is made.
        batch_size: of the pass.
        shard: its weights over processes, which all call this.

    Raises:
        UserError: its classes are not the first teacher's, in this order.
    """
    side = load_teacher(dataclasses.replace(sources, teacher=name, device_map=None), kind_of(load_config(name), name))
    described: list[Any] = [part.model.config for part in (side, first)]
    names = [list(config.id2label.values()) for config in described]
    if names[0] != names[1] or not torch.equal(side.data.labels, first.data.labels):
        raise UserError(
            f"more_teachers: {name} has the classes {names[0]!s:.80}; allowed: those of teacher, {names[1]!s:.80}"
        )
    if shard:
        shard_teacher(side.model, side.plan.blocks, side.data.batch(side.data.few()), device)
    else:
        side.model.to(device)
    return module_signals(side.model, side.plan, [], side.data, batch_size).logits[0]


def _weights(logits: Tensor, data: Examples, weighting: Weighting) -> Tensor:
    """Return [K, S] for logits [K, S, C]."""
    train = data.splits["train"]
    weights = mean_weights(logits)
    if weighting == "confidence":
        weights[:, train] = confidence_weights(logits[:, train], data.labels[train])
    if weighting == "gate":
        gate = TeacherGate(len(logits), data.num_classes)
        optimizer = torch.optim.Adam(gate.parameters(), lr=GATE_RATE)
        for _ in range(GATE_STEPS):
            loss = gate.loss(logits[:, train], data.labels[train])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        weights = gate(logits).detach()
    return weights
