"""Arrays that are expensive to compute, kept as memory-mapped files with checksums, for teachers' signals.

A folder holds one .npy file per array and a card with the key (everything that the arrays depend on) and the sha256 of
each file. A torn or altered file is reported, and all arrays are computed again. Several processes may need the same
arrays at once: each writes a folder of its own, and the first one to finish puts its folder in place. A file is mapped
before it is checked, so the returned arrays are the checked ones.
"""

import errno
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.io.files import inside, opened, read_json, write_error, write_whole

logger = logging.getLogger(__name__)

FORMAT = 1
Spec = tuple[tuple[int, ...], str]  # shape and numpy dtype
Arrays = dict[str, "NDArray[np.generic]"]
CHUNK_BYTES = 1 << 22
NUM_TRIES = 5  # another process that removes a broken folder can also remove the intact one that replaced it


def cache_dir() -> Path:
    """Return the folder of cached teachers, signals and cost profiles: $RLKD_CACHE, else ~/.cache/rlkd."""
    return Path(os.environ.get("RLKD_CACHE") or Path.home() / ".cache" / "rlkd")


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 over names, types, shapes and bytes, as hex digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_arrays(
    name: str,
    key: Mapping[str, str],
    specs: Mapping[str, Spec],
    fill: Callable[[Arrays], object],
) -> dict[str, Tensor]:
    """Return the arrays of `key` from the cache, or compute them with `fill` and cache them.

    Args:
        name: beginning of the folder's name.
        key: all that the arrays depend on: teacher, data, preprocessing, versions.
        specs: shape and type of every array.
        fill: writes every array in place.

    Returns:
        Tensors over memory-mapped files, private to this process: writing to one changes no file.

    Raises:
        UserError: the cache cannot be written, or another process breaks it after every write.
    """
    text = json.dumps([FORMAT, dict(key), {k: list(v) for k, v in specs.items()}], sort_keys=True)
    folder = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    for _ in range(NUM_TRIES):
        if not os.path.lexists(folder):
            _write(folder, key, specs, fill)
        try:
            return {k: torch.from_numpy(v) for k, v in _map(folder, specs).items()}
        except UserError as error:
            logger.warning(f"{error}; computing the cached signals in {folder} anew")
            _remove_broken(folder)
    raise UserError(f"{folder}: was broken {NUM_TRIES} times in a row; give RLKD_CACHE a folder of this run alone")


def cached_together(
    name: str,
    key: Mapping[str, str],
    specs: Mapping[str, Spec],
    fill: Callable[[Arrays], object],
) -> dict[str, Tensor]:
    """As `cached_arrays` in several processes at once, all of which take part in `fill`; the first one alone writes.

    Args:
        name: as of `cached_arrays`.
        key: as of `cached_arrays`.
        specs: as of `cached_arrays`.
        fill: writes every array in place in the first process; in the others it is given none.

    Raises:
        UserError: as of `cached_arrays`; a process does not see what the first one wrote.
    """

    def lead(arrays: Arrays) -> None:
        processes.from_first(lambda: True)
        fill(arrays)

    def refuse(_: Arrays) -> None:
        raise UserError(
            f"{cache_dir()}: lacks what the first process wrote; give RLKD_CACHE a folder that every process can read"
        )

    if processes.index() == 0:
        tensors = cached_arrays(name, key, specs, lead)
        processes.from_first(lambda: False)
        return tensors
    while processes.from_first(lambda: False):  # the first process begins to fill
        fill({})
    return cached_arrays(name, key, specs, refuse)


def _write(folder: Path, key: Mapping[str, str], specs: Mapping[str, Spec], fill: Callable[[Arrays], object]) -> None:
    """Fill a folder of this process and put it in place, unless another process was faster."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        arrays: Arrays = {
            k: np.lib.format.open_memmap(partial / f"{k}.npy", mode="w+", dtype=dtype, shape=shape)
            for k, (shape, dtype) in specs.items()
        }
        fill(arrays)
        for array in arrays.values():
            assert isinstance(array, np.memmap)
            array.flush()
        sums = {}
        for k in specs:
            with opened(partial / f"{k}.npy") as (file, _):
                sums[k] = _sha256(file)
        card = {"format": FORMAT, "key": dict(key), "sha256": sums}
        write_whole(partial / "card.json", json.dumps(card, indent=1) + "\n")
        partial.replace(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # not the other process's folder
            raise write_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _map(folder: Path, specs: Mapping[str, Spec]) -> Arrays:
    """Map every file and check it; a UserError names the first file that differs from what was written."""
    card = read_json(inside(folder, "card.json"), "the card of cached signals")
    sums = card.get("sha256")
    if card.get("format") != FORMAT or not isinstance(sums, dict):
        raise UserError(f"{folder / 'card.json'}: not the card of cached signals")
    arrays: Arrays = {}
    for name, (shape, dtype) in specs.items():
        path = inside(folder, f"{name}.npy")
        with opened(path) as (file, num_bytes):
            header = _header(shape, dtype)
            size = len(header) + int(np.prod(shape)) * np.dtype(dtype).itemsize
            if num_bytes != size or file.read(len(header)) != header:
                raise UserError(f"{path}: torn or altered, its type or size is not {dtype} {list(shape)}")
            arrays[name] = np.memmap(file, dtype, "c", len(header), shape)
            if _sha256(file) != sums.get(name):
                raise UserError(f"{path}: torn or altered, its checksum differs from card.json")
    return arrays


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the header that numpy writes for such an array, to be compared byte by byte instead of parsed."""
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _remove_broken(folder: Path) -> None:
    """Remove a broken folder, link or file; processes that have mapped it keep their mapping."""
    away = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.broken")
    try:
        folder.rename(away)
    except FileNotFoundError:
        return  # another process did
    except OSError as error:
        raise write_error(folder, error) from error
    if away.is_dir() and not away.is_symlink():
        shutil.rmtree(away, ignore_errors=True)
    else:
        away.unlink(missing_ok=True)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
