"""A user's own data for real models: CSV, JSON lines, Parquet, arrays, IDX files, or a folder of images.

Splits are the ones given (files or folders called train, validation, test, or a column), else cut once by a hash
of each sample's source, so that one source never stands on both sides and no run's seed moves a sample.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.data.examples import Examples
from rlkd.data.idx import is_idx_folder, read_idx_folder
from rlkd.data.samples import Split
from rlkd.errors import UserError
from rlkd.io.files import opened

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SHARES = (0.7, 0.85)  # hashes below these, as shares of their range, are train and validation; the rest is test
OTHER_NAMES = {"val": "validation", "dev": "validation", "valid": "validation"}


@dataclass(frozen=True)
class ColumnConfig:
    """Which columns of a table mean what."""

    text: str = "text"
    """Column of the texts (tables)."""
    pair: str | None = None
    """Column of second texts, for pairs."""
    prompt: str | None = None
    """Language models: column of what stands before a text, is given to the model and is not learned."""
    label: str = "label"
    """Column of the labels."""
    source: str | None = None
    """Column of where a sample comes from; samples of one source stay in one split. By default a column called
    `source` where there is one, else a sample is its own source: copies of one text or image stay together."""
    split: str = "split"
    """Column with train, validation or test, where there is one."""
    max_length: int = 128
    """Tokens that longer texts are cut to; language models learn a longer document in pieces of this length."""

    def check(self) -> None:
        """Raises UserError for a text without a token."""
        if self.max_length < 2:
            raise UserError(f"columns.max_length: got {self.max_length}; allowed: at least 2")


@dataclass(frozen=True)
class Table:
    """Rows as they were read."""

    name: str
    kind: str  # "text", "image" or "array"
    samples: Sequence[Any] | NDArray[Any]  # texts, pairs of texts, images, or rows of an array
    labels: list[int] | list[str]
    sources: list[str]
    splits: list[str] | None  # one a row; None: to be cut


def split_of(source: str) -> Split:
    """The split of a source: 70 % of all sources train, 15 % validate, 15 % test."""
    share = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return SPLITS[sum(share >= limit for limit in SHARES)]


def read_table(path: Path, columns: ColumnConfig) -> Table:
    """Read a file, a folder of files called after their splits, of IDX files, or of images in a folder a class.

    Raises:
        UserError: no such path, an unknown format, a missing column, or the missing extra.
    """
    columns.check()
    if not path.exists():
        raise UserError(
            f"{path}: no such data; give a {', '.join(READERS)} or .npz file, or a folder of files, images or IDX files"
        )
    if path.suffix == ".npz":
        return _read_arrays(path)
    if is_idx_folder(path):
        return Table(path.name, "array", *read_idx_folder(path))
    files = table_files(path)
    if files:
        return _read_columns(path, files, columns)
    if path.is_dir():
        return _read_images(path)
    raise UserError(f"{path}: got a {path.suffix or 'nameless'} file; allowed: {', '.join(READERS)}, .npz or a folder")


def encode_labels(table: Table, label2id: Mapping[str, int] | None) -> Tensor:
    """Class numbers [S] int64, as the teacher counts them.

    Args:
        table: labels are numbers from 0, or names.
        label2id: the teacher's own names; names that are none of them are an error unless the teacher has none
            (LABEL_0, LABEL_1, ...), then names are numbered in alphabetical order.

    Raises:
        UserError: a label that no class has.
    """
    num_classes = len(label2id) if label2id else None
    if all(isinstance(label, int) for label in table.labels):
        numbers = torch.tensor(table.labels, dtype=torch.int64)
        if numbers.min() < 0 or (num_classes is not None and int(numbers.max()) >= num_classes):
            raise UserError(
                f"{table.name}: got labels from {int(numbers.min())} to {int(numbers.max())}; allowed: 0 to "
                f"{(num_classes or 1) - 1}, the teacher's classes"
            )
        return numbers
    names = sorted({str(label) for label in table.labels})
    known = dict(label2id or {})
    if not known or all(name.startswith("LABEL_") for name in known):
        if num_classes is not None and len(names) > num_classes:
            raise UserError(f"{table.name}: got {len(names)} labels; allowed: {num_classes}, the teacher's classes")
        known = {name: i for i, name in enumerate(names)}
    lower = {name.lower(): number for name, number in known.items()}
    for name in names:
        if name.lower() not in lower:
            raise UserError(f"{table.name}: got label {name!r}; allowed: {', '.join(known)}, the teacher's classes")
    return torch.tensor([lower[str(label).lower()] for label in table.labels])


def make_examples(
    table: Table, processor: Any, label2id: Mapping[str, int] | None, num_classes: int, columns: ColumnConfig
) -> Examples:
    """Tokenised texts, processed images or arrays as they are.

    Args:
        table: of `read_table`.
        processor: the tokenizer or image processor that stands beside the model; unused for arrays.
        label2id: as in `encode_labels`.
        num_classes: C of the teacher.
        columns: gives the length that texts are cut to.

    Raises:
        UserError: a split without a sample.
    """
    labels = encode_labels(table, label2id)
    if table.kind == "text":
        inputs = _tokenise(list(table.samples), processor, columns.max_length)
    elif table.kind == "image":
        done = processor(images=[image.convert("RGB") for image in table.samples], return_tensors="pt")
        inputs = {"pixel_values": done["pixel_values"].float()}  # [S, 3, H, W]
    else:
        values = torch.from_numpy(np.ascontiguousarray(table.samples))
        inputs = {"pixel_values" if values.ndim == 4 else "inputs": values.float()}
    return Examples(table.name, inputs, labels, num_classes, make_splits(table))


def _tokenise(samples: Sequence[Any], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    """Right-padded to the longest text, at most `max_length`."""
    is_pair = isinstance(samples[0], tuple)
    texts = ([a for a, _ in samples], [b for _, b in samples]) if is_pair else (list(samples),)
    done = tokenizer(
        *texts, truncation=True, max_length=max_length, padding="longest", padding_side="right", return_tensors="pt"
    )
    return {name: done[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in done}


def make_splits(table: Table) -> dict[Split, Tensor]:
    """Rows of every split, as given, else cut by source.

    Raises:
        UserError: an unknown split, or one without a sample.
    """
    given: Sequence[str] = table.splits if table.splits is not None else [split_of(s) for s in table.sources]
    names = [OTHER_NAMES.get(name, name) for name in given]
    unknown = sorted(set(names) - set(SPLITS))
    if unknown:
        raise UserError(f"{table.name}: got split {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    if "validation" not in names and table.splits is not None:
        names = _cut_validation(names, table.sources)
    splits = {
        split: torch.tensor([i for i, n in enumerate(names) if n == split], dtype=torch.int64) for split in SPLITS
    }
    for split, index in splits.items():
        if not len(index):
            raise UserError(f"{table.name}: no sample is in the {split} split; give more sources, or a split column")
    return splits


def _cut_validation(names: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Where only train and test are given, sources of train whose hash says validation become validation."""
    return [
        "validation" if name == "train" and split_of(source) == "validation" else name
        for name, source in zip(names, sources, strict=True)
    ]


