"""Import of top-k log-probabilities that another tool stored: safetensors or Parquet.

safetensors: `input_ids` [S, L] (padded on the right), `ids` and `log_probs` [S, L, k] or [S, L - 1, k], and, if it was
stored, the log-probability of each next token, `targets` [S, L - 1]. Parquet: a row a text, with lists of the same
names. Position t answers for token t + 1. A classifier's file has `ids` and `log_probs` [S, k], and no `input_ids`.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.data.examples import PADDING_MASK, Examples, TokenExamples
from rlkd.errors import UserError
from rlkd.io.files import load_tensors, read_bytes, tensor_shapes
from rlkd.teachers.real.shards import MAX_SHARD_BYTES, Answers, uniform

ALLOWED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
REQUIRED = ("ids", "log_probs")


def import_answers(path: Path, data: Examples) -> Answers:
    """Read the answers to all samples of `data`.

    Raises:
        UserError: what is missing or does not fit, in one line: names, shapes, number and order of samples, tokens.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give .safetensors or .parquet")
    if path.suffix == ".safetensors":
        found = _tensors_of(path)
    elif path.suffix == ".parquet":
        found = _columns_of(path, data)
    else:
        raise UserError(f"{path}: got {path.suffix or 'no ending'}; allowed: .safetensors, .parquet")
    return _fitted(found, data, str(path))


def _tensors_of(path: Path) -> dict[str, Tensor]:
    blob = read_bytes(path, MAX_SHARD_BYTES)
    shapes = tensor_shapes(blob, str(path))
    for name, (dtype, _) in shapes.items():
        if dtype not in ALLOWED:
            raise UserError(f"{path}: {name!r:.40} is {dtype!s:.20}; allowed: floating point or int64, int32")
    return load_tensors(blob, shapes, str(path), finite=False)


def _columns_of(path: Path, data: Examples) -> dict[str, Tensor]:
    """Columns of lists as tensors; rows of texts of other lengths are padded to those of `data`."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("Parquet needs the package pyarrow; run `pip install 'rlkd[hf]'`") from error
    try:
        table = parquet.read_table(path)
    except Exception as error:  # whatever its reader raises, the file is at fault
        raise UserError(
            f"{path}: not a Parquet file, or a damaged one ({' '.join(str(error).split())[:100]})"
        ) from error
    _need(table.column_names, str(path), data)
    columns: dict[str, list[Any]] = {
        name: table[name].to_pylist() for name in (*REQUIRED, "input_ids", "targets") if name in table.column_names
    }
    _check_count(len(columns["ids"]), data, str(path))
    if not isinstance(data, TokenExamples):
        return {name: _tensor(rows, name, str(path)) for name, rows in columns.items()}
    lengths = data.inputs[PADDING_MASK].sum(1).tolist()
    parts: dict[str, list[Tensor]] = {name: [] for name in columns}
    for i, length in enumerate(lengths):
        for name, rows in columns.items():
            wanted = (length,) if name == "input_ids" else (length - 1, length)
            row = _tensor(rows[i], name, f"{path}: row {i}")
            if len(row) not in wanted or row.ndim != (2 if name in REQUIRED else 1):
                raise UserError(f"{path}: row {i}: {name} has shape {list(row.shape)} for a text of {length} tokens")
            parts[name].append(row)
    longest = max(lengths)
    return {name: _stacked(rows, longest - (name == "targets"), f"{path}: {name}") for name, rows in parts.items()}


def _tensor(rows: Any, name: str, where: str) -> Tensor:
    try:
        return torch.tensor(rows, dtype=torch.int64 if name in ("ids", "input_ids") else torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {name} is no rectangular list of numbers ({str(error)[:80]})") from error


def _stacked(rows: list[Tensor], length: int, where: str) -> Tensor:
    """Pad rows [l, ...] with zeros to [S, length, ...]."""
    widths = {tuple(row.shape[1:]) for row in rows}
    if len(widths) > 1:
        raise UserError(
            f"{where} has rows with {' and '.join(str(w[0]) for w in sorted(widths))} tokens a position; allowed: one k"
        )
    stacked = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row[:length]
    return stacked


def _need(names: Any, where: str, data: Examples) -> None:
    wanted = (*REQUIRED, "input_ids") if isinstance(data, TokenExamples) else REQUIRED
    for name in wanted:
        if name not in names:
            raise UserError(
                f"{where}: has no {name}; it has {', '.join(sorted(names))!s:.80}; allowed: {', '.join(wanted)}"
            )


def _check_count(found: int, data: Examples, where: str) -> None:
    if found != len(data.labels):
        raise UserError(
            f"{where}: has {found} samples; the data have {len(data.labels)}; use the same --data and --columns"
        )


def _fitted(found: dict[str, Tensor], data: Examples, where: str) -> Answers:
    """Bring tensors to the samples' positions, sort each position's tokens, and check what they answer to."""
    _need(found, where, data)
    ids, log_probs = found["ids"].long(), found["log_probs"].float()
    if ids.shape != log_probs.shape:
        raise UserError(f"{where}: ids {list(ids.shape)} and log_probs {list(log_probs.shape)}; allowed: one shape")
    _check_count(len(ids), data, where)
    if not isinstance(data, TokenExamples):
        if ids.ndim != 2:
            raise UserError(f"{where}: ids have shape {list(ids.shape)}; allowed: [samples, k] for a classifier")
        ids, log_probs = ids[:, None], log_probs[:, None]
        targets, real = torch.zeros(len(ids), 0), torch.ones(len(ids), 1, dtype=torch.bool)
    else:
        targets, real = _check_tokens(found, ids, data, where)
    k, length = ids.shape[-1], real.shape[1]
    if not 1 <= k <= data.num_classes:
        raise UserError(f"{where}: has {k} tokens a position; allowed: 1 to {data.num_classes}, the vocabulary")
    log_probs, order = log_probs.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    blank = uniform(len(ids), length, k, data.num_classes)
    for mine, given in zip(blank[:2], (log_probs, ids), strict=True):
        mine[:, : given.shape[1]] = given
    where_real = real[..., None]
    empty = uniform(len(ids), length, k, data.num_classes)
    return Answers(torch.where(where_real, blank[0], empty[0]), torch.where(where_real, blank[1], empty[1]), targets)


def _check_tokens(found: dict[str, Tensor], ids: Tensor, data: TokenExamples, where: str) -> tuple[Tensor, Tensor]:
    """Return targets [S, L - 1] and which positions have an answer, [S, L] bool."""
    own, mask = data.inputs["input_ids"], data.inputs[PADDING_MASK].bool()
    length, given = own.shape[1], found["input_ids"].long()
    if given.shape != own.shape or ids.ndim != 3 or ids.shape[1] not in (length - 1, length):
        raise UserError(
            f"{where}: input_ids {list(given.shape)} and ids {list(ids.shape)}; allowed here: {list(own.shape)} and "
            f"[{len(own)}, {length} or {length - 1}, k]"
        )
    wrong = ((given != own) & mask).any(1)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0, 0])
        raise UserError(
            f"{where}: text {first} has other tokens than the data; give the same data in the same order, cut by the "
            "same tokenizer"
        )
    targets = found.get("targets", torch.full((len(own), length - 1), torch.nan)).float()
    if targets.shape != (len(own), length - 1):
        raise UserError(f"{where}: targets {list(targets.shape)}; allowed: [{len(own)}, {length - 1}]")
    is_next = torch.nn.functional.pad(mask[:, 1:], (0, 1))  # [S, L], whose next token is real
    return torch.where(mask[:, 1:], targets, torch.nan), is_next
