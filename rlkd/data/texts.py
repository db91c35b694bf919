"""Texts for language models: plain files or a column of a table, cut into pieces that never cross a document.

A row of a table is a document, and so is a .txt file. A document without a prompt is cut into consecutive pieces of
`columns.max_length` tokens, the last one shorter; with a prompt it is one piece, cut off at that length, for what
follows would have lost its prompt. Special tokens (a begin-of-text, say) stand where the tokenizer puts them at the
head of a document. A single .txt file is cut by its lines: the first 70 % train, 15 % validate, 15 % test, in order.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from rlkd.data.examples import PADDING_MASK, TokenExamples, next_token_mask
from rlkd.data.labels import say_place
from rlkd.data.layout import find_files
from rlkd.data.readers import COMPRESSIONS, FORMATS, is_table, is_text, read_text
from rlkd.data.rows import ColumnConfig, read_rows
from rlkd.data.tables import SHARES, SPLITS, Table, has_tables, make_splits, table_files, table_of_rows
from rlkd.data.tally import Tally
from rlkd.errors import UserError

ALLOWED = f".txt, {', '.join(FORMATS)} ({', '.join(COMPRESSIONS)}, too), or a folder of such files"


def read_texts(path: Path, columns: ColumnConfig) -> Table:
    """Documents with their prompts ("" where there is none), as pairs of strings.

    Raises:
        UserError: no such path, an unknown format, a missing column, or a row that cannot be used.
    """
    columns.check()
    if columns.classes is not None:
        raise UserError("columns.classes: got it for a language model, whose texts have no labels; leave it out")
    if not path.exists():
        raise UserError(f"{path}: no such data; give {ALLOWED}")
    if has_tables(path) if path.is_dir() else is_table(path.name) and not is_text(path.name):
        files, tally = table_files(path)
        rows = read_rows(files, columns, columns.prompt, has_labels=False)
        samples = list(zip(rows.seconds, rows.texts, strict=True))
        return table_of_rows(path, "document", rows, samples=samples, tally=tally)
    tally = Tally("files")
    texts = find_files(path, is_text, "texts", tally) if path.is_dir() else [(None, path)] * is_text(path.name)
    if not texts:
        raise UserError(f"{path}: no text was found; allowed: {ALLOWED}")
    if columns.prompt is not None:
        raise UserError(f"{path}: --columns.prompt needs a table; allowed: {', '.join(FORMATS)}")
    if not path.is_dir():
        return _cut_in_order(path)
    splits = [str(split) for split, _ in texts if split is not None] or None
    return Table(
        name=path.name,
        kind="document",
        samples=[("", _read_document(file)) for _, file in texts],
        labels=[],
        sources=[file.name for _, file in texts],
        splits=splits,
        places=[(str(file), 0) for _, file in texts],
        tallies=(tally,),
    )


def make_token_examples(table: Table, tokenizer: Any, vocabulary: int, columns: ColumnConfig) -> TokenExamples:
    """Pieces of at most `columns.max_length` tokens, padded on the right; the prompt's tokens are not learned.

    Args:
        table: of `read_texts`.
        tokenizer: of the teacher.
        vocabulary: V, the size of the teacher's answers.
        columns: gives the length.

    Raises:
        UserError: a prompt that leaves nothing to learn, or a split without a piece.
    """
    tally = Tally("pieces")
    pieces: list[tuple[list[int], int]] = []  # tokens, and how many of them are the prompt's
    sources: list[str] = []
    splits: list[str] = []
    for row, (prompt, text) in enumerate(table.samples):
        where = say_place(table.place(row))
        if columns.prompt is None:
            every = _pieces(text, tokenizer, columns.max_length)
            new = [(ids, num_given) for ids, num_given in every if len(ids) > 1]
            if len(new) < len(every):
                tally.leave_out("have one token, which leaves nothing to learn", where)
        else:
            new = [_after_prompt(prompt, text, tokenizer, length=columns.max_length, where=where)]
        tally.use(len(new))
        pieces += new
        sources += [table.sources[row]] * len(new)
        splits += [] if table.splits is None else [table.splits[row]] * len(new)
    if not pieces:
        raise UserError(
            f"{table.name}: no text has two tokens; a language model learns each token from those before it"
        )
    ids, mask, prompts = _padded(pieces, tokenizer.pad_token_id or 0)
    rows = Table(table.name, "document", pieces, [], sources, splits if table.splits is not None else None)
    indices, notes = make_splits(rows)
    report = "\n".join([*table.lines(), *tally.lines(), *notes]) + "\n"
    return TokenExamples(
        table.name,
        {"input_ids": ids, PADDING_MASK: mask},
        torch.zeros(len(pieces), dtype=torch.int64),
        vocabulary,
        indices,
        next_token_mask(mask, prompts),
        report=report,
    )


def _pieces(text: str, tokenizer: Any, length: int) -> list[tuple[list[int], int]]:
    """All pieces of one document, each without a prompt; the last one may have one token, which is nothing to learn."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [(ids[i : i + length], 0) for i in range(0, len(ids), length)]


def _after_prompt(prompt: str, text: str, tokenizer: Any, *, length: int, where: str) -> tuple[list[int], int]:
    head = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    tail = tokenizer(text, add_special_tokens=not prompt, verbose=False)["input_ids"]
    ids = [*head, *tail][:length]
    if len(ids) < max(2, len(head) + 1):
        raise UserError(
            f"{where}: got a prompt of {len(head)} and a text of {len(tail)} tokens, which leave none to learn within "
            f"{length}; raise --columns.max_length or remove the row"
        )
    return ids, len(head)


def _padded(pieces: Sequence[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, 1 where they are real, and 1 where they are the prompt's; each [S, L] int64."""
    longest = max(len(ids) for ids, _ in pieces)
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row, _ in pieces])
    place = torch.arange(longest)
    lengths, prompts = torch.tensor([[len(row), given] for row, given in pieces]).T
    return ids, (place < lengths[:, None]).long(), (place < prompts[:, None]).long()


def _cut_in_order(path: Path) -> Table:
    """One text, cut at the lines that stand nearest to 70 % and 85 % of it."""
    lines = _read_document(path).splitlines(keepends=True)
    ends = [0, *(round(share * len(lines)) for share in SHARES), len(lines)]
    parts = [("", "".join(lines[a:b])) for a, b in pairwise(ends)]
    places = [(str(path), 0)] * len(parts)
    return Table(path.stem, "document", parts, [], list(SPLITS), list(SPLITS), places)


def _read_document(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: is empty; remove it")
    return text
