"""Read the columns of one table file: CSV and its kin, JSON, Parquet and Arrow, compressed or not.

Every record of a file becomes a row or is counted as left out; nothing is guessed from the content of a cell: cells
of CSV are texts as they stand ("01" stays "01", "NA" stays "NA"), other formats keep their types.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from rlkd.data.columns import Columns, find_column, lines_of
from rlkd.data.delimited import SEPARATORS, delimited_columns
from rlkd.data.labels import NumberedName
from rlkd.errors import UserError
from rlkd.io.files import read_bytes

METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "metadata.json",
)
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
MAX_TABLE_BYTES = 2**33
CHUNK_BYTES = 2**20
BROKEN = (OSError, EOFError, ValueError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


def table_format(name: str) -> str:
    """Return the format in a file's name, such as ".csv" for Reviews.CSV.gz; "" for other names."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def is_table(name: str) -> bool:
    """Whether a file's name tells a table; a zip archive may hold one."""
    return bool(table_format(name)) or PurePath(name).suffix.lower() == ".zip"


def is_text(name: str) -> bool:
    """Whether a file's name tells a plain text, compressed or not."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes[-2:]]
    return suffixes[-1:] == [".txt"] or (suffixes[:1] == [".txt"] and suffixes[1] in COMPRESSIONS)


def read_text(path: Path) -> str:
    """Read the text of a file, unpacked.

    Raises:
        UserError: it is damaged or not UTF-8.
    """
    return decode(_unpacked(read_bytes(path, MAX_TABLE_BYTES), path, is_text)[0], path)


def read_columns(path: Path, wanted: Sequence[str]) -> Columns:
    """Read the columns `wanted` of a table file; missing ones are absent from `cells`.

    Raises:
        UserError: the file is empty, damaged, of another format, not UTF-8, or has a column twice.
    """
    content, name = _unpacked(read_bytes(path, MAX_TABLE_BYTES), path, table_format)
    kind = table_format(name)
    if not content.strip(b"\x00\t\n\r "):
        raise UserError(f"{path}: is empty; remove it or fetch it again")
    if kind in (".parquet", ".arrow"):
        return _arrow_columns(content, kind, path, wanted)
    text = decode(content, path)
    if kind in SEPARATORS:
        return delimited_columns(text, kind, path, wanted)
    return _json_columns(text, path, wanted)


def decode(content: bytes, path: Path) -> str:
    """Text in UTF-8, or in UTF-16 where its byte order mark says so, without the mark.

    Raises:
        UserError: another encoding; names the first byte that is wrong.
    """
    is_utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    zero = text.find("\x00")
    if zero >= 0:
        line = text.count("\n", 0, zero) + 1
        raise UserError(f"{path}: line {line}: has a zero byte, as UTF-16 without its mark has; convert it to UTF-8")
    return text


def _unpacked(content: bytes, path: Path, is_wanted: Callable[[str], object]) -> tuple[bytes, str]:
    """Content without its compression, which its first bytes tell, and the name of what was inside."""
    opener = _opener(content)
    if opener is None:
        return content, path.name
    try:
        if opener == "zip":
            return _zip_member(content, path, is_wanted)
        with opener(io.BytesIO(content)) as file:  # type: ignore[operator]
            inner = _read_all(file, path)
    except BROKEN as error:
        raise UserError(f"{path}: cannot be unpacked ({' '.join(str(error).split())[:80]}); fetch it again") from error
    if _opener(inner) is not None:
        raise UserError(f"{path}: is compressed twice; unpack it once")
    return inner, path.name


def _opener(content: bytes) -> Callable[[io.BytesIO], Any] | str | None:
    """Return the opener of compressed content; None for other content."""
    if content[:2] == b"\x1f\x8b":
        return gzip.open
    if content[:3] == b"BZh" and content[4:10] == b"1AY&SY":
        return bz2.open
    if content[:6] == b"\xfd7zXZ\x00":
        return lzma.open
    if content[:4] == b"\x28\xb5\x2f\xfd":
        return lambda file: pyarrow("a .zst file").CompressedInputStream(file, "zstd")
    return "zip" if content[:4] == b"PK\x03\x04" else None


def _zip_member(content: bytes, path: Path, is_wanted: Callable[[str], object]) -> tuple[bytes, str]:
    """Read the only file of a zip archive, not counting files of the operating system."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [i.filename for i in archive.infolist() if not i.is_dir() and not is_hidden(PurePath(i.filename))]
        tables = [name for name in names if is_wanted(name)]
        if len(tables) != 1 or len(names) != 1:
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" or "nothing"
            if "[Content_Types].xml" in names:
                raise UserError(f"{path}: is an Excel file; save it as CSV")
            raise UserError(f"{path}: holds {shown}; allowed: a zip archive of one table or text; unpack it first")
        with archive.open(tables[0]) as file:
            inner = _read_all(file, path)
    if _opener(inner) is not None:
        raise UserError(f"{path}: {tables[0]} in it is compressed once more; unpack it once")
    return inner, tables[0]


