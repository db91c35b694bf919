"""A user's own data for real models: tables, arrays, IDX files or a folder of images, all as one `Table`.

Splits are the ones given (files or folders called train, validation, test, or a column), else cut once by a hash
of each sample's source, so that one source never stands on both sides and no run's seed moves a sample. docs/data.md
has the table of what is accepted.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.data.arrays import read_arrays
from rlkd.data.examples import Examples
from rlkd.data.idx import is_idx_folder, read_idx_folder
from rlkd.data.images import has_images, read_images
from rlkd.data.labels import Place, describe_matches, match_labels
from rlkd.data.layout import find_files, split_named
from rlkd.data.readers import COMPRESSIONS, FORMATS, METADATA, is_hidden, is_table, table_format, walk
from rlkd.data.rows import ColumnConfig, Rows, clean_source, read_rows
from rlkd.data.samples import Split
from rlkd.data.tally import Tally
from rlkd.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SHARES = (0.7, 0.85)  # hashes below these, as shares of their range, are train and validation; the rest is test
IMAGES_AT_ONCE = 64
Kind = Literal["text", "image", "array", "document"]


@dataclass(frozen=True)
class Table:
    """S rows as they were read."""

    name: str
    kind: Kind
    samples: Sequence[Any] | NDArray[Any]  # texts, pairs of texts, images, or rows of an array
    labels: list[Any]
    sources: list[str]
    splits: list[str] | None  # one a row; None: to be cut
    places: Sequence[Place] = ()  # where each row stands, for messages
    tallies: tuple[Tally, ...] = ()  # what was seen, used and left out
    notes: tuple[str, ...] = ()  # what else a user should know of the reading

    def lines(self) -> list[str]:
        """Return the lines to print of the reading: numbers seen, used and left out, and notes."""
        return [line for tally in self.tallies for line in tally.lines()] + [f"note: {note}" for note in self.notes]

    def place(self, row: int) -> Place:
        """Where a row stands."""
        return self.places[row] if self.places else (self.name, row + 1)


def split_of(source: str) -> Split:
    """Return the split of a source: 70 % of all sources train, 15 % validate, 15 % test."""
    return SPLITS[sum(_share(source) >= limit for limit in SHARES)]


def _share(source: str) -> float:
    """Return a number in [0, 1) that depends on the source alone."""
    return int.from_bytes(hashlib.sha256(source.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64


def read_table(path: Path, columns: ColumnConfig, wanted: Kind | None = None) -> Table:
    """Read a file, or a folder of tables, of IDX files, or of images in a folder a class.

    Args:
        path: of the data.
        columns: which columns mean what.
        wanted: "text" or "image" tells what a folder that holds tables and images is read as; by default tables.

    Raises:
        UserError: no such path, an unknown format, a missing column, a row that cannot be used, or the missing extra.
    """
    columns.check()
    if not path.exists():
        raise UserError(f"{path}: no such data; give {_allowed()}")
    if path.suffix.lower() == ".npz":
        return _array_table(path)
    if is_idx_folder(path):
        inputs, labels, sources, splits = read_idx_folder(path)
        tally = Tally("images", len(labels))
        return Table(path.name, "array", inputs, labels, sources, splits, tallies=(tally,))
    if path.is_dir() and has_images(path) and (wanted == "image" or not has_tables(path)):
        return _image_table(path, columns)
    files, tally = table_files(path)
    rows = read_rows(files, columns, columns.pair, has_labels=True)
    return table_of_rows(path, "text", rows, samples=rows.texts if columns.pair is None else rows.pairs(), tally=tally)


def table_of_rows(path: Path, kind: Kind, rows: Rows, *, samples: Sequence[Any], tally: Tally) -> Table:
    """Build the table of the rows of one file, or of the files of a folder that `tally` counts."""
    return Table(
        name=path.name if path.is_dir() else path.name.split(".")[0] or path.name,
        kind=kind,
        samples=samples,
        labels=rows.labels,
        sources=rows.sources,
        splits=[split for split in rows.splits if split is not None] or None,
        places=rows.places,
        tallies=(*([tally] if path.is_dir() else []), rows.tally),
        notes=tuple(rows.notes),
    )


def _allowed() -> str:
    formats = f"{', '.join(FORMATS)} (also {', '.join(COMPRESSIONS)})"
    return f"a {formats} or .npz file, or a folder of tables, images or IDX files"


def has_tables(folder: Path) -> bool:
    """Whether a table stands anywhere in a folder."""
    names = (path for path in walk(folder) if table_format(path.name) and not is_hidden(path.relative_to(folder)))
    return any(path.name.lower() not in METADATA for path in names)


def table_files(path: Path) -> tuple[list[tuple[Split | None, Path]], Tally]:
    """Table files with the splits that their names tell, or the one file that was given, and what was seen.

    Raises:
        UserError: there is none.
    """
    tally = Tally("files")
    if path.is_dir():
        found = find_files(path, is_table, "tables", tally)
        if not found:
            raise UserError(f"{path}: holds no table and no image in a class folder; give {_allowed()}")
        return found, tally
    if not is_table(path.name):
        hint = "; save it as CSV" if path.suffix.lower() in (".xlsx", ".xls", ".ods") else ""
        raise UserError(f"{path}: got a {path.suffix or 'nameless'} file; give {_allowed()}{hint}")
    tally.use()
    return [(None, path)], tally


def _image_table(path: Path, columns: ColumnConfig) -> Table:
    found = read_images(path, is_skipping=columns.broken == "skip")
    places = [(str(file), 0) for file in found.paths]
    return Table(
        name=path.name,
        kind="image",
        samples=found.images,
        labels=found.labels,
        sources=found.sources,
        splits=found.splits,
        places=places,
        tallies=(found.tally,),
        notes=tuple(found.notes),
    )


def _array_table(path: Path) -> Table:
    arrays = read_arrays(path)
    places = [(str(path), row) for row in range(1, len(arrays.labels) + 1)]
    splits = arrays.splits
    for place, name in zip(places, splits or [], strict=False):
        if not isinstance(name, str) or split_named(name) is None:
            raise UserError(f"{path}: row {place[1]}: got split {name!r:.40}; allowed: {', '.join(SPLITS)}")
    sources = []
    for place, cell in zip(places, arrays.sources, strict=True):
        source = clean_source(cell, place, "source")
        if source is None:
            raise UserError(f"{path}: row {place[1]}: has no source; allowed: a text or a whole number")
        sources.append(source)
    tally = Tally("rows", len(places))
    return Table(path.stem, "array", arrays.inputs, arrays.labels, sources, splits, places, (tally,))


def make_examples(table: Table, processor: Any, names: Sequence[str], columns: ColumnConfig) -> Examples:
    """Tokenised texts, processed images or arrays as they are.

    Args:
        table: of `read_table`.
        processor: the tokenizer or image processor that stands beside the model; unused for arrays.
        names: C names of the model's classes, of `rlkd.data.labels.class_names`.
        columns: gives the length that texts are cut to and the names of numbered classes.

    Raises:
        UserError: a label that no class has, or a split without a sample.
    """
    places = [table.place(row) for row in range(len(table.labels))]
    labels, matches = match_labels(table.labels, names, places, classes=columns.classes)
    splits, notes = make_splits(table)
    if table.kind == "text":
        inputs = _tokenise(list(table.samples), processor, columns.max_length)
    elif table.kind == "image":
        inputs = {"pixel_values": _pixels(table.samples, processor)}
    else:
        values = torch.from_numpy(np.ascontiguousarray(table.samples))
        inputs = {"pixel_values" if values.ndim == 4 else "inputs": values.float()}
    report = "\n".join([*table.lines(), *notes, "", describe_matches(matches)])
    return Examples(table.name, inputs, labels, len(names), splits, report=report)


def _tokenise(samples: Sequence[Any], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    """Right-padded to the longest text, at most `max_length`."""
    is_pair = isinstance(samples[0], tuple)
    texts = ([a for a, _ in samples], [b for _, b in samples]) if is_pair else (list(samples),)
    done = tokenizer(
        *texts, truncation=True, max_length=max_length, padding="longest", padding_side="right", return_tensors="pt"
    )
    return {name: done[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in done}


def _pixels(images: Sequence[Any] | NDArray[Any], processor: Any) -> Tensor:
    """[S, channels, H, W] float32."""
    parts = []
    for start in range(0, len(images), IMAGES_AT_ONCE):
        done = processor(images=list(images[start : start + IMAGES_AT_ONCE]), return_tensors="pt")
        parts.append(done["pixel_values"].float())
    return torch.cat(parts)


def make_splits(table: Table) -> tuple[dict[Split, Tensor], list[str]]:
    """Rows of every split, as given, else cut by source, and lines that say so.

    Where train alone is given it is cut as if no split were; without validation a part of train becomes validation,
    without test a half of validation becomes test.

    Raises:
        UserError: an unknown split, no train split, or a split without a sample.
    """
    names = [split_of(s) for s in table.sources]
    note = "no splits were given: sources were cut 70 : 15 : 15 by their hash"
    if table.splits is not None:
        names, note = _given_splits(table)
    splits = {
        split: torch.tensor([i for i, n in enumerate(names) if n == split], dtype=torch.int64) for split in SPLITS
    }
    for split, index in splits.items():
        if not len(index):
            raise UserError(f"{table.name}: no sample is in the {split} split; give more sources, or a split column")
    sizes = ", ".join(f"{split} {len(index)}" for split, index in splits.items())
    return splits, [f"splits: {sizes} ({note})"]


def _given_splits(table: Table) -> tuple[list[Split], str]:
    """Return the split of every row, cutting missing splits from the others, and a line that reports it."""
    named = [(split_named(name), name) for name in table.splits or []]
    unknown = sorted({name for split, name in named if split is None})
    if unknown:
        raise UserError(f"{table.name}: got split {unknown[0]!r:.40}; allowed: {', '.join(SPLITS)}")
    names = [split for split, _ in named if split is not None]
    given = set(names)
    if "train" not in given:
        raise UserError(f"{table.name}: no sample is in the train split; it has {', '.join(sorted(given))} only")
    if given == {"train"}:
        return [split_of(s) for s in table.sources], "train alone was given: its sources were cut 70 : 15 : 15 by hash"
    if "validation" not in given:
        cut: list[Split] = [
            "validation" if name == "train" and split_of(source) == "validation" else name
            for name, source in zip(names, table.sources, strict=True)
        ]
        return cut, "no validation split was given: sources of train whose hash says so became validation"
    if "test" not in given:
        cut = [
            "test" if name == "validation" and _share(source) >= 0.5 else name
            for name, source in zip(names, table.sources, strict=True)
        ]
        return cut, "no labelled test split was given: about half of the sources of validation became test"
    return list(names), "as given"
