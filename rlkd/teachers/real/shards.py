"""A teacher's answers in a folder of shards, written by several processes and read on any machine.

Each shard is a safetensors file beside a card with its checksum and what the answers belong to: teacher, data,
vocabulary. Once all cards are there, `index.json` lists the shards; where shards were copied together from several
machines, it is made when they are read. An answer is the k likeliest tokens (or classes) of
a position with their log-probabilities; that of position t is about token t + 1. A classifier has one position.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from rlkd.data.examples import Examples
from rlkd.errors import UserError
from rlkd.io.cache import Arrays, Spec, cached_arrays, digest_tensors
from rlkd.io.files import Schema, inside, load_tensors, read_bytes, read_json, refused_as, whole, write_whole

FORMAT, VERSION, INDEX = "rlkd teacher answers", 1, "index.json"
MAX_SHARD_BYTES = 2**36
ROUNDING = 1e-3  # by which rounded probabilities may add up to more than one


class Answers(NamedTuple):
    """Answers to n samples."""

    log_probs: Tensor  # [n, L, k] float32, the largest first
    ids: Tensor  # [n, L, k] int64
    targets: Tensor  # [n, L - 1] float32, log-probability of each next token; NaN where it is not recorded


@dataclass(frozen=True)
class Description:
    """Identity of the teacher and the data of stored answers; equal in all shards of a folder."""

    kind: str
    origin: str  # teacher, import, or the address of a server
    teacher: str
    teacher_sha256: str  # of the weights; "" where they are elsewhere
    data: str
    data_sha256: str  # of the teacher's inputs, in their order
    names_sha256: str  # of the tokenizer's vocabulary, or of the names of the classes
    num_samples: int
    length: int  # L; 1 for a classifier
    vocabulary: int
    k: int

    def schema(self, count: int) -> Schema:
        """Types and shapes of a shard of `count` samples."""
        return {
            "log_probs": (torch.float32, (count, self.length, self.k)),
            "ids": (torch.int64, (count, self.length, self.k)),
            "targets": (torch.float32, (count, self.length - 1)),
        }


@dataclass(frozen=True)
class Shard:
    """One file of a folder."""

    file: str
    first: int
    count: int
    sha256: str


def data_digest(data: Examples) -> str:
    """Return the digest of the teacher's inputs, in their order."""
    return digest_tensors(sorted(data.inputs.items()))


def names_digest(processor: Any, names: list[str]) -> str:
    """Return the digest of a tokenizer's vocabulary for a language model, or of a classifier's names."""
    table = sorted(processor.get_vocab().items()) if hasattr(processor, "get_vocab") and not names else names
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def rows_of(num_samples: int, number: int, total: int) -> Tensor:
    """Return the samples of shard `number` (from 0) of `total`."""
    return torch.arange(num_samples).tensor_split(total)[number]


def uniform(size: int, length: int, k: int, vocabulary: int) -> Answers:
    """Return answers that prefer no token, for positions that have none."""
    log_probs = torch.full((size, length, k), -math.log(vocabulary))
    ids = torch.arange(k).expand(size, length, k).clone()
    return Answers(log_probs, ids, torch.full((size, length - 1), torch.nan))


def check_answers(answers: Answers, vocabulary: int, name: str) -> None:
    """Refuse answers that are no log-probabilities of distinct tokens of the vocabulary.

    Raises:
        UserError: what is wrong, and where first; the message begins with `name`.
    """
    log_probs, ids, targets = answers
    sums = log_probs.exp().sum(-1)  # [n, L]
    ordered = ids.sort(-1).values
    wrong = {
        "a value that is not finite": ~torch.isfinite(log_probs).all(-1),
        "a log-probability above 0": (log_probs > ROUNDING).any(-1),
        f"a token id outside 0 to {vocabulary - 1}": ((ids < 0) | (ids >= vocabulary)).any(-1),
        "a token twice": (ordered[..., 1:] == ordered[..., :-1]).any(-1),
        "probabilities that add up to more than 1": sums > 1 + ROUNDING,
        "log-probabilities that do not fall": (log_probs[..., 1:] > log_probs[..., :-1]).any(-1),
    }
    for what, where in wrong.items():
        if bool(where.any()):
            sample, position = where.nonzero()[0].tolist()
            raise UserError(f"{name}: sample {sample}, position {position} has {what}; write the answers anew")
    if bool((targets > ROUNDING).any()):
        raise UserError(f"{name}: targets hold a log-probability above 0; write the answers anew")


def write_shard(folder: Path, described: Description, number: int, total: int, answers: Answers) -> None:
    """Write shard `number` (from 0) of `total`, and the index if it was the last one missing.

    Raises:
        UserError: answers that `check_answers` refuses, or a folder that has answers to other samples.
    """
    rows = rows_of(described.num_samples, number, total)
    check_answers(answers, described.vocabulary, f"shard {number + 1} of {total}")
    blob = save({name: tensor.contiguous() for name, tensor in answers._asdict().items()})
    name = f"answers-{number + 1:05d}-of-{total:05d}.safetensors"
    shard = Shard(name, int(rows[0]) if len(rows) else 0, len(rows), hashlib.sha256(blob).hexdigest())
    write_whole(folder / name, blob)
    card = {"format": FORMAT, "version": VERSION, **asdict(described), "shard": asdict(shard), "num_shards": total}
    write_whole((folder / name).with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    _write_index(folder, described, total)


def is_written(folder: Path, described: Description, number: int, total: int) -> bool:
    """Return whether the folder has this shard already, whole, for the same teacher and data."""
    path = folder / f"answers-{number + 1:05d}-of-{total:05d}.json"
    if not path.exists():
        return False
    found, shards = _read_card(path)
    file = folder / shards[0].file
    return found == described and file.exists() and _sha256_of(file) == shards[0].sha256


def _write_index(folder: Path, described: Description, total: int) -> None:
    shards = _listed(folder, described, total)
    if shards is None:
        return
    rows = [asdict(shard) for shard in shards]
    text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(described), "shards": rows}, indent=1)
    write_whole(folder / INDEX, text + "\n")


