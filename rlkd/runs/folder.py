"""The run folder: what every verb writes beside its result, and how figures get into it."""

import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

import rlkd
from rlkd.errors import GoalError, UserError, WriteError
from rlkd.io.files import write_whole
from rlkd.io.lock import hold
from rlkd.io.records import plain, write_json


class Progress(Protocol):
    """Where long work reports to; the command line shows a bar."""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Begin a part of the run: `num_trainings` student trainings of `num_windows` windows each."""

    def advance(self, num_students: int) -> None:
        """Count one window of `num_students` students."""

    def figures(self, **values: float) -> None:
        """Show the present metrics."""


# what a run writes before its first training, and what there is only after it
START_FILES = (
    *("config.yaml", "command.txt", "versions.json", "cost_profile*.json", "mapping.txt", "tensorboard"),
    "given",  # models and data that were handed over in Python
)
RESULTS = ("checkpoints", "metrics.jsonl", "result.json")


@contextmanager
def run_folder(out: Path | None, verb: str, resume: Path | None = None) -> Iterator[Path]:
    """Make the run folder, `out` or `runs/<verb>-<time>`, or take `resume`, and hold it alone until the run ends.

    A run that fails before its first training, or whose goal no student can meet, leaves nothing behind, so that the
    corrected command can use the folder.

    Raises:
        UserError: it holds a run already, or another run works in it, or it cannot be written.
    """
    if resume is not None:
        with hold(resume, resume=True):
            yield resume
        return
    folder = out or new_folder(verb)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--out: {folder} exists and is no folder; choose another folder") from error
    except OSError as error:
        raise UserError(f"--out: cannot write {folder} ({error.strerror}); choose another folder") from error
    try:
        with hold(folder):
            try:
                yield folder
            except Exception as error:
                if isinstance(error, GoalError):
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                if not isinstance(error, WriteError | OSError):
                    _clear_failed_start(folder)
                raise
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _clear_failed_start(folder: Path) -> None:
    """Delete what the run wrote, unless anything of it was trained."""
    if any((folder / name).exists() for name in RESULTS):
        return
    for path in [path for pattern in START_FILES for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def new_folder(verb: str) -> Path:
    """Return `runs/<verb>-<time>`, with a number behind it if runs began in the same second; it is not made yet."""
    folder = Path("runs") / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))
    return next((path for path in (folder, *names) if not path.exists()), folder)


def describe_run(
    folder: Path,
    config: Any,
    seed: int,
    extra: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
    write: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Write `config.yaml`, `command.txt` and `versions.json`, with those of `extra` packages; returns the versions.

    Args:
        folder: of the run.
        config: with `seed` and `options` (other options of the verb) it holds all that the run needs to be resumed.
        seed: of the run.
        extra: packages that the run uses besides.
        options: as above.
        write: write the files; otherwise only return the versions.
        command: content of `command.txt`; by default the command line.
    """
    names = ("torch", "numpy", "gymnasium", "stable_baselines3", "safetensors", "scikit-learn", *extra)
    versions: dict[str, Any] = {
        "rlkd": rlkd.__version__,
        "python": platform.python_version(),
        **{n: version(n) for n in names},
    }
    versions |= git_state(Path(rlkd.__file__).resolve().parent.parent)
    if write:
        resolved = {"seed": seed, **(options or {}), **plain(config)}
        write_whole(folder / "command.txt", (command or shlex.join(["rlkd", *sys.argv[1:]])) + "\n")
        write_whole(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        write_json(folder / "versions.json", versions)
    return versions


def git_state(root: Path) -> dict[str, Any]:
    """`git_commit` of the checkout at `root`, and `git_changed`: whether it has changes; None outside of one."""
    call = ["git", "-C", str(root)]
    try:
        if not (root / ".git").exists():
            raise FileNotFoundError
        commit = subprocess.run([*call, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*call, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no checkout, no commit in it yet, or no git
        return {"git_commit": None, "git_changed": None}
    return {"git_commit": commit.strip(), "git_changed": bool(changes.strip())}


def use_one_thread() -> None:
    """One thread for torch: small students lose more to waiting threads than they gain (docs/decisions/0012)."""
    torch.set_num_threads(1)
