"""The journal of a run: results of its batches of trainings, so that a stopped run need not train them again.

Everything in a run except the state of PPO follows from its config, its seed and the results of its trainings. A
resumed run therefore executes the same code from the beginning and takes results from the journal until the journal
ends. An entry is a line: a checksum that covers this line and all lines before it, then strict JSON with the hash of
the inputs (tasks, settings, split, ...) and the resulting arrays. A torn or altered line is dropped, with all lines
after it.

A training with a state of its own (PPO, a single student) saves it as a checkpoint (`rlkd.io.checkpoints`) through this
journal, which relates checkpoints to entries. Entries and checkpoints record the lengths of the run's logs; a resumed
run cuts the logs back to these lengths and writes nothing to them (`replaying`) until it reaches new results. So no
step is logged twice or missing.
"""

import base64
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlkd.errors import UserError
from rlkd.io.cache import digest_tensors
from rlkd.io.checkpoints import Checkpoint, Checkpoints
from rlkd.io.files import inside, number, opened, parse_json, reason, whole, write_error

logger = logging.getLogger(__name__)

FOLDER, NAME = "checkpoints", "journal.jsonl"
LOGS = ("*.jsonl", "tensorboard/*tfevents*")
MAX_ENTRY_BYTES, MAX_JOURNAL_BYTES = 2**26, 2**40  # a journal is read line by line
MAX_LOG_BYTES = 2**40
DTYPES = ("float64", "float32", "int64", "bool")

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # numpy type and shape by name


def digest(*tensors: Tensor) -> str:
    """Return a hash of tensors, for the `inputs` of an entry."""
    return digest_tensors((str(i), tensor) for i, tensor in enumerate(tensors))[:16]


