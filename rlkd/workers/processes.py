"""Workers that are processes on this machine.

Each has a pipe to this process, and does one piece of work at a time. A worker that dies is replaced, and its piece is
done again. Workers end with this process, however it ends. What goes through the pipes is pickled by this process and
its workers alone.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle

from rlkd.workers.interface import (
    MAX_RETRIES,
    Outcome,
    Shared,
    Value,
    Work,
    WorkerError,
    attempt,
    ignore,
    insert,
    named,
    prepare_worker,
    value_of,
)

logger = logging.getLogger(__name__)

PRELOADED = ["rlkd.agents.ppo.rollouts", "rlkd.agents.baselines.methods"]  # what takes seconds to import


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    index: int
    has: set[int] = field(default_factory=set)  # keys of the shared values that it keeps
    work: int | None = None  # which piece it does


class ProcessWorkers:
    """Implements `Workers` by processes; a context manager.

    Args:
        num_workers: processes.
        gpu_share: of a GPU for each of them; each GPU takes as many as fit.
    """

    def __init__(self, num_workers: int, gpu_share: float = 0.0) -> None:
        # a process that is forked from one with threads can hang, so a server that only imports forks the workers
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(PRELOADED)
        self._gpu_share = gpu_share
        self._shared: list[Any] = []
        self._pickled: dict[int, bytes] = {}
        self._workers: list[_Worker] = []
        for index in range(num_workers):
            self._workers.append(self._started(index))

    def __enter__(self) -> "ProcessWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def share(self, value: Any) -> Shared:
        """As `Workers.share`."""
        for key, before in enumerate(self._shared):
            if before is value:
                return Shared(key)
        self._shared.append(value)
        return Shared(len(self._shared) - 1)

    def run(self, works: Sequence[Work[Value]], on_window: Callable[[int], object] = ignore) -> Iterator[Value]:
        """As `Workers.run`."""
        waiting = deque(sorted(range(len(works)), key=lambda i: -works[i].size))
        values: dict[int, Value] = {}
        losses = [0] * len(works)
        next_up = 0
        try:
            while next_up < len(works):
                for place in range(len(self._workers)):
                    if waiting and self._workers[place].work is None:
                        self._give(place, works, waiting.popleft())
                ready = wait([worker.connection for worker in self._workers])
                for place, worker in enumerate(self._workers):
                    if worker.connection not in ready:
                        continue
                    outcome, index = _received(worker), worker.work
                    worker.work = None
                    if outcome is None:
                        self._replace(place)
                        if index is not None:
                            losses[index] += 1
                            _check_losses(losses[index], works[index])
                            waiting.appendleft(index)
                    elif index is not None:
                        values[index] = value_of(outcome, works[index])
                        works[index].report(on_window)
                while next_up in values:
                    yield values.pop(next_up)
                    next_up += 1
        except BaseException:
            for place, worker in enumerate(self._workers):
                if worker.work is not None:  # what it still does is of no use
                    self._replace(place)
            raise

    def _started(self, index: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, index, self._gpu_share), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here
        return _Worker(process, ours, index)

    def _replace(self, place: int) -> None:
        worker = self._workers[place]
        self._end(worker)
        self._workers[place] = self._started(worker.index)

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def _give(self, place: int, works: Sequence[Work[Any]], index: int) -> None:
        """Send a piece of work to an idle worker, or to its successor if it is gone."""
        work = works[index]
        for attempt_number in range(MAX_RETRIES + 1):
            worker = self._workers[place]
            keys = {a.key for a in work.arguments if isinstance(a, Shared)} - worker.has
            for key in keys - set(self._pickled):
                self._pickled[key] = cloudpickle.dumps(self._shared[key])
            blobs = {key: self._pickled[key] for key in keys}
            try:
                worker.connection.send_bytes(pickle.dumps((blobs, cloudpickle.dumps((work.function, work.arguments)))))
            except OSError:
                _check_losses(attempt_number + 1, work)
                self._replace(place)
                continue
            worker.has |= keys
            worker.work = index
            return


def _received(worker: _Worker) -> Outcome | None:
    """Return what a worker answers, or None if it is gone."""
    try:
        outcome: Outcome = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, OSError):
        return None
    return outcome


def _check_losses(count: int, work: Work[Any]) -> None:
    if count > MAX_RETRIES:
        raise WorkerError(
            f"{named(work)}: its worker ended {count} times without an answer; look whether the machine's memory is "
            "too small for so many workers"
        )
    logger.warning(f"a worker is lost; {named(work)} is done again ({count} of {MAX_RETRIES})")


def _serve(connection: Connection, index: int, gpu_share: float) -> None:
    """Do what comes through the connection until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the main one ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu_share > 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(index // int(1 / gpu_share))
    prepare_worker(gpu_share)
    shared: dict[int, Any] = {}
    while True:
        try:
            blobs, call = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return

        def compute(blobs: dict[int, bytes] = blobs, call: bytes = call) -> Any:
            shared.update({key: pickle.loads(blob) for key, blob in blobs.items()})
            function, arguments = pickle.loads(call)
            return function(*insert(arguments, shared), on_window=ignore)

        try:
            connection.send_bytes(cloudpickle.dumps(attempt(compute)))
        except OSError:
            return


def _visible_gpu(number: int) -> str:
    """Return the name of the GPU with this number among those that the whole run may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",")[number] if allowed else str(number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
