"""Workers on a Ray cluster, of this machine or of several (extra `ray`; Ray's core alone).

A piece of work is a Ray task, which Ray does again where its process or machine is lost, up to `MAX_RETRIES` times. At
most `num_workers` tasks run at once. What is shared goes to Ray's object store once, and each process keeps what it
fetched.
"""

import importlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlkd.errors import UserError
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

_kept: dict[Any, Any] = {}  # in a worker: what it fetched from the object store


class RayWorkers:
    """Implements `Workers` by Ray tasks; a context manager.

    Args:
        num_workers: tasks at once; by default one for every processor of the cluster.
        address: of a running cluster, as `ray start --head` prints it, or `auto`; by default one is started here.
        gpu_share: of a GPU for each task.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, num_workers: int | None = None, address: str | None = None, gpu_share: float = 0.0) -> None:
        self._ray = ray = _import_ray()
        self._is_own = not ray.is_initialized()
        if self._is_own:
            _connect(ray, num_workers, address)
        self._gpu_share = gpu_share
        available = ray.cluster_resources()
        self._num_workers = num_workers or max(1, int(available.get("CPU", 1)))
        if gpu_share > available.get("GPU", 0.0):
            self.__exit__()
            raise UserError(f"--gpu_share: got {gpu_share:g}, but the cluster has no GPU; leave it out")
        self._shared: list[Any] = []
        self._references: list[Any] = []
        options = {"num_cpus": 1, "num_gpus": gpu_share, "max_retries": MAX_RETRIES}
        self._task = ray.remote(**options)(_do)

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_own:
            self._ray.shutdown()

    def share(self, value: Any) -> Shared:
        """As `Workers.share`."""
        for key, before in enumerate(self._shared):
            if before is value:
                return Shared(key)
        self._shared.append(value)
        self._references.append(self._ray.put(value))
        return Shared(len(self._shared) - 1)

    def run(self, works: Sequence[Work[Value]], on_window: Callable[[int], object] = ignore) -> Iterator[Value]:
        """As `Workers.run`."""
        waiting = deque(sorted(range(len(works)), key=lambda i: -works[i].size))
        values: dict[int, Value] = {}
        running: dict[Any, int] = {}  # references of answers
        try:
            next_up = 0
            while next_up < len(works):
                while waiting and len(running) < self._num_workers:
                    index = waiting.popleft()
                    running[self._started(works[index])] = index
                for reference in self._ray.wait(list(running))[0]:
                    index = running.pop(reference)
                    values[index] = value_of(self._answer(reference, works[index]), works[index])
                    works[index].report(on_window)
                while next_up in values:
                    yield values.pop(next_up)
                    next_up += 1
        except BaseException:
            for reference in running:  # what they still do is of no use
                self._ray.cancel(reference, force=True)
            raise

    def _started(self, work: Work[Any]) -> Any:
        # in a dict, references stay references: a process fetches only what it lacks
        shared = {a.key: self._references[a.key] for a in work.arguments if isinstance(a, Shared)}
        return self._task.remote(work.function, work.arguments, shared, self._gpu_share)

    def _answer(self, reference: Any, work: Work[Any]) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            words = " ".join(str(error).split())
            raise WorkerError(
                f"{named(work)}: its worker was lost {MAX_RETRIES + 1} times ({words:.200}); look whether the "
                "machines' memory is too small for so many workers"
            ) from error
        return outcome


def _do(function: Callable[..., Any], arguments: Sequence[Any], shared: dict[int, Any], gpu_share: float) -> Outcome:
    """Do a piece of work in a process of the cluster."""
    import ray

    def compute() -> Any:
        prepare_worker(gpu_share)
        for reference in shared.values():
            if reference not in _kept:
                _kept[reference] = ray.get(reference)
        values = {key: _kept[reference] for key, reference in shared.items()}
        return function(*insert(arguments, values), on_window=ignore)

    return attempt(compute)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody unless the user asks for it
    try:
        with _own_sigterm():  # Ray's import takes SIGTERM
            return importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--workers ray needs the package ray; run `pip install 'rlkd[ray]'`") from error


def _connect(ray: Any, num_workers: int | None, address: str | None) -> None:
    own: dict[str, Any] = {"address": "local", "include_dashboard": False}  # else Ray joins a cluster that runs here
    if address is None and num_workers is not None:
        own["num_cpus"] = num_workers
    given = own if address is None else {"address": address}
    try:
        with _own_sigterm():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=True, **given)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if "AuthToken" in f"{error} {error.__cause__}":
            raise UserError(
                f"--ray_address: the cluster at {address} asks for a token; set RAY_AUTH_MODE=token, with its "
                "~/.ray/auth_token on this machine"
            ) from error
        words = " ".join(str(error).split())
        where = f"--ray_address: no cluster answers at {address!r}" if address else "--workers ray: Ray does not start"
        raise UserError(f"{where} ({words:.200}); start one by `ray start --head`") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does at SIGTERM, which Ray sets, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
