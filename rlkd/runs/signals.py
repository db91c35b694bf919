"""Write a teacher's answers as shards of a folder (`rlkd signals`)."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlkd.configs.signals import SignalsConfig
from rlkd.data.examples import TokenExamples
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.pretrained import kind_of, load_config
from rlkd.models.real.sides import Sources, absent_teacher, load_teacher
from rlkd.teachers.real.answering import describe, model_answers, write_answers
from rlkd.teachers.real.imported import import_answers
from rlkd.teachers.real.server import Server, server_answers
from rlkd.teachers.real.shards import INDEX, Answers, Description


class WrittenShard(NamedTuple):
    """Result of `write_signals`."""

    described: Description
    is_new: bool  # else the shard was there already
    is_complete: bool  # whether all shards are there


def write_signals(config: SignalsConfig, folder: Path, number: int, total: int) -> WrittenShard:
    """Write shard `number` (from 0) of `total` of a teacher's answers into `folder`.

    Raises:
        UserError: a teacher, data or answers that cannot be used.
    """
    config.check()
    kind = kind_of(load_config(config.teacher), config.teacher)
    sources = Sources(
        teacher=config.teacher,
        student="",
        data=config.data,
        columns=config.columns,
        cut=StudentCut(),
        attach=AttachConfig(),
        device_map=config.teacher_device_map,
        allow_pickle=config.allow_pickle,
    )
    is_absent = config.import_file is not None or config.teacher_url is not None
    side = absent_teacher(sources, kind) if is_absent else load_teacher(sources, kind)
    data, k, origin = side.data, config.top_k, "teacher"
    imported: Answers | None = None
    if config.import_file is not None:
        imported = import_answers(Path(config.import_file), data)
        k, origin = imported.ids.shape[-1], "import"
    elif config.teacher_url is not None:
        origin = f"{config.teacher_url} {config.teacher_served}".strip()
    elif config.teacher_device_map is None:
        side.model.to(_device(config.device))
    described = describe(side, kind, config.teacher, k, origin)

    def compute(rows: Tensor) -> Answers:
        if imported is not None:
            return Answers(*(tensor[rows] for tensor in imported))
        if config.teacher_url is None:
            return model_answers(side, rows, described.k, config.batch_size)
        if not isinstance(data, TokenExamples):
            raise UserError("teacher_url: got a classifier; allowed: a causal language model")
        server = Server(config.teacher_url, config.teacher_served, batch_size=config.batch_size)
        return server_answers(server, data, rows, described.k)

    is_new = write_answers(folder, described, number, total, compute)
    return WrittenShard(described, is_new, (folder / INDEX).exists())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"device: got {name!r:.40}, which torch cannot use here; try cpu") from error
    return device
