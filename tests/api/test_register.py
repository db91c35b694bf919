"""Data sets are registered from arrays, files and functions, and refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import points

import rlkd
from rlkd.cli.main import main
from rlkd.data import load_dataset
from rlkd.data.memory import read_parts
from rlkd.errors import UserError


def test_data_sets_are_registered_from_arrays_files_and_functions(tmp_path: Path) -> None:
    inputs, labels = points()
    rlkd.register_dataset("two_halves", (inputs, labels))
    first = load_dataset("two_halves")
    assert first.num_classes == 2
    assert sum(len(index) for index in first.splits.values()) == len(labels)
    np.savez(
        tmp_path / "own.npz",
        inputs=inputs.numpy(),
        labels=labels.numpy(),
        split=["train"] * 200 + ["validation"] * 20 + ["test"] * 20,
    )
    rlkd.register_dataset("from_file", tmp_path / "own.npz")
    assert [len(index) for index in load_dataset("from_file").splits.values()] == [200, 20, 20]
    rlkd.register_dataset("made", lambda: first)
    assert load_dataset("made") is first
    assert main(["list"]) == 0  # a function without a docstring has a line, too
    with pytest.raises(UserError, match="comes with rlkd"):
        rlkd.register_dataset("digits", (inputs, labels))
    with pytest.raises(UserError, match=r"got the name 3; allowed: letters"):
        rlkd.register_dataset(3, (inputs, labels))  # type: ignore[arg-type]
    rlkd.register_dataset("broken", lambda: 3)
    with pytest.raises(UserError, match=r"returned int; allowed: rlkd\.DataSet"):
        load_dataset("broken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.zeros(9, 2, dtype=torch.float64)}, r"got inputs \[9, 2\] of torch.float64, labels \[9\]"),
        ({"inputs": torch.zeros(9)}, r"got inputs \[9\] of torch.float32"),
        ({"inputs": torch.zeros(8, 2)}, r"allowed: \[samples, ...\] of torch.float32, \[samples\] of torch.int64"),
        ({"inputs": torch.full((9, 2), torch.nan)}, "not finite"),
        (
            {"labels": torch.arange(9) % 4},
            "got num_classes 3 and labels 0 to 3; allowed: at least 2, and labels from 0",
        ),
        ({"splits": {"train": torch.arange(9)}}, "got splits with train 9; allowed: samples in each of train, valid"),
        ({"splits": {k: torch.arange(3) for k in ("train", "validation", "test")}}, "or a sample twice"),
        (
            {"splits": {"train": torch.arange(7), "validation": torch.tensor([7]), "test": torch.tensor([9])}},
            "than 0 to 8",
        ),
    ],
)
def test_a_function_that_returns_other_tensors_is_refused(changes: dict[str, object], message: str) -> None:
    splits = {"train": torch.arange(5), "validation": torch.tensor([5, 6]), "test": torch.tensor([7, 8])}
    parts = {"name": "own", "inputs": torch.zeros(9, 2), "labels": torch.arange(9) % 3, "num_classes": 3}
    data = rlkd.DataSet(**{**parts, "splits": splits, **changes})  # type: ignore[arg-type]
    rlkd.register_dataset("other_tensors", lambda: data)
    with pytest.raises(UserError, match=f"data set own: .*{message}"):
        load_dataset("other_tensors")


def test_arrays_of_a_file_have_the_splits_that_it_names(tmp_path: Path) -> None:
    inputs, labels = np.arange(12, dtype=np.float32)[:, None], np.arange(12) % 2
    np.savez(tmp_path / "mine.npz", inputs=inputs, labels=labels, split=["train"] * 6 + ["val"] * 3 + ["test"] * 3)
    parts = read_parts(tmp_path / "mine.npz")
    assert {split: part[0][:, 0].tolist() for split, part in parts.items()} == {
        "train": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        "validation": [6.0, 7.0, 8.0],
        "test": [9.0, 10.0, 11.0],
    }
    assert parts["test"][1].tolist() == [1, 0, 1]
    np.savez(tmp_path / "whole.npz", inputs=inputs, labels=labels)
    assert list(read_parts(str(tmp_path / "whole.npz"))) == [""]
    np.savez(tmp_path / "odd.npz", inputs=inputs, labels=labels, split=["fold 1"] * 12)
    with pytest.raises(UserError, match=r"data: got the splits \['fold 1'\]; allowed: train"):
        read_parts(tmp_path / "odd.npz")
    with pytest.raises(UserError, match=r"data: got .*mine.csv; allowed for a module of your own: arrays in memory"):
        read_parts("mine.csv")
