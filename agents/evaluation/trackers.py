"""Experiment trackers beside TensorBoard: Weights & Biases, MLflow, trackio. Off unless asked for.

A tracker gets what the event files get. `tracking` opens those that the user names for everything that runs inside its
block; `rlkd.agents.evaluation.tensorboard.new_logger` adds them to each logger that it makes there.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from stable_baselines3.common.logger import KVWriter

from rlkd.errors import UserError
from rlkd.io.records import flatten, plain

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One run at a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values by tag at a step."""

    def finish(self) -> None:
        """End the run."""


class WandbTracker:
    """A run at Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        wandb = _package("wandb")
        self._run: Any = wandb.init(project=project, name=name, config=dict(config), dir=str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values; the step is a value of its own, because those of evaluations and rollouts interleave."""
        self._run.log({**values, "global_step": step})

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class MlflowTracker:
    """A run at MLflow, where `MLFLOW_TRACKING_URI` says; by default in `mlflow.db`, in the working folder."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        self._mlflow: Any = _package("mlflow")
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params({key: str(value)[:500] for key, value in flatten(config).items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class TrackioTracker:
    """A run at trackio, on this machine."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        self._trackio: Any = _package("trackio")
        self._trackio.init(project=project, name=name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        self._trackio.log({**values, "global_step": step})

    def finish(self) -> None:
        """End the run."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[str, str, Mapping[str, Any], Path], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
_open: ContextVar[tuple[Tracker, ...]] = ContextVar("trackers", default=())


class TrackerOutput(KVWriter):
    """Hands what a logger of stable-baselines3 writes to the open trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Send the numbers among the values."""
        numbers = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if numbers:
            for tracker in self._trackers:
                tracker.log(numbers, step)

    def close(self) -> None:
        """Leave the trackers open: a run may have several loggers."""


def parse_names(text: str | None) -> tuple[str, ...]:
    """Read names of trackers, separated by commas.

    Raises:
        UserError: an unknown one.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise UserError(f"--track: got {unknown[0]!r}; allowed: {', '.join(TRACKERS)}")
    return names


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: Any, project: str = "rlkd") -> Iterator[None]:
    """Open the named trackers inside the block; each run has the folder's name and the whole config.

    Raises:
        UserError: a package is not installed, or the tracker cannot be reached.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(TRACKERS[name](project, folder.resolve().name, plain(config), folder))
        except UserError:
            raise
        except Exception as error:  # every tracker has errors of its own: no network, no account
            raise UserError(f"--track {name}: cannot begin a run ({' '.join(str(error).split()):.400})") from error
    token = _open.set(tuple(opened))
    try:
        yield
    finally:
        _open.reset(token)
        for tracker in opened:
            tracker.finish()


def outputs() -> list[KVWriter]:
    """Return the output of a logger for the trackers that are open; empty where none is."""
    return [TrackerOutput(_open.get())] if _open.get() else []


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--track {name}: needs the package {name}; run `pip install 'rlkd[{name}]'`") from error
