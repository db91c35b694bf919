"""Answers of a teacher to some samples, as shards of a folder: of its weights, or of a server."""

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.data.examples import PADDING_MASK, TokenExamples, to_device
from rlkd.errors import UserError
from rlkd.io.cache import cache_dir, digest_tensors
from rlkd.io.memory import enough_memory
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.pretrained import Kind, device_of, state_of
from rlkd.models.real.sides import Side
from rlkd.teachers.real.module_signals import TEACHER_LESS
from rlkd.teachers.real.server import Server, server_answers
from rlkd.teachers.real.shards import (
    Answers,
    Description,
    data_digest,
    is_written,
    names_digest,
    rows_of,
    uniform,
    write_shard,
)

logger = logging.getLogger(__name__)

ASKED_AT_ONCE = 64  # samples of a shard that a server answers for a run of rlkd distil


def class_names_of(side: Side, kind: Kind) -> list[str]:
    """Return the names of a classifier's classes; [] for a language model."""
    described: Any = side.model.config
    return [] if kind == "causal_lm" else [str(name) for name in described.id2label.values()]


def describe(side: Side, kind: Kind, teacher: str, k: int, origin: str) -> Description:
    """Describe the answers of a teacher to its data.

    Args:
        side: the teacher with its data.
        kind: of the teacher.
        teacher: its name.
        k: likeliest tokens or classes that are kept; of a classifier at most its classes.
        origin: where the answers come from.

    Raises:
        UserError: k is not from 1 to the vocabulary.
    """
    data = side.data
    is_causal = isinstance(data, TokenExamples)
    if not 1 <= k <= data.num_classes and (is_causal or k < 1):
        raise UserError(f"top_k: got {k}; allowed: 1 to {data.num_classes}, the teacher's vocabulary")
    return Description(
        kind=kind,
        origin=origin,
        teacher=teacher,
        teacher_sha256="" if side.is_absent else digest_tensors(state_of(side.model).items()),
        data=data.name,
        data_sha256=data_digest(data),
        names_sha256=names_digest(side.processor, class_names_of(side, kind)),
        num_samples=len(data.labels),
        length=int(data.inputs[PADDING_MASK].shape[1]) if is_causal else 1,
        vocabulary=data.num_classes,
        k=min(k, data.num_classes),
    )


def write_answers(
    folder: Path, described: Description, number: int, total: int, compute: Callable[[Tensor], Answers]
) -> bool:
    """Write shard `number` (from 0) of `total`, unless it is there already; returns whether it was written.

    Args:
        folder: of the shards.
        described: what the answers belong to.
        number: of the shard.
        total: number of shards.
        compute: gives the answers to the samples [n].

    Raises:
        UserError: more shards than samples; answers that cannot be had or used.
    """
    if not 1 <= total <= described.num_samples:
        raise UserError(f"--shard: got {total} shards; allowed: 1 to {described.num_samples}, the samples")
    if is_written(folder, described, number, total):
        return False
    write_shard(folder, described, number, total, compute(rows_of(described.num_samples, number, total)))
    return True


@torch.no_grad()
def model_answers(side: Side, rows: Tensor, k: int, batch_size: int) -> Answers:
    """Return the answers of a teacher's weights to the samples at `rows` [n]."""
    model, data = side.model.eval(), side.data
    device, is_causal = device_of(model), isinstance(data, TokenExamples)
    length = int(data.inputs[PADDING_MASK].shape[1]) if is_causal else 1
    answers = uniform(len(rows), length, k, data.num_classes)
    with enough_memory(f"the teacher's answers to {batch_size} samples at once", TEACHER_LESS):
        for places in torch.split(data.by_length(rows), batch_size):
            inputs = to_device(data.batch(rows[places]), device)
            logits = logits_of(forward(model, inputs)).float()[..., : data.num_classes]
            log_p = (logits if is_causal else logits[:, None]).log_softmax(-1)  # [B, l, V]
            best = log_p.topk(k, dim=-1)
            count = log_p.shape[1]
            answers.log_probs[places, :count], answers.ids[places, :count] = best.values.cpu(), best.indices.cpu()
            if is_causal:
                target = inputs["input_ids"][:, 1:, None]
                answers.targets[places, : count - 1] = log_p[:, :-1].gather(-1, target)[..., 0].cpu()
    return answers


def asked_folder(side: Side, kind: Kind, teacher: str, k: int, server: Server) -> Path:
    """Return a folder in the cache with a server's answers to all samples; what is missing in it is asked for.

    Raises:
        UserError: a classifier; a server that cannot be reached or answers otherwise than it should.
    """
    data = side.data
    if not isinstance(data, TokenExamples):
        raise UserError("teacher_url: got a classifier; allowed: a causal language model")
    server.check()
    described = describe(side, kind, teacher, k, f"{server.url} {server.model}".strip())
    folder = cache_dir() / f"asked-{hashlib.sha256(repr(described).encode()).hexdigest()[:16]}"
    total = math.ceil(described.num_samples / ASKED_AT_ONCE)
    for number in range(total):
        if write_answers(folder, described, number, total, lambda rows: server_answers(server, data, rows, k)):
            logger.info(f"{server.url}: answered {number + 1} of {total} parts (kept in the cache)")
    return folder
