"""Folders of IDX files as data of real models."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rlkd.data.idx import is_idx_folder
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import make_examples, read_table
from rlkd.errors import UserError

COLUMNS = ColumnConfig()


def write(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training images gzipped, test images not; the last two training images are copies."""
    g = np.random.default_rng(0)
    for part, count, ending in (("train", 60, ".gz"), ("t10k", 20, "")):
        images = g.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        images[-1] = images[-2]
        write(tmp_path / f"{part}-images-idx3-ubyte{ending}", images)
        write(tmp_path / f"{part}-labels-idx1-ubyte{ending}", (np.arange(count) % 3).astype(np.uint8))
    return tmp_path


def test_images_labels_and_splits(folder: Path) -> None:
    table = read_table(folder, COLUMNS)
    assert table.kind == "array"
    assert table.sources[58] == table.sources[59] != table.sources[57]
    data = make_examples(table, None, ("LABEL_0", "LABEL_1", "LABEL_2"), COLUMNS)
    pixels = data.inputs["pixel_values"]
    assert pixels.shape == (80, 1, 5, 4)
    first = np.random.default_rng(0).integers(0, 256, (60, 5, 4), dtype=np.uint8)[0]
    torch.testing.assert_close(pixels[0, 0], torch.from_numpy(first).float() / 255)
    assert data.labels[:4].tolist() == [0, 1, 2, 0]
    assert data.splits["test"].tolist() == list(range(60, 80))  # the files' own
    assert len(data.splits["train"]) + len(data.splits["validation"]) == 60
    assert 3 <= len(data.splits["validation"]) <= 18  # 15 % by hash of the image


def test_mistakes_are_named(folder: Path) -> None:
    assert not is_idx_folder(folder / "gone")
    write(folder / "t10k-labels-idx1-ubyte", np.zeros(19, np.uint8))
    with pytest.raises(UserError, match=r"got images \[20, 5, 4\] for 19 labels in t10k-\*"):
        read_table(folder, COLUMNS)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        read_table(folder, COLUMNS)
