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
from rlkd.data.tables import (
    OTHER_NAMES,
    READERS,
    SHARES,
    SPLITS,
    ColumnConfig,
    Table,
    load_rows,
    make_splits,
    table_files,
)
from rlkd.errors import UserError
from rlkd.io.files import read_bytes

MAX_TEXT_BYTES = 2**28
DOCUMENTS = "document"  # kind of a table of texts


def read_texts(path: Path, columns: ColumnConfig) -> Table:
    """Documents with their prompts ("" where there is none), as pairs of strings.

    Raises:
        UserError: no such path, an unknown format, or a missing column.
    """
    columns.check()
    if not path.exists():
        raise UserError(f"{path}: no such data; give a .txt, {', '.join(READERS)} file, or a folder of such files")
    files = table_files(path)
    if files:
        return _read_rows(path, files, columns)
    if columns.prompt is not None:
        raise UserError(f"{path}: --columns.prompt needs a table; allowed: {', '.join(READERS)}")
    if path.suffix == ".txt":
        return _cut_in_order(path)
    texts = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not texts:
        raise UserError(f"{path}: no text was found; allowed: .txt, {', '.join(READERS)} or a folder of such files")
    names = [OTHER_NAMES.get(file.stem, file.stem) for file in texts]
    splits = names if set(names) <= set(SPLITS) else None
    samples = [("", _read(file)) for file in texts]
    return Table(path.name, DOCUMENTS, samples, [], [file.name for file in texts], splits)


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
    pieces: list[tuple[list[int], int]] = []  # tokens, and how many of them are the prompt's
    sources: list[str] = []
    splits: list[str] = []
    for row, (prompt, text) in enumerate(table.samples):
        new = (
            _pieces(text, tokenizer, columns.max_length)
            if columns.prompt is None
            else [_after_prompt(prompt, text, tokenizer, columns.max_length, f"{table.name}: row {row + 1}")]
        )
        pieces += new
        sources += [table.sources[row]] * len(new)
        splits += [] if table.splits is None else [table.splits[row]] * len(new)
    if not pieces:
        raise UserError(
            f"{table.name}: no text has two tokens; a language model learns each token from those before it"
        )
    ids, mask, prompts = _padded(pieces, tokenizer.pad_token_id or 0)
    rows = Table(table.name, DOCUMENTS, pieces, [], sources, splits if table.splits is not None else None)
    return TokenExamples(
        table.name,
        {"input_ids": ids, PADDING_MASK: mask},
        torch.zeros(len(pieces), dtype=torch.int64),
        vocabulary,
        make_splits(rows),
        next_token_mask(mask, prompts),
    )


def _pieces(text: str, tokenizer: Any, length: int) -> list[tuple[list[int], int]]:
    """Of one document; a rest of one token has nothing to learn and is left out."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [(ids[i : i + length], 0) for i in range(0, len(ids), length) if len(ids) - i > 1]


def _after_prompt(prompt: str, text: str, tokenizer: Any, length: int, where: str) -> tuple[list[int], int]:
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


def _read_rows(path: Path, files: dict[str, Path], columns: ColumnConfig) -> Table:
    samples: list[tuple[str, str]] = []
    sources: list[str] = []
    splits: list[str] = []
    for split, file in files.items():
        options = {"sep": "\t"} if file.suffix == ".tsv" else {}
        part = load_rows(file, READERS[file.suffix], data_files=str(file), **options)
        for name in filter(None, (columns.text, columns.prompt, columns.source)):
            if name not in part.column_names:
                raise UserError(f"{file}: no column {name!r}; it has {', '.join(part.column_names)} (--columns.*)")
        texts = list(part[columns.text])
        prompts = list(part[columns.prompt]) if columns.prompt is not None else [""] * len(texts)
        if any(value is None for value in (*texts, *prompts)):
            raise UserError(f"{file}: a row has no text or no prompt; remove it")
        new = [(str(prompt), str(text)) for prompt, text in zip(prompts, texts, strict=True)]
        by = columns.source or ("source" if "source" in part.column_names else None)
        samples += new
        sources += [str(s) for s in part[by]] if by else ["\n".join(pair) for pair in new]
        if split:
            splits += [split] * len(new)
        elif columns.split in part.column_names:
            splits += [str(s) for s in part[columns.split]]
    return Table(path.stem, DOCUMENTS, samples, [], sources, splits or None)


def _cut_in_order(path: Path) -> Table:
    """One text, cut at the lines that stand nearest to 70 % and 85 % of it."""
    lines = _read(path).splitlines(keepends=True)
    ends = [0, *(round(share * len(lines)) for share in SHARES), len(lines)]
    parts = [("", "".join(lines[a:b])) for a, b in pairwise(ends)]
    return Table(path.stem, DOCUMENTS, parts, [], list(SPLITS), list(SPLITS))


def _read(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
