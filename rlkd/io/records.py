"""JSON records of a run: dataclasses as plain values, whole JSON files, and files of one JSON object a line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rlkd.io.files import write_error, write_whole
from rlkd.io.journal import Journal


def plain(value: Any) -> Any:
    """Return `value` with dataclasses as dicts and tuples as lists, as YAML and JSON have them."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all. A number that is not finite is an error."""
    write_whole(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


class JsonLines:
    """Appends one JSON object a line; the file is closed after each line, so written lines survive a crash.

    Args:
        path: of the file.
        journal: while it is `replaying`, rows are in the file already and are not written.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self._path, self._journal = path, journal

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`."""
        if self._journal and self._journal.replaying:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise write_error(self._path, error) from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
