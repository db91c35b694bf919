"""Train the teachers of a data set once, good ones and poor ones, and keep them in a cache.

Teachers learn from true labels of the train split. The number of samples determines their quality.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from rlkd.data import DataSet
from rlkd.errors import UserError
from rlkd.io.cache import cache_dir
from rlkd.io.files import MAX_TENSOR_BYTES, inside, load_tensors, read_bytes, write_whole
from rlkd.models import ChainStudent, StudentConfig, build_student, initialise

TEACHER_SEED = 20_260_102
FORMAT = 2


@dataclass(frozen=True)
class TeacherConfig:
    """The teachers: one MLP a training-set size."""

    widths: tuple[int, ...] = (128, 64)
    """Units of each hidden layer."""
    num_samples: tuple[int, ...] = (24, 40, 64, 100, 160, 300, 600, 897)
    """How many training samples each teacher sees: few make a poor teacher. 0: all of the train split."""
    num_steps: int = 300
    """Optimizer steps of each teacher (Adam, batches of 64)."""
    learning_rate: float = 2e-3

    def check(self) -> None:
        """Raise UserError for a teacher that cannot be trained."""
        StudentConfig(widths=self.widths, exits=()).check()
        if not self.num_samples or min(self.num_samples) < 0:
            raise UserError(
                f"teacher.num_samples: got {list(self.num_samples)}; allowed: one or more numbers, 0 for all samples"
            )
        if self.num_steps < 1 or not self.learning_rate > 0:
            raise UserError(
                f"teacher: got num_steps {self.num_steps}, learning_rate {self.learning_rate:g}; allowed: above 0"
            )

    def check_against(self, data: DataSet) -> None:
        """Raise UserError for a teacher with more samples than the train split has."""
        available = len(data.splits["train"])
        if max(self.num_samples) > available:
            raise UserError(
                f"teacher.num_samples: got {max(self.num_samples)}; allowed: 1 to {available}, the train split of "
                f"{data.name}"
            )


def load_teachers(config: TeacherConfig, data: DataSet) -> list[ChainStudent]:
    """Load the teachers of `data` from the cache, or train and cache them.

    Raises:
        UserError: an impossible config, more samples than the train split has, or a damaged cached file.
    """
    config.check()
    config.check_against(data)
    path = _cache_path(config, data)
    teachers = [_build(config, data) for _ in config.num_samples]
    if not path.exists():
        for index, teacher in enumerate(teachers):
            _train(teacher, config, data, index)
        tensors = {f"{i}.{name}": p for i, teacher in enumerate(teachers) for name, p in teacher.state_dict().items()}
        write_whole(path, signed(tensors))
    schema = {
        f"{i}.{name}": (p.dtype, tuple(p.shape))
        for i, teacher in enumerate(teachers)
        for name, p in teacher.state_dict().items()
    }
    try:
        blob = read_bytes(inside(path.parent, path.name), MAX_TENSOR_BYTES)
        tensors = load_tensors(blob, schema, str(path))
        if blob != signed(tensors):
            raise UserError(f"{path}: torn or altered, its checksum is not that of its tensors")
    except UserError as error:
        raise UserError(f"cached teachers: {error}; delete the file to train them anew") from error
    for index, teacher in enumerate(teachers):
        teacher.load_state_dict({name: tensors[f"{index}.{name}"] for name in teacher.state_dict()})
    return teachers


def signed(tensors: dict[str, Tensor]) -> bytes:
    """Return safetensors content with the tensors' sha256 in its header; equal tensors give equal bytes."""
    return save(tensors, {"sha256": hashlib.sha256(save(tensors)).hexdigest()})


def _cache_path(config: TeacherConfig, data: DataSet) -> Path:
    """Return a path that depends on config, samples and versions; the files of a data set can change."""
    digest = hashlib.sha256()
    for tensor in (data.inputs, data.labels, data.splits["train"]):
        digest.update(tensor.contiguous().numpy().tobytes())
    key = json.dumps([FORMAT, asdict(config), data.name, digest.hexdigest(), torch.__version__, TEACHER_SEED])
    name = re.sub(r"[^\w.,=-]", "-", data.name)  # colons of generated names are not allowed everywhere
    return cache_dir() / f"teachers-{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _build(config: TeacherConfig, data: DataSet) -> ChainStudent:
    return build_student(StudentConfig(widths=config.widths, exits=()), data.input_shape, data.num_classes)


def _train(teacher: ChainStudent, config: TeacherConfig, data: DataSet, index: int) -> None:
    """Train by Adam on cross entropy with the first num_samples[index] samples of a shuffled train split."""
    generator = torch.Generator().manual_seed(TEACHER_SEED + index)
    initialise(teacher, generator)
    train = data.splits["train"]
    seen = train[torch.randperm(len(train), generator=generator)[: config.num_samples[index] or None]]  # [L]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=config.learning_rate)
    masks = teacher.full_masks()
    for _ in range(config.num_steps):
        batch = seen[torch.randint(len(seen), (min(64, len(seen)),), generator=generator)]  # [B]
        loss = F.cross_entropy(teacher(data.inputs[batch], masks).logits[-1], data.labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
