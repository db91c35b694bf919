"""Turn the columns of table files into rows whose cells were checked: texts, labels, sources and splits.

Cells are not converted to text: text columns must hold texts, source columns texts or whole numbers. Every row
is used, or is left out and counted, or the data are refused with its place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from rlkd.data.labels import NumberedName, Place, is_missing, say_place
from rlkd.data.layout import split_named
from rlkd.data.readers import read_columns
from rlkd.data.samples import Split
from rlkd.data.tally import Tally
from rlkd.errors import UserError

NO_LABEL = -1  # what public data sets write for a label that is kept secret


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
    classes: list[str] | None = None
    """Names of the numbers 0, 1, ...: needed where the labels are numbers and the teacher's classes have names, or the
    teacher's classes are called LABEL_0, LABEL_1, ... and the labels have names."""
    source: str | None = None
    """Column of where a sample comes from; samples of one source stay in one split. By default a column called
    `source` where there is one, else a sample is its own source: copies of one text or image stay together."""
    split: str = "split"
    """Column with train, validation or test, where there is one."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What happens to rows without a text or a label and to images that cannot be read: the data are refused with the
    first one's place, or such samples are left out, counted and named."""
    max_length: int = 128
    """Tokens that longer texts are cut to; language models learn a longer document in pieces of this length."""

    def check(self) -> None:
        """Raise UserError for a text without a token or an unknown word."""
        if self.max_length < 2:
            raise UserError(f"columns.max_length: got {self.max_length}; allowed: at least 2")
        if self.broken not in ("refuse", "skip"):
            raise UserError(f"columns.broken: got {self.broken!r}; allowed: refuse or skip")


@dataclass
class Rows:
    """Rows that are used, S in all, and what was left out."""

    texts: list[str] = field(default_factory=list)
    seconds: list[str] = field(default_factory=list)  # second texts or prompts, "" where there are none
    labels: list[Any] = field(default_factory=list)  # cells as they stand; None where no labels were asked for
    sources: list[str] = field(default_factory=list)
    splits: list[Split | None] = field(default_factory=list)  # None where none is told
    places: list[Place] = field(default_factory=list)
    tally: Tally = field(default_factory=lambda: Tally("rows"))
    notes: list[str] = field(default_factory=list)

    def pairs(self) -> list[tuple[str, str]]:
        """Each text with its second text."""
        return list(zip(self.texts, self.seconds, strict=True))


@dataclass(frozen=True)
class _Row:
    """One row before its cells are checked."""

    place: Place
    text: Any
    second: Any
    label: Any
    source: Any
    split: Split | None


def read_rows(
    files: Sequence[tuple[Split | None, Path]], columns: ColumnConfig, second: str | None, *, has_labels: bool
) -> Rows:
    """All rows of the files, in order.

    Args:
        files: with the splits that their names tell.
        columns: which columns mean what.
        second: column of second texts or prompts.
        has_labels: whether labels are read.

    Raises:
        UserError: a missing column, a cell of a wrong type, or a row without a text or label, unless they are skipped.
    """
    rows = Rows()
    raw = [
        row
        for split, file in files
        for row in _raw_rows(file, split, columns, second=second, has_labels=has_labels, rows=rows)
    ]
    tests = [row for row in raw if row.split == "test"]
    is_blind = has_labels and bool(tests) and all(_is_unlabelled(row.label) for row in tests)
    for row in raw:
        if is_blind and row.split == "test":
            rows.tally.leave_out("of the test split have no label", say_place(row.place))
        else:
            _add(rows, row, columns, second=second, has_labels=has_labels)
    if any(rows.splits) and not all(rows.splits):
        place = rows.places[rows.splits.index(None)]
        raise UserError(f"{say_place(place)}: tells no split while other rows do; give every row one")
    if not rows.texts:
        shown = ", ".join(str(file) for _, file in files[:3])
        raise UserError(f"{shown}: no row can be used ({'; '.join(rows.tally.lines())}); give at least one")
    return rows


