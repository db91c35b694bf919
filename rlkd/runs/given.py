"""Write transformers models and data sets that a user holds to folders, which are then read as any other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkd.data.tables import SPLITS
from rlkd.errors import UserError
from rlkd.models.real.pretrained import quiet


def write_model(model: Any, processor: Any, folder: Path, role: str) -> Path:
    """Write a transformers model with its tokenizer or image processor; returns the folder.

    Args:
        model: of transformers; not changed.
        processor: stands beside it; None for arrays, and for a student that shares the teacher's.
        folder: new.
        role: begins the messages.

    Raises:
        UserError: the model cannot be written.
    """
    folder.mkdir(parents=True)
    try:
        with quiet():
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{role}: {type(model).__name__} cannot be written ({error!s:.100})") from error
    return folder


def write_data(data: Any, folder: Path) -> Path:
    """Write a `datasets.Dataset`, a `DatasetDict`, or lists of rows as JSON lines; returns the folder, or its one file.

    Args:
        data: rows, or a mapping from train, validation and test to rows; a row is a mapping from column to value.
            Columns of class numbers (`ClassLabel`) are written by name.
        folder: new.

    Raises:
        UserError: none of these.
    """
    folder.mkdir(parents=True)
    parts = dict(data) if isinstance(data, Mapping) else {"data": data}
    unknown = sorted(set(parts) - {*SPLITS, "data"})
    if unknown:
        raise UserError(f"data: got the splits {unknown}; allowed: {', '.join(SPLITS)}")
    for name, rows in parts.items():
        names = {c: f.names for c, f in (getattr(rows, "features", None) or {}).items() if hasattr(f, "names")}
        try:
            lines = [json.dumps(_row(row, names), allow_nan=False) for row in rows]
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"data: got {type(rows).__name__} for {name} ({error!s:.70}); allowed: rows of texts and labels, as of "
                "datasets.Dataset, or a file or folder"
            ) from error
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder if "data" not in parts else folder / "data.jsonl"


def _row(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the row with names in place of class numbers; -1 stands for no label."""
    return {
        key: names[key][value] if key in names and isinstance(value, int) and value >= 0 else value
        for key, value in row.items()
    }
