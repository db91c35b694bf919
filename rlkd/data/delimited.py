"""Read CSV and TSV: separators, quotation marks and blank lines, without a guess that could move or drop a row."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rlkd.data.columns import Columns, find_column, lines_of
from rlkd.errors import UserError

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}


def delimited_columns(text: str, kind: str, path: Path, wanted: Sequence[str]) -> Columns:
    """CSV or TSV. The separator is the one that brings out most of the wanted columns in the header."""
    text, separators = _after_separator_line(text, SEPARATORS[kind])
    headers = {mark: _header(text, mark) for mark in separators}
    num_found = {mark: sum(find_column(headers[mark], name, path) is not None for name in wanted) for mark in headers}
    mark = max(separators, key=lambda m: (num_found[m], 0 if any(num_found.values()) else len(headers[m])))
    records, notes = _records(text, mark, kind, path)
    if mark != separators[0]:
        notes.append(f"its columns are separated by {'tabs' if mark == chr(9) else repr(mark)}")
    header, *body = records
    rows = [row for row in body if row]
    found = {name: find_column(header, name, path) for name in wanted}
    cells = {name: [row[place] for row in rows] for name, place in found.items() if place is not None}
    return Columns(header, cells, len(rows), len(body) - len(rows), notes)


def _after_separator_line(text: str, separators: str) -> tuple[str, str]:
    """Excel's first line `sep=;`, where there is one, tells the separator and is no row."""
    first, _, rest = text.partition("\n")
    told = first.strip().strip('"')
    return (rest, told[4]) if told.lower().startswith("sep=") and len(told) == 5 else (text, separators)


def _header(text: str, mark: str) -> list[str]:
    try:
        return next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=mark)), [])
    except csv.Error:
        return []


def _records(text: str, mark: str, kind: str, path: Path) -> tuple[list[list[str]], list[str]]:
    """Header and rows, [] for a blank line, and how quotation marks were read where that is not as in CSV.

    Quotation marks are those of CSV (RFC 4180) where every record then has as many fields as the header. They are
    ordinary characters where only that gives such records, one a line, as in the TSV files of GLUE.

    Raises:
        UserError: neither holds, or both hold and the numbers of rows differ.
    """
    quoted, problem = _quoted_records(text, mark)
    if '"' not in text:
        plain, plain_problem = quoted, problem
    else:
        plain, plain_problem = _plain_records(text, mark, kind)
    if problem is None and plain_problem is None and len(quoted) != len(plain):
        if kind != ".tsv" or len(plain[0]) < 2:
            raise UserError(
                f"{path}: has {len(quoted) - 1} rows where quotation marks enclose fields and {len(plain) - 1} where "
                "they are ordinary characters; which is meant is unknown: give the data as JSON lines"
            )
        problem = "a row would go beyond its line"
    if problem is None:
        return quoted, []
    if plain_problem is None:
        return plain, ["its quotation marks are ordinary characters: they do not enclose fields"]
    raise UserError(f"{path}: {plain_problem if kind == '.tsv' else problem}")


def _plain_records(text: str, mark: str, kind: str) -> tuple[list[list[str]], str | None]:
    """Read records with quotation marks as ordinary characters; return them and what breaks them."""
    records = _without_head([line.split(mark) if line else [] for line in lines_of(text)])
    problem = _irregular(records, mark)
    if problem is None and kind == ".csv":
        if len(records[0]) < 2:
            problem = "a table of one column"
        if any(len(cell) > 1 and cell[0] == cell[-1] == '"' for record in records for cell in record):
            problem = "quotation marks that enclose a field"
    return records, problem


def _without_head(records: list[list[str]]) -> list[list[str]]:
    """Return the records from the first one that is not blank."""
    return records[next((i for i, record in enumerate(records) if record), len(records)) :]


def _quoted_records(text: str, mark: str) -> tuple[list[list[str]], str | None]:
    """Read records by the rules of CSV; return them and what breaks them. Spaces are dropped as in the header."""
    limit = csv.field_size_limit(len(text) + 1)
    header = _header(text, mark)
    has_spaces = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, delimiter=mark, strict=True, skipinitialspace=has_spaces)
    records: list[list[str]] = []
    try:
        records.extend(reader)
    except csv.Error as error:
        return records, f"line {reader.line_num}: {error}; enclose such a field in quotation marks and double its own"
    finally:
        csv.field_size_limit(limit)
    records = _without_head(records)
    return records, _irregular(records, mark)


def _irregular(records: Sequence[list[str]], mark: str) -> str | None:
    """Describe the first record with another number of fields than the header; None if there is no such record."""
    for row, record in enumerate(records):
        if record and len(record) != len(records[0]):
            shown = "tab" if mark == "\t" else repr(mark)
            return (
                f"row {row}: got {len(record)} fields; its header has {len(records[0])} (separator {shown}); enclose "
                "fields that contain the separator in quotation marks"
            )
    return None
