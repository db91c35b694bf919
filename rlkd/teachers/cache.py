"""Arrays that are expensive to compute, kept as memory-mapped files with checksums, for teachers' signals.

A folder holds one .npy file an array and a card: the key that says of what the arrays were computed, and each
file's sha256. A file that is torn or was altered is named, and all are computed anew.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.teachers.training import cache_dir

FORMAT = 1
Spec = tuple[tuple[int, ...], str]  # shape and numpy dtype
Arrays = dict[str, "NDArray[np.generic]"]
CHUNK_BYTES = 1 << 22


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, types, shapes and bytes."""
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
    say: Callable[[str], object] = print,
) -> dict[str, Tensor]:
    """The arrays of `key`, from the cache if they are there whole, else computed by `fill` and cached.

    Args:
        name: begins the folder's name.
        key: all that the arrays depend on: teacher, data, preprocessing, versions.
        specs: shape and type of every array.
        fill: writes every array, in place, as many rows at a time as it likes.
        say: told in one line when a cached file is broken.

    Returns:
        Tensors over memory-mapped files, private to this process: writing to one changes no file.
    """
    text = json.dumps([FORMAT, dict(key), {k: list(v) for k, v in specs.items()}], sort_keys=True)
    folder = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    broken = _what_is_broken(folder, specs) if folder.exists() else ""
    if broken:
        say(f"{broken}; computing the cached signals in {folder} anew")
        shutil.rmtree(folder)
    if not folder.exists():
        _write(folder, key, specs, fill)
    return {k: torch.from_numpy(np.load(folder / f"{k}.npy", mmap_mode="c")) for k in specs}


def _write(folder: Path, key: Mapping[str, str], specs: Mapping[str, Spec], fill: Callable[[Arrays], object]) -> None:
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        arrays: Arrays = {
            k: np.lib.format.open_memmap(partial / f"{k}.npy", mode="w+", dtype=dtype, shape=shape)
            for k, (shape, dtype) in specs.items()
        }
        fill(arrays)
        for array in arrays.values():
            assert isinstance(array, np.memmap)
            array.flush()
        card = {"format": FORMAT, "key": dict(key), "sha256": {k: _sha256(partial / f"{k}.npy") for k in specs}}
        (partial / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _what_is_broken(folder: Path, specs: Mapping[str, Spec]) -> str:
    """Names the first file that is missing or not what was written; "" if all are whole."""
    try:
        sums = json.loads((folder / "card.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / 'card.json'}: cannot be read"
    for name in specs:
        path = folder / f"{name}.npy"
        if not path.is_file():
            return f"{path}: missing"
        if _sha256(path) != sums.get(name):
            return f"{path}: torn or altered, its checksum differs from card.json"
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
