"""Read files after checking size and form; write files whole or not at all."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rlkd.errors import UserError, WriteError

MAX_JSON_BYTES = (
    2**20
)  # cards, cost profiles, results and the headers of safetensors; those that rlkd writes have a few KiB
MAX_TENSOR_BYTES = 64 * 2**20
MAX_DEPTH = 32
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FULL = {errno.ENOSPC, errno.EDQUOT}

Schema = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, which must lie inside of `folder`.

    Raises:
        UserError: a link or a ".." leads out of the folder. An untrusted folder could otherwise name any file here.
    """
    path = folder / name
    try:
        home, place = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{path}: cannot be followed, as links in a circle; put the file itself there") from error
    if not place.is_relative_to(home):
        raise UserError(f"{path}: leads out of {folder}; put the file itself there")
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; the size is checked before any of it is read.

    Raises:
        UserError: missing, unreadable, too large, or a folder, pipe or device.
    """
    with opened(path, limit) as (file, size):
        return file.read(size)


@contextlib.contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file of at most `limit` bytes; yields file and size; errors as of `read_bytes`."""
    try:
        # without O_NONBLOCK, opening a named pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{str(path)!r}: no file name") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a file")
        if limit is not None and status.st_size > limit:
            raise UserError(f"{path}: {status.st_size} bytes; allowed: at most {limit}")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    finally:
        os.close(descriptor)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file, without NaN, infinity, duplicate keys or deep nesting.

    Args:
        path: at most 1 MiB.
        what: for messages, such as "a cost profile".

    Raises:
        UserError: anything else.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), f"{path}: not {what}")


@contextlib.contextmanager
def refused_as(path: Path, what: str) -> Iterator[None]:
    """Raise UserError for an entry of the JSON file at `path` that the block finds missing or wrong.

    Args:
        path: of the file that was read with `read_json`.
        what: as of `read_json`.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not {what}, or a damaged one ({reason(error):.120})") from error


def parse_json(blob: bytes, complaint: str) -> dict[str, Any]:
    """Parse the JSON object in `blob`; the message of the UserError for anything else begins with `complaint`."""
    try:
        text = blob.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_countable, object_pairs_hook=_once
        )
    except ValueError as error:  # bad UTF-8, bad JSON, or one of the refusals below
        raise UserError(f"{complaint}, or a damaged one ({error!s:.100})") from error
    if not isinstance(value, dict):
        raise UserError(f"{complaint}, or a damaged one (expected an object, got {type(value).__name__})")
    return value


def _check_depth(text: str) -> None:
    """Raise ValueError for JSON nested deeper than MAX_DEPTH, for which the parser would raise a RecursionError."""
    depth, quoted = 0, False
    for match in re.finditer(r'\\.|["\[\]{}]', text, re.DOTALL):
        token = match.group()
        if token == '"':
            quoted = not quoted
        elif not quoted and token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
        elif not quoted and token in "]}":
            depth -= 1


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number:.20} is too large a number")
    return value


def _countable(number: str) -> int:
    """Return an integer within the range of floats, because readers may turn it into one."""
    _finite(number)
    return int(number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def reason(error: Exception) -> str:
    """Return the text of an error for a message; the text of a KeyError alone would be the bare key."""
    return f"{error.args[0]!r:.60} is missing" if isinstance(error, KeyError) and error.args else str(error)


def number(value: Any, name: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """Return `value` as a float; raise ValueError unless it is a finite JSON number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        bounds = "" if lowest == -math.inf else f" from {lowest:g} to {highest:g}"
        raise ValueError(f"{name} is {value!r:.40}; allowed: a number{bounds}")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # an integer, too, can be too large for a float
        raise ValueError(f"{name} is {value!r:.40}; allowed: a finite number")
    return float(value)


def whole(value: Any, name: str, lowest: int, highest: int) -> int:
    """Return `value`; raise ValueError unless it is a JSON integer within bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {value!r:.40}; allowed: an integer from {lowest} to {highest}")
    return value


def tensor_shapes(blob: bytes, name: str) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return type and shape of every tensor from the header of safetensors content; no tensor is made.

    A type is a `torch.dtype`, or the header's own word for a type that rlkd never writes.

    Raises:
        UserError: the header is missing or damaged; the message begins with `name`.
    """
    length = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or length > min(len(blob) - 8, MAX_JSON_BYTES):
        raise UserError(f"{name}: not a safetensors file, or a damaged one (its header does not fit the file)")
    header = parse_json(blob[8 : 8 + length], f"{name}: not a safetensors file")
    shapes = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, sizes = entry["dtype"], entry["shape"]
            if not isinstance(sizes, list):
                raise ValueError(f"shape is {sizes!r:.40}; allowed: a list")
            shape = tuple(whole(size, "a size", 0, 2**40) for size in sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{name}: not a safetensors file, or a damaged one ({key!r:.40}: {reason(error):.80})"
            ) from error
        shapes[key] = (_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype, shape)
    return shapes


def load_tensors(blob: bytes, schema: Schema, name: str, finite: bool = True) -> dict[str, Tensor]:
    """Load the tensors of safetensors content, which must be exactly those of `schema`.

    Args:
        blob: safetensors content.
        schema: type and shape by name.
        name: beginning of messages.
        finite: whether every value must be finite.

    Raises:
        UserError: a name, type or shape differs (checked before a tensor is made), or a value is not finite.
    """
    given = tensor_shapes(blob, name)
    for key, (dtype, shape) in schema.items():
        if given.get(key) != (dtype, shape):
            shown = "nothing" if key not in given else f"{given[key][0]!s:.20} {list(given[key][1])!s:.60}"
            raise UserError(f"{name}: {key} is {shown}; expected {_short(dtype)} {list(shape)}")
    unexpected = sorted(set(given) - set(schema))
    if unexpected:
        raise UserError(f"{name}: {unexpected[0]!r:.40} does not belong in it; get the file anew")
    try:
        tensors: dict[str, Tensor] = load(blob)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{name}: not a safetensors file, or a damaged one ({error!s:.100})") from error
    for key, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} holds a non-finite value")
    return tensors


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all, safe against a crash and against other writers of the same file.

    The content is written to a new file beside `path` and forced to the disk; then the file is renamed to `path`.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    blob = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        _sync_folder(path.parent)
    except FileExistsError as error:  # by mkdir: a file stands where the folder should
        raise write_error(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))) from error
    except OSError as error:
        raise write_error(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where folders can be opened and forced."""
    with contextlib.suppress(OSError):  # some file systems refuse; the content itself is on the disk already
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_error(path: Path | str, error: OSError) -> WriteError:
    """Return the error for a `path` that could not be written."""
    if error.errno in _FULL:
        return WriteError(
            f"{path}: cannot write it, the disk is full ({error.strerror}); free some room, then run it again"
        )
    return WriteError(f"{path}: cannot write it ({error.strerror or error}); choose a place that can be written")
