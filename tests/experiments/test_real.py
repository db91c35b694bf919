"""The study of real models: rows of other options are refused, and images are scaled as the train split says."""

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from real import GARMENTS, keep_config, scaled_images

from rlkd.data import Goal
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import make_examples, read_table
from rlkd.errors import UserError
from rlkd.runs.real_methods import RealCompareConfig


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content))


def test_rows_of_other_options_are_refused(tmp_path: Path) -> None:
    config = RealCompareConfig(teacher="teacher", data="data.csv")
    keep_config(config, None, tmp_path)
    keep_config(config, None, tmp_path)
    keep_config(dataclasses.replace(config, methods="plain", num_seeds=9), None, tmp_path)  # more rows of the same
    for other, policy in (
        (dataclasses.replace(config, goal=Goal(keep=0.99)), None),
        (dataclasses.replace(config, cut=dataclasses.replace(config.cut, layers=2)), None),
        (config, Path("policy")),
    ):
        with pytest.raises(UserError, match="rows of a study with other options; give another folder"):
            keep_config(other, policy, tmp_path)


def test_images_have_mean_0_and_deviation_1_on_the_train_split(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    g = np.random.default_rng(0)
    for part, count, least in (("train", 60, 0), ("t10k", 20, 200)):  # the test images are brighter
        images = g.integers(least, 256, (count, 5, 4), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    columns = ColumnConfig(classes=GARMENTS)
    raw = make_examples(read_table(folder, columns), None, GARMENTS, columns)
    scaled = make_examples(read_table(scaled_images(tmp_path), columns), None, GARMENTS, columns)
    assert {name: len(rows) for name, rows in scaled.splits.items()} == {k: len(v) for k, v in raw.splits.items()}
    assert torch.equal(scaled.labels, raw.labels)
    train = scaled.inputs["pixel_values"][scaled.splits["train"]]
    assert float(train.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(train.std()) == pytest.approx(1.0, abs=1e-5)
    assert float(scaled.inputs["pixel_values"][scaled.splits["test"]].mean()) > 0.5
    before = raw.inputs["pixel_values"][raw.splits["test"]][0]
    after = scaled.inputs["pixel_values"][scaled.splits["test"]][0]
    assert float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]) == pytest.approx(1.0)
