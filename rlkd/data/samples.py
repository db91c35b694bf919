"""What every data set is: samples, labels and three disjoint splits that no run's seed can move."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from rlkd.errors import UserError

Split = Literal["train", "validation", "test"]

SPLIT_SEED = 20_260_101
MOST_SAMPLES: dict[Split, int] = {"train": 2000, "validation": 1000, "test": 2000}
"""Larger sources are cut to these: tiny students learn from at most some hundred labels in 180 steps."""
MOST_DEVIATIONS = 4.0


class Labelled(Protocol):
    """What tasks are drawn from: `DataSet`, or a real model's `Examples`."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def labels(self) -> Tensor:
        """[S] int64."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def splits(self) -> dict[Split, Tensor]:
        """Disjoint index sets, each [S_split] int64."""


@dataclass(frozen=True)
class InputScale:
    """How raw inputs become what a student takes: (raw - offset) / divisor, then bounded to +-limit."""

    offset: tuple[float, ...] = (0.0,)  # one for all inputs, or one for each
    divisor: tuple[float, ...] = (1.0,)
    limit: float | None = None  # None: not bounded

    def apply(self, raw: Tensor) -> Tensor:
        """Return float32 inputs [S, ...] of raw ones."""
        offset, divisor = (torch.tensor(part, dtype=torch.float64) for part in (self.offset, self.divisor))
        scaled = (raw.double() - offset) / divisor
        return (scaled if self.limit is None else scaled.clamp(-self.limit, self.limit)).float()


@dataclass(frozen=True)
class DataSet:
    """Samples of one data set and the three disjoint index sets that cut it."""

    name: str
    """Name of the data set, for messages and reports."""
    inputs: Tensor
    """[S, ...] float32, finite, scaled by `scale`."""
    labels: Tensor
    """[S] int64, classes from 0 to C - 1."""
    num_classes: int
    """C, at least 2."""
    splits: dict[Split, Tensor]
    """Numbers of the samples of train, validation and test, each [S_split] int64; the three share no sample."""
    scale: InputScale = field(default_factory=InputScale)
    """How `inputs` were made of the source's values; it is shipped with a student."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.inputs.shape[1:])

    def check(self) -> None:
        """Raise UserError for tensors of other shapes, types or ranges, or splits that are missing or overlap."""
        shapes = f"inputs {list(self.inputs.shape)} of {self.inputs.dtype}, labels {list(self.labels.shape)} of "
        if (
            (self.inputs.dtype, self.labels.dtype) != (torch.float32, torch.int64)
            or self.labels.ndim != 1
            or self.inputs.ndim < 2
            or len(self.inputs) != len(self.labels)
        ):
            raise UserError(
                f"data set {self.name}: got {shapes}{self.labels.dtype}; allowed: [samples, ...] of torch.float32, "
                "[samples] of torch.int64"
            )
        if not bool(self.inputs.isfinite().all()):
            raise UserError(f"data set {self.name}: got inputs that are not finite; remove or replace them")
        if self.num_classes < 2 or bool(((self.labels < 0) | (self.labels >= self.num_classes)).any()):
            raise UserError(
                f"data set {self.name}: got num_classes {self.num_classes} and labels {int(self.labels.min())} to "
                f"{int(self.labels.max())}; allowed: at least 2, and labels from 0 to num_classes - 1"
            )
        self._check_splits()

    def _check_splits(self) -> None:
        if set(self.splits) != set(MOST_SAMPLES) or not all(len(index) for index in self.splits.values()):
            sizes = ", ".join(f"{split} {len(index)}" for split, index in self.splits.items())
            raise UserError(
                f"data set {self.name}: got splits with {sizes or 'nothing'}; allowed: samples in each of train, "
                "validation and test"
            )
        chosen = torch.cat(list(self.splits.values()))
        is_inside = chosen.dtype == torch.int64 and bool(((chosen >= 0) & (chosen < len(self.labels))).all())
        if not is_inside or len(set(chosen.tolist())) < len(chosen):
            raise UserError(
                f"data set {self.name}: got splits of other numbers than 0 to {len(self.labels) - 1}, or a sample "
                "twice; allowed: each sample's number (int64) once"
            )


def choose_rows(num_fit: int, num_test: int) -> tuple[Tensor, Tensor]:
    """Which rows of a source that has a test part of its own are used, at most MOST_SAMPLES a split.

    Args:
        num_fit: rows that train and validation are drawn from, without repetition.
        num_test: rows of the source's own test part.

    Returns:
        [train + validation] rows of the first part, the train split's first, and [test] rows of the second part, both
        shuffled by SPLIT_SEED.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    fit = torch.randperm(num_fit, generator=generator)[: MOST_SAMPLES["train"] + MOST_SAMPLES["validation"]]
    return fit, torch.randperm(num_test, generator=generator)[: MOST_SAMPLES["test"]]


def splits_in_order(num_fit: int, num_test: int) -> dict[Split, Tensor]:
    """Return splits of samples in the order train, validation, test; two thirds of num_fit are train."""
    num_train = 2 * num_fit // 3
    order = torch.arange(num_fit + num_test)
    return {"train": order[:num_train], "validation": order[num_train:num_fit], "test": order[num_fit:]}


def standard_scale(values: Tensor, train: Tensor) -> InputScale:
    """Return the scale by which features have mean 0 and deviation 1 over the train split, within MOST_DEVIATIONS.

    Args:
        values: [S, D].
        train: [S_train] int64; the numbers come from these samples alone, so test data shape nothing.
    """
    seen = values[train].double()
    # A feature that never changes in training says nothing: it becomes 0, or the bound where a test sample differs.
    deviation = seen.std(dim=0).clamp_min(1e-6)
    return InputScale(tuple(seen.mean(dim=0).tolist()), tuple(deviation.tolist()), MOST_DEVIATIONS)
