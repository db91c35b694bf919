"""A folder of IDX files as MNIST and its kin come: images and labels, a training part (`train-...`) and a test part."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkd.data.files import read_idx
from rlkd.errors import UserError

PARTS = (("train", "train"), ("t10k", "test"))  # what the files' names begin with, and the split
WHAT = (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1))  # how they go on, and their number of dimensions


def is_idx_folder(path: Path) -> bool:
    """Whether the folder holds training images as an IDX file, gzipped or not."""
    return path.is_dir() and _first(path, f"train-{WHAT[0][0]}") is not None


def _first(path: Path, name: str) -> Path | None:
    """Find a file by its name, gzipped or not; some copies are called train-images.idx3-ubyte."""
    names = [f"{spelling}{ending}" for spelling in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    return next((path / name for name in names if (path / name).is_file()), None)


def read_idx_folder(path: Path) -> tuple[NDArray[np.float32], list[int], list[str], list[str]]:
    """Images [S, 1, H, W] in [0, 1], labels, sources (copies of one image are one source) and splits, train and test.

    Raises:
        UserError: a file is missing or broken, or images and labels do not fit.
    """
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    splits: list[str] = []
    for name, split in PARTS:
        pixels, classes = (read_idx(_find(path, f"{name}-{what}"), dimensions) for what, dimensions in WHAT)
        if len(pixels) != len(classes) or (images and pixels.shape[1:] != images[0].shape[1:]):
            raise UserError(
                f"{path}: got images {list(pixels.shape)} for {len(classes)} labels in {name}-*; allowed: as many, of "
                "one size in both parts; fetch the files again"
            )
        images.append(pixels)
        labels += classes.tolist()
        splits += [split] * len(classes)
    rows: NDArray[Any] = np.concatenate(images)  # [S, H, W]
    sources = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
    return rows[:, None].astype(np.float32) / np.float32(255), labels, sources, splits


def _find(path: Path, name: str) -> Path:
    found = _first(path, name)
    if found is not None:
        return found
    raise UserError(f"{path}: no file {name} or {name}.gz; allowed: IDX files train-* and t10k-*, images and labels")