def _raw_rows(
    file: Path, split: Split | None, columns: ColumnConfig, *, second: str | None, has_labels: bool, rows: Rows
) -> Iterator[_Row]:
    required = [columns.text, *filter(None, (second, columns.source))] + [columns.label] * has_labels
    source = columns.source or "source"
    part = read_columns(file, [*required, source, columns.split])
    for name in required:
        if name in part.cells or (name == columns.label and split == "test"):
            continue
        raise UserError(
            f"{file}: no column {name!r}; it has {', '.join(part.names)[:300]} (--columns.*); a file without a header "
            "line needs one"
        )
    rows.notes += [f"{file}: {note}" for note in part.notes]
    if part.num_blank:
        rows.tally.leave_out("are blank lines", str(file), part.num_blank)
    nothing: list[Any] = [None] * part.num_rows
    cells = [part.cells.get(name, nothing) for name in (columns.text, second or "", columns.label)]
    has_source, told = source in part.cells, part.cells.get(columns.split)
    for i in range(part.num_rows):
        place = (str(file), i + 1)
        yield _Row(
            place,
            cells[0][i],
            cells[1][i] if second else "",
            cells[2][i],
            clean_source(part.cells[source][i], place, source) if has_source else None,
            _split(None if told is None else told[i], split, told is not None, place=place, column=columns.split),
        )


def _split(cell: Any, of_file: Split | None, is_told: bool, *, place: Place, column: str) -> Split | None:
    """Return the split of a row, from its file's name or its column; UserError for a contradiction."""
    named = split_named(str(cell)) if isinstance(cell, str | NumberedName) else None
    if of_file is not None:
        if named is not None and named != of_file:
            raise UserError(
                f"{say_place(place)}: its column {column!r} says {named}, the name of its file {of_file}; rename the "
                "file, or name another column with --columns.split"
            )
        return of_file
    if is_told and named is None:
        raise UserError(
            f"{say_place(place)}: got split {cell!r:.40}; allowed: train, validation or test; if column {column!r} "
            "means something else, name another with --columns.split"
        )
    return named


def clean_source(cell: Any, place: Place, column: str) -> str | None:
    """Return a source as a text: 1, 1.0 and "1" are one source; None for a missing one.

    Raises:
        UserError: a cell of another type, or a fraction.
    """
    if is_missing(cell):
        return None
    if isinstance(cell, str | NumberedName):
        return str(cell)
    is_whole = isinstance(cell, int) or (isinstance(cell, float | Decimal) and cell % 1 == 0)
    if is_whole and not isinstance(cell, bool):
        return str(int(cell))
    raise UserError(
        f"{say_place(place)}: column {column!r} holds {type(cell).__name__} {cell!s:.40}; allowed: texts or "
        "whole numbers"
    )


def _is_unlabelled(cell: Any) -> bool:
    return is_missing(cell) or cell in (NO_LABEL, str(NO_LABEL))


def _add(rows: Rows, row: _Row, columns: ColumnConfig, *, second: str | None, has_labels: bool) -> None:
    """Take a row, or leave it out, or refuse it."""
    problem = None
    if is_missing(row.text):
        problem = f"no text in column {columns.text!r}"
    elif row.second is None or (second == columns.pair and second is not None and is_missing(row.second)):
        problem = f"no text in column {second!r}"
    elif has_labels and is_missing(row.label):
        problem = f"no label in column {columns.label!r}"
    if problem is not None:
        if columns.broken == "refuse":
            raise UserError(
                f"{say_place(row.place)}: has {problem}; fill it, or leave such rows out with --columns.broken skip"
            )
        rows.tally.leave_out(f"have {problem}", say_place(row.place))
        return
    for cell, name in ((row.text, columns.text), (row.second, second)):
        if not isinstance(cell, str):
            raise UserError(
                f"{say_place(row.place)}: column {name!r} holds {type(cell).__name__} {cell!s:.40}; allowed: texts"
            )
    rows.tally.use()
    rows.texts.append(row.text)
    rows.seconds.append(row.second)
    rows.labels.append(row.label)
    rows.places.append(row.place)
    rows.sources.append(_own_source(row, has_labels) if row.source is None else row.source)
    rows.splits.append(row.split)


def _own_source(row: _Row, has_labels: bool) -> str:
    """Return the source of a sample without a given one: its content, so copies stay together."""
    if has_labels:
        return f"{row.text}\n{row.second}" if row.second else str(row.text)
    return f"{row.second}\n{row.text}"
