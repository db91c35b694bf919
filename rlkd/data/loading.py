"""Read the data of a real model: what its kind takes, and its classes or vocabulary."""

from pathlib import Path
from typing import Any

from rlkd.data.examples import Examples
from rlkd.data.labels import class_names
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Kind, Table, make_examples, read_table
from rlkd.data.texts import make_token_examples, read_texts
from rlkd.errors import UserError

WANTED: dict[str, Kind] = {"sequence_classification": "text", "image_classification": "image", "causal_lm": "document"}


def load_table(path: Path | str, kind: str, columns: ColumnConfig, model: str) -> Table:
    """Load the rows of the data that a model of this kind learns from.

    Args:
        path: of the data.
        kind: of the model, a key of WANTED.
        columns: which columns mean what.
        model: its name, for messages.

    Raises:
        UserError: the data cannot be read, or are of another kind than the model takes.
    """
    if not str(path).strip():
        raise UserError("data: got no name; allowed: a file or folder")
    path, wanted = Path(path), WANTED[kind]
    if wanted == "document":
        return read_texts(path, columns)
    table = read_table(path, columns, wanted)
    if table.kind not in (wanted, "array"):
        raise UserError(f"{path}: got {table.kind}s for {model}, which is for {kind.replace('_', ' ')}")
    return table


def load_examples(table: Table, processor: Any, config: Any, *, columns: ColumnConfig, model: str) -> Examples:
    """Turn the samples of a table into inputs of a model.

    Args:
        table: of `load_table`.
        processor: the tokenizer or image processor; unused for arrays.
        config: of the model that names the classes, or gives the vocabulary.
        columns: as in `load_table`.
        model: its name, for messages.

    Raises:
        UserError: classes that rlkd does not take, a label that no class has, or a split without a sample.
    """
    if table.kind == "document":
        return make_token_examples(table, processor, int(config.vocab_size), columns)
    return make_examples(table, processor, class_names(config, model), columns)