def _listed(folder: Path, described: Description, total: int) -> list[Shard] | None:
    """Return the shards that the cards in a folder list, or None where a card is missing.

    Raises:
        UserError: cards of another teacher or of other data.
    """
    paths = [folder / f"answers-{i + 1:05d}-of-{total:05d}.json" for i in range(total)]
    if not all(path.exists() for path in paths):
        return None
    cards = [_read_card(path) for path in paths]
    for path, (found, _) in zip(paths, cards, strict=True):
        if found != described:
            raise UserError(f"{path}: {differences(found, described)}; give every answer set a folder of its own")
    return [shard for _, (shard,) in cards]


def differences(found: Description, expected: Description) -> str:
    """Describe the first difference between two descriptions; "" where they are equal."""
    for field in fields(Description):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if a != b:
            return f"{field.name} is {a!s:.60}; expected {b!s:.60}"
    return ""


def read_index(folder: Path) -> tuple[Description, list[Shard]]:
    """Read what the answers in a folder belong to, and its shards.

    Raises:
        UserError: shards that are missing, or an index that is damaged.
    """
    if (folder / INDEX).is_file():
        return _read_card(inside(folder, INDEX))
    cards = sorted(folder.glob("answers-?????-of-?????.json"))
    for total in sorted({card.stem[-5:] for card in cards}):  # copied together, from machines that saw their own alone
        mine = [card for card in cards if card.stem.endswith(f"-of-{total}")]
        if not total.isdecimal() or len(mine) != int(total):
            continue
        described, _ = _read_card(mine[0])
        shards = _listed(folder, described, len(mine))
        if shards is not None:
            with refused_as(folder, "a folder of a teacher's answers"):
                _check_order(shards, described.num_samples)
            return described, shards
    missing = "shards of it are missing" if cards else "it has no answers"
    raise UserError(f"{folder}: has no {INDEX}: {missing}; write them with rlkd signals --out {folder}")


def _read_card(path: Path) -> tuple[Description, list[Shard]]:
    card = read_json(path, "an index of a teacher's answers")
    with refused_as(path, "an index of a teacher's answers"):
        if (card["format"], card["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is {card['format']!r:.40} {card['version']!r:.10}")
        values = {}
        for field in fields(Description):
            value = card[field.name]
            if field.type is int:
                value = whole(value, field.name, 1, 2**40)
            elif not isinstance(value, str):
                raise ValueError(f"{field.name} is {value!r:.40}; allowed: text")
            values[field.name] = value
        described = Description(**values)
        rows = card["shards"] if "shards" in card else [card["shard"]]
        shards = [
            Shard(
                str(row["file"]),
                whole(row["first"], "first", 0, 2**40),
                whole(row["count"], "count", 0, 2**40),
                row["sha256"],
            )
            for row in rows
        ]
        if "shards" in card:
            _check_order(shards, described.num_samples)
    return described, shards


def _check_order(shards: list[Shard], num_samples: int) -> None:
    """Raise ValueError for shards that leave samples out or hold some twice."""
    if [shard.first for shard in shards if shard.count] != _firsts(shards, num_samples):
        raise ValueError("its shards do not follow one another")


def _firsts(shards: list[Shard], num_samples: int) -> list[int]:
    """Where the shards with samples must begin; [-1] where they do not add up to `num_samples`."""
    firsts, end = [], 0
    for shard in shards:
        if shard.count:
            firsts.append(end)
        end += shard.count
    return firsts if end == num_samples else [-1]


def _sha256_of(path: Path) -> str:
    return hashlib.sha256(read_bytes(path, MAX_SHARD_BYTES)).hexdigest()


def read_shards(folder: Path, described: Description, shards: list[Shard]) -> Iterator[tuple[Shard, Answers]]:
    """Yield the checked answers, shard by shard.

    Raises:
        UserError: a file that is torn, altered, or holds what `check_answers` refuses.
    """
    for shard in shards:
        path = inside(folder, shard.file)
        blob = read_bytes(path, MAX_SHARD_BYTES)
        if hashlib.sha256(blob).hexdigest() != shard.sha256:
            raise UserError(f"{path}: torn or altered, its checksum differs from {INDEX}; copy it anew")
        tensors = load_tensors(blob, described.schema(shard.count), str(path), finite=False)
        answers = Answers(**tensors)
        check_answers(answers, described.vocabulary, str(path))
        yield shard, answers


def mapped_answers(folder: Path) -> tuple[Description, Answers]:
    """Return all answers of a folder as memory-mapped tensors, kept in the cache of this machine.

    Raises:
        UserError: as of `read_index` and `read_shards`.
    """
    described, shards = read_index(folder)
    specs: dict[str, Spec] = {
        name: (shape, str(dtype).removeprefix("torch."))
        for name, (dtype, shape) in described.schema(described.num_samples).items()
    }

    def fill(arrays: Arrays) -> None:
        for shard, answers in read_shards(folder, described, shards):
            for name, tensor in answers._asdict().items():
                arrays[name][shard.first : shard.first + shard.count] = tensor.numpy()

    key = {"index": json.dumps([asdict(described), [asdict(shard) for shard in shards]])}
    return described, Answers(**cached_arrays("answers", key, specs, fill))
