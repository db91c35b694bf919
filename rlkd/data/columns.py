"""The columns of one table file, whatever its format."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkd.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Columns of one file, by the names that were asked for."""

    names: list[str]  # all columns that the file has
    cells: dict[str, list[Any]]  # of the columns that were asked for and exist, num_rows each
    num_rows: int
    num_blank: int = 0  # lines without a character
    notes: list[str] = field(default_factory=list)  # how it was read, where that is not the plain way


def find_column(names: Sequence[str], wanted: str, path: Path) -> int | None:
    """Place of a column: by its exact name, else in other case or with spaces, where only one is called so.

    Raises:
        UserError: several columns are called so.
    """
    folded = wanted.strip().casefold()
    exact = [place for place, name in enumerate(names) if name == wanted]
    similar = [place for place, name in enumerate(names) if name.strip().casefold() == folded]
    for found in (exact, similar):
        if len(found) > 1:
            raise UserError(f"{path}: {len(found)} columns are called {wanted!r}; rename all but one")
        if found:
            return found[0]
    return None


def lines_of(text: str) -> list[str]:
    """Lines that end in \\n, \\r\\n or \\r; other characters that str.splitlines takes for an end are text."""
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
