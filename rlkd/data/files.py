"""Data sets read from files of two Debian packages, dataset-fashion-mnist and r-cran-mlbench.

Nothing is fetched here: `experiments/fetch_data.sh FOLDER` puts the files into FOLDER without root, and
RLKD_DATA=FOLDER names it; installed packages are found where Debian puts them.
"""

import gzip
import lzma
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlkd.data.samples import DataSet, InputScale, choose_rows, splits_in_order, standard_scale
from rlkd.errors import UserError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MLBENCH_FOLDER = Path("/usr/lib/R/site-library/mlbench/data")
IDX_BYTES = 0x08  # type code of unsigned bytes
UNREADABLE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, lzma.LZMAError, zlib.error)


def find_file(name: str, subfolder: str, default: Path, package: str) -> Path:
    """Find the file `name` in $RLKD_DATA/subfolder, else in the folder where the Debian package puts it.

    Raises:
        UserError: neither has it.
    """
    own = os.environ.get("RLKD_DATA")
    folders = [Path(own) / subfolder, default] if own else [default]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = " and ".join(str(folder / name) for folder in folders)
    state = f"RLKD_DATA is {own}" if own else "RLKD_DATA is not set"
    raise UserError(
        f"no file {looked} ({state}): install Debian's {package}, or run `experiments/fetch_data.sh FOLDER` and set "
        "RLKD_DATA to that FOLDER"
    )


def read_idx(path: Path, num_dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped where its name ends in .gz (format: LeCun, Cortes & Burges, MNIST).

    Args:
        path: the file.
        num_dimensions: 1 for labels, 3 for images.

    Raises:
        UserError: cannot be unpacked, another type or number of dimensions, or not as many bytes as the header says.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); fetch the file again") from error
    start = 4 + 4 * num_dimensions
    wanted = bytes((0, 0, IDX_BYTES, num_dimensions))
    if raw[:4] != wanted or len(raw) < start:
        raise UserError(
            f"{path}: got {len(raw)} bytes beginning with {raw[:4].hex() or 'nothing'}; allowed: an IDX file that "
            f"begins with {wanted.hex()} and {num_dimensions} sizes; fetch the file again"
        )
    shape = struct.unpack(f">{num_dimensions}I", raw[4:start])
    if len(raw) - start != int(np.prod(shape, dtype=np.int64)):
        raise UserError(
            f"{path}: got {len(raw) - start} bytes after the header; its sizes {list(shape)} need "
            f"{int(np.prod(shape, dtype=np.int64))}; fetch the file again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _fashion_part(part: str, least: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [N, 28, 28] and labels [N] below 10 of "train" or "t10k"."""
    paths = [
        find_file(f"{part}-{what}-ubyte.gz", "fashion-mnist", FASHION_FOLDER, "dataset-fashion-mnist")
        for what in ("images-idx3", "labels-idx1")
    ]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(labels) < least:
        raise UserError(
            f"{paths[0]}: got images {list(images.shape)} for {len(labels)} labels; allowed: [N, 28, 28] for N >= "
            f"{least} labels; fetch both files again"
        )
    if labels.max() > 9:
        raise UserError(f"{paths[1]}: got label {labels.max()}; allowed: 0 to 9; fetch the file again")
    return images, labels


def fashion_mnist(name: str, size: int) -> DataSet:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) at `size` x `size` pixels, in [0, 1].

    Smaller sizes are adaptive mean pooling: pixel i is the mean over rows floor(i 28 / size) up to
    ceil((i + 1) 28 / size). At 14 x 14 windows are 2 pixels wide; at 8 x 8 they are 4 wide and neighbours may share a
    row. All sizes have the same samples. Train and validation come from the 60,000 official training images, test
    from the 10,000 official test images.

    Raises:
        UserError: a missing or broken file.
    """
    fit_images, fit_labels = _fashion_part("train", least=3)
    test_images, test_labels = _fashion_part("t10k", least=1)
    fit, test = (rows.numpy() for rows in choose_rows(len(fit_labels), len(test_labels)))
    images = torch.from_numpy(np.concatenate([fit_images[fit], test_images[test]])).float() / 255.0  # [S, 28, 28]
    labels = torch.from_numpy(np.concatenate([fit_labels[fit], test_labels[test]])).long()  # [S]
    inputs = images if size == 28 else F.adaptive_avg_pool2d(images[:, None], size)[:, 0]
    return DataSet(name, inputs, labels, 10, splits_in_order(len(fit), len(test)), InputScale(divisor=(255.0,)))


def read_rda(path: Path, frame: str, label: str) -> tuple[Tensor, Tensor, int]:
    """One data frame of an R data file: features [N, D] float64, labels [N] int64, number of classes.

    Args:
        path: the file.
        frame: name of the data frame in it.
        label: its factor column; every other column is a numeric feature.

    Raises:
        UserError: the `data` extra is missing, or the file does not hold that.
    """
    try:
        import rdata
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package rdata; run `pip install rlkd[data]`") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a wrong file type: the error that follows says it
            table: Any = rdata.read_rda(path, default_encoding="ascii")[frame]
        codes = np.array(table[label].cat.codes, dtype=np.int64)  # copies: pandas hands out read-only views
        features = np.array(table.drop(columns=label), dtype=np.float64)
        num_classes = len(table[label].cat.categories)
    except (*UNREADABLE, AttributeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(
            f"{path}: not an R data file with a data frame {frame} and a factor {label} ({reason}); fetch it again"
        ) from error
    if not np.isfinite(features).all() or codes.min(initial=0) < 0:
        raise UserError(f"{path}: got missing values; allowed: numbers and a class in every row; fetch the file again")
    return torch.from_numpy(features), torch.from_numpy(codes), num_classes


def mlbench(name: str, frame: str, label: str, num_fit: int) -> DataSet:
    """Load a data set of R's mlbench whose first num_fit rows are the official training part, the others the test part.

    Raises:
        UserError: a missing or broken file, or the missing `data` extra.
    """
    path = find_file(f"{frame}.rda", "mlbench", MLBENCH_FOLDER, "r-cran-mlbench")
    features, codes, num_classes = read_rda(path, frame, label)
    if len(codes) <= num_fit:
        raise UserError(f"{path}: got {len(codes)} rows; allowed: more than {num_fit}; fetch the file again")
    fit, test = choose_rows(num_fit, len(codes) - num_fit)
    rows = torch.cat([fit, test + num_fit])  # [S]
    splits = splits_in_order(len(fit), len(test))
    scale = standard_scale(features[rows], splits["train"])
    return DataSet(name, scale.apply(features[rows]), codes[rows], num_classes, splits, scale)
