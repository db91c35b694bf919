"""What a piece of work is, and who does it.

A piece is a whole batch of trainings with all that they depend on: it returns the same values wherever and however
often it runs. Results come back in the order of the pieces, so nothing depends on who did which, or when.
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any, Generic, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

import rlkd
from rlkd.errors import UserError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
MAX_RETRIES = 3  # of a piece of work whose worker is lost


class WorkerError(UserError):
    """Workers failed or were lost; what was finished before is kept, and the run can be resumed."""


def ignore(num_students: int) -> None:
    """Do nothing after a window."""


@dataclass(frozen=True)
class Work(Generic[Value]):
    """One batch of trainings that runs in lock-step."""

    key: tuple[int | str, ...]
    """Its place among all work of the run, such as (scenario, round, chunk); messages name it."""
    function: Callable[..., Value]
    """Called with `arguments` and `on_window`, which takes the number of students after every window."""
    arguments: tuple[Any, ...]
    """What `Workers.share` returned is replaced by the value."""
    num_students: int
    num_windows: int

    @property
    def size(self) -> int:
        """Student windows; the largest pieces begin first."""
        return self.num_students * self.num_windows

    def report(self, on_window: Callable[[int], object]) -> None:
        """Count the windows of a piece that ran elsewhere."""
        for _ in range(self.num_windows):
            on_window(self.num_students)


class Workers(Protocol):
    """Who does pieces of work."""

    def share(self, value: Any) -> Any:
        """Return what stands for `value` in arguments: it is sent to a worker once, and must not change afterwards."""

    def run(self, works: Sequence[Work[Value]], on_window: Callable[[int], object] = ignore) -> Iterator[Value]:
        """Do all pieces; yield their values in the same order, each as soon as those before it are there.

        Raises:
            UserError: a piece raised it.
            WorkerError: a piece raised another exception, or its workers were lost again and again.
        """


class InProcess:
    """No workers: every piece runs here, one after the other."""

    def share(self, value: Any) -> Any:
        """As `Workers.share`."""
        return value

    def run(self, works: Sequence[Work[Value]], on_window: Callable[[int], object] = ignore) -> Iterator[Value]:
        """As `Workers.run`, but exceptions come as they are."""
        pieces = [partial(work.function, *work.arguments, on_window=on_window) for work in works]
        return map(partial.__call__, pieces)  # each is done when its value is asked for


IN_PROCESS = InProcess()


@dataclass(frozen=True)
class Shared:
    """Stands for a value that workers keep."""

    key: int


def insert(arguments: Sequence[Any], values: Mapping[int, Any]) -> list[Any]:
    """Return the arguments with every `Shared` replaced by its value."""
    return [values[a.key] if isinstance(a, Shared) else a for a in arguments]


@dataclass(frozen=True)
class Outcome:
    """What a worker answers: a value, or one line about its failure."""

    value: Any = None
    error: str = ""
    is_users: bool = False  # whether the failure is a UserError
    versions: tuple[str, ...] = ()


def attempt(compute: Callable[[], Any]) -> Outcome:
    """Return the outcome of `compute` in a worker, whatever it raises."""
    try:
        return Outcome(value=compute(), versions=versions())
    except UserError as error:
        return Outcome(error=str(error), is_users=True)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())
        return Outcome(error=f"{type(error).__name__}: {words:.300} ({place.filename}:{place.lineno})")


def value_of(outcome: Outcome, work: Work[Value]) -> Value:
    """Return the value of an outcome; raises as `Workers.run` does."""
    if outcome.is_users:
        raise UserError(outcome.error)
    if outcome.error:
        raise WorkerError(f"a worker failed in {named(work)}: {outcome.error}")
    check_versions(outcome.versions)
    value: Value = outcome.value
    return value


def named(work: Work[Any]) -> str:
    """Return a piece of work in words."""
    return f"work {' '.join(map(str, work.key))}"


@cache
def versions() -> tuple[str, ...]:
    """Return what must be alike in all workers for the same bytes, and last the kind of processor."""
    packages = tuple(f"{name} {version(name)}" for name in ("torch", "numpy", "stable_baselines3"))
    return (f"rlkd {rlkd.__version__}", *packages, f"processor {torch.backends.cpu.get_cpu_capability()}")


@cache  # a worker says the same every time
def check_versions(there: tuple[str, ...]) -> None:
    """Warn of a worker with another kind of processor than this process; raise WorkerError for other versions."""
    differing = [f"{found}, here {own}" for found, own in zip(there, versions(), strict=True) if found != own]
    if differing and there[:-1] != versions()[:-1]:
        raise WorkerError(f"a worker has {'; '.join(differing)}; install the same versions on all machines")
    if differing:
        logger.warning(f"a worker has {differing[0]}: floats may round otherwise, so results may depend on who trains")


def prepare_worker(gpu_share: float) -> None:
    """Give this worker one thread, and at most its share of a GPU's memory."""
    threadpool_limits(1)
    torch.set_num_threads(1)
    if gpu_share > 0 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_share))
