"""Read the arrays of an .npz file: `inputs` [S, ...] and `labels` [S], optionally `source` [S] and `split` [S]."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkd.errors import UserError
from rlkd.io.files import opened

NUMBERS = "fiub"  # kinds of numpy types: floats, integers, truth values


@dataclass(frozen=True)
class Arrays:
    """What an .npz file holds, S samples."""

    inputs: NDArray[Any]  # [S, ...], as the model takes them
    labels: list[Any]
    sources: list[Any]  # copies of one input have one source where the file names none
    splits: list[Any] | None


def read_arrays(path: Path) -> Arrays:
    """Read the arrays, without reading pickles.

    Raises:
        UserError: an array is missing or damaged, has no number or one that is not finite, or lengths differ.
    """
    try:
        with opened(path) as (raw, _), np.load(raw, allow_pickle=False) as file:
            names = list(file.files)
            arrays: dict[str, NDArray[Any]] = dict(file)
        inputs, labels = arrays["inputs"], arrays["labels"]
        if min(inputs.ndim, labels.ndim) < 1:
            raise ValueError("a single value")
    except KeyError as error:
        raise UserError(
            f"{path}: not arrays `inputs` and `labels`; it has {', '.join(names)[:200] or 'none'}"
        ) from error
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not arrays `inputs` and `labels` ({error!s:.80})") from error
    for name in ("labels", "source", "split"):
        if name in arrays and (arrays[name].ndim < 1 or len(arrays[name]) != len(inputs)):
            raise UserError(
                f"{path}: got {name} {list(arrays[name].shape)} for {len(inputs)} inputs; allowed: one for each input"
            )
    if not len(inputs):
        raise UserError(f"{path}: got no sample; allowed: at least one")
    _check_numbers(inputs, path)
    given = arrays.get("source")
    sources = [hashlib.sha256(row.tobytes()).hexdigest() for row in inputs] if given is None else given.tolist()
    return Arrays(inputs, labels.tolist(), sources, arrays["split"].tolist() if "split" in arrays else None)


def _check_numbers(inputs: NDArray[Any], path: Path) -> None:
    if inputs.dtype.kind not in NUMBERS:
        raise UserError(f"{path}: got inputs of type {inputs.dtype}; allowed: real numbers")
    for row, values in enumerate(inputs, 1):
        with np.errstate(over="ignore"):
            is_finite = inputs.dtype.kind != "f" or np.isfinite(values.astype(np.float32)).all()
        if not is_finite:
            raise UserError(f"{path}: row {row}: got an input that is not finite in 32 bits; remove or replace it")