def _read_all(file: Any, path: Path) -> bytes:
    """All bytes of a decompressing file, as long as they are no more than MAX_TABLE_BYTES."""
    parts: list[bytes] = []
    size = 0
    while chunk := file.read(CHUNK_BYTES):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_TABLE_BYTES:
            raise UserError(f"{path}: holds more than {MAX_TABLE_BYTES} bytes; split it into several files")
    return b"".join(parts)


def walk(folder: Path) -> list[Path]:
    """All files below a folder in the order of their paths, links to files and folders followed.

    Raises:
        UserError: a folder that cannot be read, a link that leads back, or a link to nothing.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    files: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        home = Path(place)
        for name in folders:
            if (home / name).is_symlink() and home.resolve().is_relative_to((home / name).resolve()):
                raise UserError(f"{home / name}: is a link that leads back to a folder above it; remove it")
        for path in (home / name for name in names):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path}: is a link to nothing; fetch the file that it names, or remove it")
            files += [path] * path.is_file()
    return sorted(files)


def is_hidden(path: PurePath) -> bool:
    """Whether a file is the operating system's or an editor's: .DS_Store, ._train.csv, __MACOSX, .ipynb_checkpoints."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _json_columns(text: str, path: Path, wanted: Sequence[str]) -> Columns:
    """JSON lines, a list of objects, an object that holds one such list, or an object of columns."""
    try:
        value = _parse(text)
    except json.JSONDecodeError:
        lines = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
        value = [_parse_line(line, number, path) for number, line in lines]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error!s:.100})") from error
    if isinstance(value, dict):
        value = _rows_of_object(value, path, wanted)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{path}: got {type(value).__name__}; allowed: JSON lines or a list of objects, one a row")
    if not value:
        raise UserError(f"{path}: has no row; remove it or fetch it again")
    names = list(dict.fromkeys(name for row in value for name in row))
    found = {name: find_column(names, name, path) for name in wanted}
    cells = {name: [row.get(names[place]) for row in value] for name, place in found.items() if place is not None}
    return Columns(names, cells, len(value))


def _rows_of_object(value: dict[str, Any], path: Path, wanted: Sequence[str]) -> Any:
    """Rows of an object of columns, or of an object that holds one list of rows; an object alone is one row."""
    columns = {name: list(cells.values()) if isinstance(cells, dict) else cells for name, cells in value.items()}
    lists = {name: cells for name, cells in columns.items() if isinstance(cells, list)}
    rows = [cells for cells in lists.values() if cells and all(isinstance(row, dict) for row in cells)]
    found = [find_column(list(value), name, path) for name in wanted]
    if not any(place is not None for place in found) and len(rows) == 1:
        return rows[0]
    if value and len(lists) == len(columns):
        if len({len(cells) for cells in lists.values()}) > 1:
            raise UserError(f"{path}: its columns have different lengths; allowed: as many values in each")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return [value]


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return _parse(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number}: cannot be read as JSON ({error!s:.100})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        double = next(name for i, (name, _) in enumerate(pairs) if name in [other for other, _ in pairs[:i]])
        raise ValueError(f"the key {double!r:.60} appears twice in one object")
    return table


def pyarrow(path: Path | str) -> Any:
    """Import the package pyarrow.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import pyarrow as package
        import pyarrow.ipc
        import pyarrow.parquet  # noqa: F401, an attribute of the package
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package pyarrow; run `pip install 'rlkd[hf]'`") from error
    return package


def _arrow_columns(content: bytes, kind: str, path: Path, wanted: Sequence[str]) -> Columns:
    """Parquet, or an Arrow stream or file as the data sets library writes it. ClassLabel cells get their names."""
    pa = pyarrow(path)
    try:
        if kind == ".parquet":
            table = pa.parquet.ParquetFile(pa.BufferReader(content)).read()
        elif content[:6] == b"ARROW1":
            table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        else:
            table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as {kind} ({' '.join(str(error).split())[:100]})") from error
    labels = _class_labels(table.schema)
    found = {name: find_column(table.column_names, name, path) for name in wanted}
    cells = {}
    for name, place in found.items():
        if place is not None:
            cells[name] = _named(table.column(place).to_pylist(), labels.get(table.column_names[place]), path)
    return Columns(list(table.column_names), cells, table.num_rows)


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of every ClassLabel column, which the data sets library notes in the schema."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted.get("info", {}).get("features", {})
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, AttributeError, TypeError):
        return {}


def _named(cells: list[Any], names: list[str] | None, path: Path) -> list[Any]:
    """Cells of a ClassLabel column with their names; -1 means that there is none."""
    if names is None:
        return cells
    for row, cell in enumerate(cells, 1):
        if cell is not None and (not isinstance(cell, int) or not -1 <= cell < len(names)):
            raise UserError(
                f"{path}: row {row}: got class {cell!r:.40}; the column has the classes 0 to {len(names) - 1}"
            )
    return [None if cell is None or cell == -1 else NumberedName(names[cell], cell) for cell in cells]