def table_files(path: Path) -> dict[str, Path]:
    """Table files by split, or one under "" for all."""
    if path.is_file():
        return {"": path} if path.suffix in READERS else {}
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        split = OTHER_NAMES.get(file.stem, file.stem)
        if file.suffix in READERS and split in SPLITS:
            found[split] = file
    return found


def _read_columns(path: Path, files: Mapping[str, Path], columns: ColumnConfig) -> Table:
    rows: dict[str, list[Any]] = {"sample": [], "label": [], "source": [], "split": []}
    source = columns.source
    for split, file in files.items():
        options = {"sep": "\t"} if file.suffix == ".tsv" else {}
        part = load_rows(file, READERS[file.suffix], data_files=str(file), **options)
        for name in (columns.text, columns.label, *filter(None, (columns.pair, source))):
            if name not in part.column_names:
                raise UserError(f"{file}: no column {name!r}; it has {', '.join(part.column_names)} (--columns.*)")
        texts, labels = part[columns.text], part[columns.label]
        pairs = part[columns.pair] if columns.pair else None
        samples = list(zip(texts, pairs, strict=True)) if pairs is not None else list(texts)
        by = source or ("source" if "source" in part.column_names else None)
        rows["sample"] += samples
        rows["label"] += list(labels)
        rows["source"] += [str(s) for s in (part[by] if by else samples)]
        if split:
            rows["split"] += [split] * len(samples)
        elif columns.split in part.column_names:
            rows["split"] += [str(s) for s in part[columns.split]]
    if any(value is None for name in ("sample", "label") for value in rows[name]):
        raise UserError(f"{path}: a row has no text or no label; remove it")
    labels = [label if isinstance(label, int) else str(label) for label in rows["label"]]
    return Table(path.stem, "text", rows["sample"], labels, rows["source"], rows["split"] or None)


def _read_images(path: Path) -> Table:
    """CLASS/image files, or SPLIT/CLASS/image files."""
    data = load_rows(path, "imagefolder", data_dir=str(path), split=None)
    samples, labels, sources, splits = [], [], [], []
    for split, part in data.items():
        if "label" not in part.column_names:
            raise UserError(f"{path}: no folder a class was found; allowed: CLASS/IMAGE or train/CLASS/IMAGE, test/...")
        names = part.features["label"].names
        for row in part:
            samples.append(row["image"])
            labels.append(names[row["label"]])
            sources.append(hashlib.sha256(row["image"].tobytes()).hexdigest())
            splits.append(str(split))
    return Table(path.name, "image", samples, labels, sources, splits if len(data) > 1 else None)


def _read_arrays(path: Path) -> Table:
    """`inputs` [S, ...] and `labels` [S], optionally `source` [S] and `split` [S]; no pickles."""
    try:
        with opened(path) as (raw, _), np.load(raw, allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = dict(file)
        inputs, labels = arrays["inputs"], arrays["labels"]
        if min(inputs.ndim, labels.ndim) < 1:
            raise ValueError("a single value")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not arrays `inputs` and `labels` ({error!s:.80})") from error
    if len(inputs) != len(labels) or not len(labels):
        raise UserError(f"{path}: got {len(inputs)} inputs for {len(labels)} labels; allowed: as many, at least one")
    given = arrays.get("source")
    sources = [hashlib.sha256(row.tobytes()).hexdigest() for row in inputs] if given is None else given.tolist()
    splits = arrays["split"].tolist() if "split" in arrays else None
    return Table(path.stem, "array", inputs, labels.tolist(), [str(s) for s in sources], splits)


def load_rows(path: Path, reader: str, split: str | None = "train", **options: Any) -> Any:
    """`datasets.load_dataset` on local files; its many exceptions become one line."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package datasets; run `pip install 'rlkd[hf]'`") from error
    were_disabled = datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        return datasets.load_dataset(reader, split=split, **options)
    except Exception as error:  # whatever its readers raise, the file is at fault
        cause = error.__cause__ or error
        raise UserError(f"{path}: cannot be read as {reader} ({' '.join(str(cause).split())[:120]})") from error
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
