"""Data sets that need no network, each cut once into train, validation and test.

The split depends on the data set alone, never on a run's seed: whatever is tuned, test samples stay unseen.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from rlkd.errors import UserError

Split = Literal["train", "validation", "test"]

SPLIT_SEED = 20_260_101


@dataclass(frozen=True)
class DataSet:
    """Samples of one data set and the three disjoint index sets that cut it."""

    name: str
    inputs: Tensor  # [S, *input_shape] float32, in [0, 1]
    labels: Tensor  # [S] int64
    num_classes: int
    splits: dict[Split, Tensor]  # each [S_split] int64, disjoint, together all of S

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.inputs.shape[1:])


def _digits() -> DataSet:
    """scikit-learn's bundled 1,797 grey 8x8 digits (Alpaydin & Kaynak 1998): 897 / 450 / 450 samples."""
    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float() / 16.0  # [1797, 8, 8]
    labels = torch.from_numpy(bunch.target).long()  # [1797]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, validation, test = order[:897], order[897:1347], order[1347:]
    return DataSet("digits", inputs, labels, 10, {"train": train, "validation": validation, "test": test})


DATASETS: dict[str, Callable[[], DataSet]] = {"digits": _digits}


def check_dataset(name: str) -> None:
    """Raises UserError, with the closest match, for a data set that does not exist."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"task.dataset: got {name!r}; allowed: {', '.join(sorted(DATASETS))}{hint}")


def load_dataset(name: str) -> DataSet:
    """The data set called `name`.

    Raises:
        UserError: no such data set.
    """
    check_dataset(name)
    return DATASETS[name]()
