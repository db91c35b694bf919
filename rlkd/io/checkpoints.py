"""Checkpoints: the whole state of a training in one file, the last few kept, each with a checksum.

A file is 64 hex digits (the sha256 of all that follows), a line of strict JSON, and safetensors. It is written under
another name, forced to the disk and renamed, so a name always stands for a whole file. It contains no pickle.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rlkd.errors import UserError
from rlkd.io.files import MAX_JSON_BYTES, Schema, inside, load_tensors, opened, parse_json, write_whole

logger = logging.getLogger(__name__)

MAX_CHECKPOINT_BYTES = 2**40  # to be read through for its checksum; what may be loaded follows from the schema
_NAME = re.compile(r"state-(\d{6})\.ckpt")
_PREFIX = 65  # bytes of the checksum and its line break
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a correct checksum; its tensors are still on the disk."""

    path: Path
    number: int
    note: dict[str, Any]
    begin: int  # of the safetensors in the file

    def tensors(self, schema: Schema) -> dict[str, Tensor]:
        """Read the tensors of `schema`, which must be all tensors of the file; values need not be finite.

        Raises:
            UserError: a name, type or shape differs, or the file is longer than the tensors of `schema`; both are
                checked before memory is allocated for tensors.
        """
        longest = sum(math.prod(shape) * dtype.itemsize for dtype, shape in schema.values()) + MAX_JSON_BYTES + 8
        with opened(self.path, self.begin + longest) as (file, size):
            file.seek(self.begin)
            blob = file.read(size - self.begin)
        return load_tensors(blob, schema, str(self.path), finite=False)


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: made with the first checkpoint.
        keep: newest files that stay; older ones are deleted after each new one.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, number: int, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Write the state after step `number`, whole or not at all.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints stay.
        """
        line = json.dumps(note, allow_nan=False).encode() + b"\n"
        blob = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(line)
        digest.update(blob)
        write_whole(
            self._folder / f"state-{number:06d}.ckpt", b"".join((digest.hexdigest().encode(), b"\n", line, blob))
        )
        for path in self._files()[self._keep :]:
            path.unlink(missing_ok=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None; warn of torn and altered ones, and skip them."""
        for path in self._files():
            try:
                return read_checkpoint(inside(self._folder, path.name))
            except UserError as error:
                logger.warning(f"{error}; going back to what was saved before it")
        return None

    def clear(self) -> None:
        """Delete all checkpoints."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Return the files of checkpoints, the newest first."""
        if not self._folder.is_dir():
            return []
        return sorted((path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without its tensors.

    Raises:
        UserError: the file cannot be read, or its checksum differs.
    """
    number = _NAME.fullmatch(path.name)
    if number is None:
        raise UserError(f"{path}: not the name of a checkpoint")
    digest = hashlib.sha256()
    with opened(path, MAX_CHECKPOINT_BYTES) as (file, _):
        stored = file.read(_PREFIX)
        line = file.readline(MAX_JSON_BYTES)
        digest.update(line)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if stored != digest.hexdigest().encode() + b"\n":
        raise UserError(f"{path}: torn or altered, its checksum differs")
    note = parse_json(line, f"{path}: not a checkpoint")
    return Checkpoint(path, int(number.group(1)), note, _PREFIX + len(line))
