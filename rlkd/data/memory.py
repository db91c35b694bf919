"""Samples of a real model's task from arrays in memory instead of files."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.data.arrays import read_arrays
from rlkd.data.examples import Examples
from rlkd.data.labels import describe_matches, match_labels
from rlkd.data.layout import split_named
from rlkd.data.samples import DataSet
from rlkd.data.tables import SPLITS, Table, make_splits
from rlkd.errors import UserError


def read_parts(data: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Read inputs [S, ...] and labels [S] of every split, or of "" where no split is named.

    Args:
        data: `(inputs, labels)`, a mapping from train, validation and test to such pairs, a map-style dataset of
            `(input, label)` samples or a mapping to such datasets, or an .npz file of `inputs`, `labels` and perhaps
            `split`.

    Raises:
        UserError: the data are none of these, or hold values that cannot be used.
    """
    if isinstance(data, str | Path):
        data = _of_file(Path(data))
    if isinstance(data, Mapping):
        unknown = sorted(set(map(str, data)) - set(SPLITS))
        if unknown or not data:
            raise UserError(f"data: got the splits {unknown or 'none'}; allowed: {', '.join(SPLITS)}")
        return {split: _pair(data[split], split) for split in SPLITS if split in data}
    return {"": _pair(data, "data")}


def examples_of(parts: Mapping[str, tuple[Tensor, Tensor]], argument: str, num_classes: int, name: str) -> Examples:
    """Make the samples of a classifier; splits that are missing are cut as those of files.

    Args:
        parts: of `read_parts`.
        argument: name of the model's argument that takes the inputs.
        num_classes: C.
        name: of the data, for messages.

    Raises:
        UserError: a label that no class has, or a split without a sample.
    """
    inputs, labels = _joined([part[0] for part in parts.values()]), torch.cat([part[1] for part in parts.values()])
    strangers = ((labels < 0) | (labels >= num_classes)).nonzero()[:, 0]
    if len(strangers):
        raise UserError(
            f"{name}: got label {int(labels[strangers[0]])} at sample {int(strangers[0])} (from 0); allowed: 0 to "
            f"{num_classes - 1}, one for each of the {num_classes} classes"
        )
    splits = [split for split, part in parts.items() for _ in range(len(part[1]))]
    sources = [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest() for row in inputs]
    table = Table(name, "array", inputs.numpy(), labels.tolist(), sources, splits if splits[0] else None)
    places = [(name, row + 1) for row in range(len(labels))]
    classes, matches = match_labels(table.labels, [str(i) for i in range(num_classes)], places, classes=None)
    chosen, notes = make_splits(table)
    report = "\n".join([f"samples: {len(labels)} used", *notes, "", describe_matches(matches)])
    return Examples(name, {argument: inputs}, classes, num_classes, chosen, report=report)


def data_set_of(name: str, parts: Mapping[str, tuple[Tensor, Tensor]]) -> DataSet:
    """Make a data set for tiny students of arrays; classes are 0 to the largest label.

    Args:
        name: of the data set.
        parts: of `read_parts`.

    Raises:
        UserError: fewer than two classes, a negative label, or a split without a sample.
    """
    labels = torch.cat([part[1] for part in parts.values()])
    num_classes = int(labels.max()) + 1
    if int(labels.min()) < 0 or num_classes < 2:
        raise UserError(
            f"{name}: got labels {int(labels.min())} to {num_classes - 1}; allowed: 0 to C - 1, C at least 2"
        )
    examples = examples_of(parts, "inputs", num_classes, name)
    return DataSet(name, examples.inputs["inputs"].float(), examples.labels, num_classes, examples.splits)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise UserError(f"data: got samples of shapes {sorted(shapes)}; allowed: one shape")
    return torch.cat(list(parts))


def _pair(given: Any, split: str) -> tuple[Tensor, Tensor]:
    """Return inputs [S, ...] and labels [S] of one part; `split` is "data" where no split is named."""
    where = "data" if split == "data" else f"data: {split}"
    if not isinstance(given, tuple | list) and hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        given = _of_dataset(given, split)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UserError(
            f"data: got {type(given).__name__} for {split}; allowed: (inputs, labels), a dataset of such samples, or a "
            "mapping from train, validation and test to them"
        )
    try:
        inputs, labels = torch.as_tensor(given[0]).detach().cpu(), torch.as_tensor(given[1]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: inputs and labels are no arrays of numbers ({error!s:.80}); give numbers, labels as 0 to C - 1"
        ) from error
    are_numbers = not (inputs.is_complex() or labels.is_complex() or labels.is_floating_point())
    if not (are_numbers and labels.ndim == 1 and inputs.ndim and 0 < len(labels) == len(inputs)):
        raise UserError(
            f"{where}: got inputs {list(inputs.shape)} and labels {list(labels.shape)} of {inputs.dtype} and "
            f"{labels.dtype}; allowed: [samples, ...] real and [samples] whole numbers"
        )
    is_whole = not inputs.is_floating_point() and inputs.dtype not in (torch.bool, torch.uint8)
    inputs = inputs.long() if is_whole else inputs.float()
    finite = torch.isfinite(inputs.float()).flatten(1).all(1)  # [S]
    if not bool(finite.all()):
        raise UserError(
            f"{where}: got inputs that are not finite in {int((~finite).sum())} samples, the first at "
            f"{int((~finite).nonzero()[0])} (from 0); remove or replace them"
        )
    return inputs, labels.long()


def _of_file(path: Path) -> Any:
    """Return inputs and labels of an .npz file, by splits where it names them."""
    if path.suffix.lower() != ".npz":
        raise UserError(f"data: got {path}; allowed for a module of your own: arrays in memory, or an .npz file")
    arrays = read_arrays(path)
    if arrays.splits is None:
        return arrays.inputs, arrays.labels
    rows: dict[str, list[int]] = {}
    for row, own in enumerate(arrays.splits):
        rows.setdefault(split_named(str(own)) or str(own), []).append(row)
    return {split: (arrays.inputs[some], [arrays.labels[row] for row in some]) for split, some in rows.items()}


def _of_dataset(dataset: Any, split: str) -> tuple[Tensor, Tensor]:
    """Stack the samples of a map-style dataset."""
    try:
        samples = [dataset[i] for i in range(len(dataset))]
        inputs = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
        return inputs, torch.stack([torch.as_tensor(sample[1]) for sample in samples])
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise UserError(
            f"data: {split}: its samples are no (input, label) pairs of one shape ({error!s:.60})"
        ) from error