class Journal:
    """Finished batches and saved states of the run in one folder.

    Args:
        folder: the run folder.
        resume: go on with the journal in the folder; otherwise the folder must have none.
        keep: checkpoints kept by `save_state`.
    """

    def __init__(self, folder: Path, resume: bool = False, keep: int = 2) -> None:
        self._folder, self._path = folder, folder / FOLDER / NAME
        self._checkpoints = Checkpoints(folder / FOLDER, keep)
        self._began = time.perf_counter()
        self._offsets: list[int] = []  # where each whole entry begins in the file
        self._chain, self._end, self._next = "", 0, 0  # checksum and end of the last whole entry; the next to answer
        self.pending: Checkpoint | None = None  # the state to go on with, until it is taken
        self.resumes, self.finished = resume, False
        self.last_entry_s = 0.0  # `elapsed_s` at the last entry: the present part of the run began then
        if resume:
            self._open()

    def _open(self) -> None:
        """Read entries and the newest checkpoint, and cut the logs back to the lengths that they record."""
        last = self._read_entries()
        self.last_entry_s = _elapsed_s(last, self._path)
        saved = self._checkpoints.newest()
        position = saved.note.get("position") if saved else None
        if saved and position == len(self._offsets):
            self.pending, last = saved, saved.note
        elif saved and isinstance(position, int) and position > len(self._offsets):
            logger.warning(f"{saved.path}: belongs to entries of the journal that are lost; computing anew")
        self._began -= _elapsed_s(last, self._path)
        try:
            lengths = {str(k): whole(v, "a log's length", 0, MAX_LOG_BYTES) for k, v in last.get("logs", {}).items()}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self._path}: not a journal, or a damaged one ({reason(error):.80})") from error
        if not self.finished:
            self._cut_logs(lengths)

    def _read_entries(self) -> dict[str, Any]:
        """Find all whole entries; return the last one, or {}."""
        last: dict[str, Any] = {}
        if not self._path.exists():
            return last
        with opened(inside(self._folder, f"{FOLDER}/{NAME}"), MAX_JOURNAL_BYTES) as (file, size):
            while self._end < size:
                line = file.readline(MAX_ENTRY_BYTES)
                check, _, body = line.partition(b" ")
                if not line.endswith(b"\n") or check.decode("latin-1") != self._sum(body):
                    logger.warning(
                        f"{self._path}: entry {len(self._offsets) + 1} is torn or altered; computing it anew"
                    )
                    break
                last = parse_json(body, f"{self._path}: not a journal")
                self._offsets.append(self._end)
                self._chain, self._end = check.decode(), self._end + len(line)
        self.finished = last.get("label") == "finished"
        return last

    def _sum(self, body: bytes) -> str:
        return hashlib.sha256(self._chain.encode() + body).hexdigest()

    @property
    def replaying(self) -> bool:
        """Whether the run repeats work from before it was stopped, which its logs have already."""
        return self.has_answer or self.pending is not None

    @property
    def has_answer(self) -> bool:
        """Whether the next batch was trained before the run was stopped."""
        return self._next < len(self._offsets)

    def elapsed_s(self) -> float:
        """Return the seconds that all parts of the run have taken, without work that was lost."""
        return time.perf_counter() - self._began

    def arrays(self, label: str, inputs: Mapping[str, Any], shapes: Shapes, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of the next entry, or call `compute` and append its result; arguments as of `find`."""
        arrays = self.find(label, inputs, shapes)
        if arrays is None:
            arrays = compute()
            self.add(label, inputs, shapes, arrays)
        return arrays

    def find(self, label: str, inputs: Mapping[str, Any], shapes: Shapes) -> Arrays | None:
        """Return the arrays of the next entry, or None if they are still to be computed.

        Args:
            label: for messages.
            inputs: JSON-able; everything that the arrays depend on.
            shapes: of the arrays.

        Raises:
            UserError: the next entry has other inputs or is damaged.
        """
        if not self.has_answer:
            return None
        key = _key(label, inputs)
        place = f"{self._path}: entry {self._next + 1}"
        with opened(self._path, MAX_JOURNAL_BYTES) as (file, _):
            file.seek(self._offsets[self._next])
            body = file.readline(MAX_ENTRY_BYTES).partition(b" ")[2]
        entry = parse_json(body, f"{place} is not an entry")
        if entry.get("key") != key:
            raise UserError(
                f"{place} is {str(entry.get('label'))!r:.60}, this run asks for {label!r:.60} with other inputs: "
                "config, data or rlkd itself have changed since; start anew in another folder"
            )
        try:
            arrays = {name: _decode(entry["arrays"][name], name, *kind) for name, kind in shapes.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place} is damaged ({reason(error):.100}); start anew in another folder") from error
        self._next += 1
        return arrays

    def add(self, label: str, inputs: Mapping[str, Any], shapes: Shapes, arrays: Arrays) -> None:
        """Append the arrays that `find` lacked, with the same arguments.

        Raises:
            ValueError: arrays of other types or shapes.
            UserError: the disk is full.
        """
        for name, (dtype, shape) in shapes.items():
            if (arrays[name].dtype.name, arrays[name].shape) != (dtype, shape):
                raise ValueError(f"{label}: {name} is {arrays[name].dtype} {arrays[name].shape}; not {dtype} {shape}")
        self._append(label, _key(label, inputs), arrays)

    def _append(self, label: str, key: str, arrays: Arrays) -> None:
        entry: dict[str, Any] = {
            "label": label,
            "key": key,
            "arrays": {name: _encode(array) for name, array in arrays.items()},
            **self._progress(),
        }
        body = json.dumps(entry, allow_nan=False).encode() + b"\n"
        line = f"{self._sum(body)} ".encode() + body
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("r+b" if self._path.exists() else "xb") as file:
                file.truncate(self._end)  # removes torn and altered lines
                file.seek(self._end)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self._path, error) from error
        self._offsets.append(self._end)
        self._chain, self._end, self._next = self._sum(body), self._end + len(line), self._next + 1
        self.last_entry_s = entry["elapsed_s"]

    def finish(self) -> None:
        """Record that the run has ended; nothing is left to resume."""
        if self.replaying:
            raise AssertionError("the run ended before all that its journal knows")
        self._append("finished", "", {})
        self._checkpoints.clear()

    def save_state(self, step: int, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Save the state of a training after `step`; entries that are added later make it obsolete.

        Args:
            step: counted within the training.
            tensors: the state.
            note: JSON-able; other data of the state.
        """
        self._checkpoints.save(step, tensors, {**self._progress(), "position": len(self._offsets), "state": dict(note)})

    def take_state(self) -> Checkpoint | None:
        """Return the state to go on with, or None if the training begins anew; logs are written from now on."""
        if self.has_answer:
            raise AssertionError("a state comes after all entries of the journal")
        saved, self.pending = self.pending, None
        if saved is None:
            self._checkpoints.clear()  # of a part of the run that is computed anew
        return saved

    def _progress(self) -> dict[str, Any]:
        """Return the seconds of the run and the lengths of its logs, which are forced to the disk first."""
        lengths = {}
        for path in self._logs():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                lengths[str(path.relative_to(self._folder))] = file.seek(0, os.SEEK_END)
        return {"elapsed_s": self.elapsed_s(), "logs": lengths}

    def _logs(self) -> Iterable[Path]:
        return sorted(path for pattern in LOGS for path in self._folder.glob(pattern))

    def _cut_logs(self, lengths: Mapping[str, int]) -> None:
        """Cut every log to its length in `lengths`; delete those that did not exist then."""
        try:
            for path in self._logs():
                name = str(path.relative_to(self._folder))
                place = inside(self._folder, name)
                if name not in lengths:
                    place.unlink()
                elif place.stat().st_size >= lengths[name]:
                    os.truncate(place, lengths[name])
                else:
                    logger.warning(
                        f"{place}: {place.stat().st_size} bytes, once {lengths[name]}; its end stays missing"
                    )
        except OSError as error:
            raise write_error(error.filename or self._folder, error) from error


def _key(label: str, inputs: Mapping[str, Any]) -> str:
    """Return the hash of an entry's inputs."""
    return hashlib.sha256(json.dumps([label, inputs], sort_keys=True).encode()).hexdigest()


def recall(
    journal: Journal | None, label: str, inputs: Mapping[str, Any], *, shapes: Shapes, compute: Callable[[], Arrays]
) -> Arrays:
    """Return `Journal.arrays`, or `compute()` without a journal."""
    return compute() if journal is None else journal.arrays(label, inputs, shapes, compute)


def _elapsed_s(entry: Mapping[str, Any], path: Path) -> float:
    try:
        return number(entry.get("elapsed_s", 0.0), "elapsed_s", 0.0)
    except ValueError as error:
        raise UserError(f"{path}: not a journal, or a damaged one ({error!s:.80})") from error


def _encode(array: NDArray[Any]) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": data}


def _decode(entry: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Decode the array of this type and shape; raise ValueError for another one or a value that is not finite."""
    if (entry["dtype"], entry["shape"]) != (dtype, list(shape)) or dtype not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']!r:.20} {entry['shape']!s:.40}; expected {dtype} {list(shape)}")
    blob = base64.b64decode(entry["base64"], validate=True)
    if len(blob) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{name} has {len(blob)} bytes")
    array = np.frombuffer(blob, dtype=dtype).reshape(shape).copy()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds a non-finite value")
    return array
