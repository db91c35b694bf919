"""Data sets by name, each cut once into train, validation and test.

The split depends on the data set alone, never on a run's seed, so test samples stay unseen when anything is tuned.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.data import files, generated
from rlkd.data.samples import SPLIT_SEED, DataSet, InputScale, Split, standard_scale
from rlkd.errors import UserError, closest


def _digits() -> DataSet:
    """scikit-learn's bundled 1,797 grey 8x8 digits (Alpaydin & Kaynak 1998): 897 / 450 / 450 samples."""
    from sklearn.datasets import load_digits  # here, because a student is loaded without scikit-learn

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float() / 16.0  # [1797, 8, 8]
    labels = torch.from_numpy(bunch.target).long()  # [1797]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, validation, test = order[:897], order[897:1347], order[1347:]
    return DataSet(
        "digits",
        inputs,
        labels,
        10,
        {"train": train, "validation": validation, "test": test},
        InputScale(divisor=(16.0,)),
    )


def _breast_cancer() -> DataSet:
    """scikit-learn's bundled tumours (Street et al. 1993), 30 features, 2 classes: 284 / 142 / 143 samples."""
    from sklearn.datasets import load_breast_cancer

    return _bundled_table("breast_cancer", load_breast_cancer())


def _wine() -> DataSet:
    """scikit-learn's bundled wines (Aeberhard & Forina 1991), 13 features, 3 classes: 89 / 44 / 45 samples."""
    from sklearn.datasets import load_wine

    return _bundled_table("wine", load_wine())


def _bundled_table(name: str, bunch: Any) -> DataSet:
    """Half of the rows train, a quarter each validate and test; features standardised by the train split."""
    labels = torch.from_numpy(bunch.target).long()  # [S]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    half, quarter = len(labels) // 2, len(labels) // 4
    train, validation, test = order[:half], order[half : half + quarter], order[half + quarter :]
    raw = torch.from_numpy(bunch.data)  # [S, D]
    scale = standard_scale(raw, train)
    splits: dict[Split, Tensor] = {"train": train, "validation": validation, "test": test}
    return DataSet(name, scale.apply(raw), labels, len(bunch.target_names), splits, scale)


def _fashion_mnist() -> DataSet:
    """Fashion-MNIST pooled to 14x14, 10 classes: 2,000 / 1,000 / 2,000 samples (Debian: dataset-fashion-mnist)."""
    return files.fashion_mnist("fashion_mnist", 14)


def _fashion_mnist_8x8() -> DataSet:
    """Fashion-MNIST pooled to 8x8, the size of digits, same samples."""
    return files.fashion_mnist("fashion_mnist_8x8", 8)


def _fashion_mnist_28x28() -> DataSet:
    """Fashion-MNIST at full size, same samples."""
    return files.fashion_mnist("fashion_mnist_28x28", 28)


def _letter() -> DataSet:
    """Letter recognition (Frey & Slate 1991), 16 features, 26 classes: 2,000 / 1,000 / 2,000 (Debian: r-cran-mlbench).

    The first 16,000 rows are the authors' training part.
    """
    return files.mlbench("letter", "LetterRecognition", "lettr", 16_000)


def _satellite() -> DataSet:
    """Statlog's Landsat pixels, 36 features, 6 classes: 2,000 / 1,000 / 2,000 samples (Debian: r-cran-mlbench).

    The last 2,000 rows are Statlog's test part. A sample is a window of 3x3 pixels, and windows overlap: six of the
    nine pixels of 60 % of the test windows stand in the training part, too. Accuracies are those within one scene.
    """
    return files.mlbench("satellite", "Satellite", "classes", 4435)


def _generated() -> DataSet:
    """Gaussian clusters, 2,000 / 1,000 / 2,000; generated:seed=0,classes=8,inputs=32,difficulty=0.2 says all parts."""
    return generated.generate(generated.Recipe())


DATASETS: dict[str, Callable[[], DataSet]] = {
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "wine": _wine,
    "fashion_mnist": _fashion_mnist,
    "fashion_mnist_8x8": _fashion_mnist_8x8,
    "fashion_mnist_28x28": _fashion_mnist_28x28,
    "letter": _letter,
    "satellite": _satellite,
    "generated": _generated,
}
_REGISTERED: set[str] = set()  # names that `register_dataset` added


def is_dataset(name: str) -> bool:
    """Whether a name is that of a data set."""
    return name in DATASETS or name.startswith(generated.PREFIX)


def register_dataset(name: str, source: Callable[[], DataSet] | Path | str | Any) -> None:
    """Give a data set a name under which every command and config of this process knows it.

    Args:
        name: letters, digits, `_` and `-`; not one that comes with rlkd.
        source: a function that returns a `DataSet` (called at each use); an .npz file with `inputs` [S, ...] and
            `labels` [S] (and `split` [S]); or arrays: `(inputs, labels)`, or a mapping from train, validation and test
            to such pairs. Inputs are finite numbers and are used as they are, so scale them; labels are whole numbers
            from 0. Splits that are missing are cut 70 : 15 : 15 by content.

    Raises:
        UserError: the name is taken or impossible, or the arrays cannot be used.

    Example:
        >>> import numpy as np
        >>> generator = np.random.default_rng(0)
        >>> inputs = generator.normal(size=(300, 6)).astype("float32")
        >>> register_dataset("halves", (inputs, (inputs[:, 0] > 0).astype(int)))
        >>> load_dataset("halves").num_classes
        2
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"register_dataset: got the name {name!r:.60}; allowed: letters, digits, _ and -")
    if name in DATASETS and name not in _REGISTERED:
        raise UserError(f"register_dataset: {name!r} comes with rlkd; allowed: another name")
    made = source if callable(source) else _of_arrays(name, source)
    DATASETS[name] = made
    _REGISTERED.add(name)


def _of_arrays(name: str, source: Any) -> Callable[[], DataSet]:
    """Return a function that gives the data set of an .npz file or of arrays."""
    from rlkd.data.memory import data_set_of, read_parts  # here, because a student is loaded without readers of files

    data = data_set_of(name, read_parts(source))
    return lambda: data


def check_dataset(name: str, key: str = "task.dataset") -> None:
    """Raise UserError, with the closest match, for a data set that does not exist, without reading files.

    Args:
        name: of the data set.
        key: of the option that named it, for the message.
    """
    if name.startswith(f"{generated.PREFIX}:"):
        generated.parse_name(name)
    elif name not in DATASETS:
        allowed = f"{', '.join(sorted(DATASETS))}, or {generated.PREFIX}:key=value,..."
        raise UserError(f"{key}: got {name!r}; allowed: {allowed}{closest(name, DATASETS)}")


def load_dataset(name: str) -> DataSet:
    """Load the data set called `name`.

    Raises:
        UserError: no such data set, or its files are missing or broken.
    """
    check_dataset(name)
    if name.startswith(f"{generated.PREFIX}:"):
        return generated.generate(generated.parse_name(name))
    data = DATASETS[name]()
    if not isinstance(data, DataSet):
        raise UserError(f"data set {name}: its function returned {type(data).__name__}; allowed: rlkd.DataSet")
    if name in _REGISTERED:
        data.check()
    return data
