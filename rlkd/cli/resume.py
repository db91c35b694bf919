"""`--resume RUN`, shared by train, distil and compare: the run's own config, and what a stop says."""

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from rlkd.cli.arguments import check_seed, parse
from rlkd.cli.configfile import MAX_CONFIG_BYTES, plain_yaml
from rlkd.errors import UserError, WriteError
from rlkd.io.files import read_bytes
from rlkd.io.records import plain
from rlkd.runs.folder import run_folder
from rlkd.workers import WorkerError

Config = TypeVar("Config")
# options that say where something is or who does the work, not what the run does
ELSEWHERE = ("policy", "config", "resume", "out", "track", "workers", "num_workers", "ray_address", "gpu_share")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def resumed(argv: Sequence[str]) -> Path | None:
    """Return the folder that `--resume` names, or None."""
    for name in _values(argv, "--resume"):
        if not name or name.startswith("-"):
            raise UserError("--resume: got nothing; allowed: the folder of a run that was stopped")
        return Path(name)
    return None


def is_of_real_model(argv: Sequence[str]) -> bool:
    """Return whether a command, its config file, or the run that it resumes has `--data`."""
    if any(given.split("=")[0] == "--data" for given in argv):
        return True
    folder = resumed(argv)
    if folder is not None and (folder / "config.yaml").is_file():
        return _names_data(folder / "config.yaml", "--resume")
    files = [Path(file) for file in _values(argv, "--config") if Path(file).is_file()]
    with contextlib.suppress(UserError):  # of a file that the parser will refuse, in its own words
        return any(_names_data(file, "--config") for file in files)
    return False


def _names_data(file: Path, complaint: str) -> bool:
    tree = plain_yaml(read_bytes(file, MAX_CONFIG_BYTES).decode(errors="replace"), complaint)
    return isinstance(tree, dict) and "data" in tree


def _values(argv: Sequence[str], option: str) -> Iterator[str]:
    """Yield the values of an option, given as `--option VALUE` or `--option=VALUE`."""
    for given, following in zip(argv, [*argv[1:], ""], strict=False):
        if given == option or given.startswith(f"{option}="):
            yield following if given == option else given.partition("=")[2]


def parse_run(
    new: Callable[[], ArgumentParser], argv: Sequence[str], config_class: type[Config]
) -> tuple[Config, Namespace]:
    """Return config and options of a verb that runs; with `--resume` those with which the run began.

    Args:
        new: makes the verb's parser.
        argv: options.
        config_class: as of `parse`.

    Raises:
        UserError: as of `parse`; a folder that holds no run; an option that contradicts what the run began with.
    """
    folder = resumed(argv)
    if folder is None:
        config, options = parse(new(), argv, config_class)
    else:
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"--resume: {folder} holds no config.yaml, so no run that was stopped; start it anew")
        own = ["--config", str(file)]
        try:
            began = parse(new(), own, config_class)
        except UserError as error:
            raise UserError(
                f"--resume: {file} is no config of {new().prog} ({error}); go on with the verb that began the run, as "
                f"in {folder / 'command.txt'}"
            ) from error
        config, options = parse(new(), [*own, *argv], config_class)
        if options.out is not None:
            raise UserError(f"--out: got {options.out} with --resume {folder}; a run goes on in its own folder")
        _refuse_changes(folder, _flat(*began), _flat(config, options))
    assert config is not None
    check_seed(options.seed)
    return config, options


def _flat(config: Any, options: Namespace) -> dict[str, Any]:
    """Every value of config and options by its dotted name."""
    tree = {**{k: v for k, v in vars(options).items() if isinstance(v, int | float | str)}, **plain(config)}
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix[:-1]] = value

    walk("", {k: v for k, v in tree.items() if k not in ELSEWHERE})
    return flat


def _refuse_changes(folder: Path, began: dict[str, Any], given: dict[str, Any]) -> None:
    for name in given:
        if began.get(name) != given[name]:
            raise UserError(
                f"--{name}: got {given[name]!r:.60} with --resume, but {folder} began with {began.get(name)!r:.60}; "
                "leave it out, or start a new run"
            )


@contextlib.contextmanager
def resumable_folder(options: Namespace, verb: str, out: Path | None = None) -> Iterator[Path]:
    """`run_folder`; a run in it that is stopped or cannot write says how to go on, and SIGTERM stops as Ctrl-C does.

    What is finished is on the disk at any moment, so that there is nothing to do at a stop.
    """
    with run_folder(out, verb, options.resume) as folder, _sigterm_raises():
        try:
            yield folder
        except (KeyboardInterrupt, UserError) as error:
            can_go_on = isinstance(error, KeyboardInterrupt | WriteError | WorkerError)
            if can_go_on and (folder / "config.yaml").is_file():
                again = "go on with: " + shlex.join(["rlkd", verb, "--resume", str(folder)])
                error.args = (f"{error}; {again}" if str(error) else again,)
            raise


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may set it
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_finished(folder: Path, finished: bool) -> bool:
    """Tell the user of a run that is `finished`, and return `finished`."""
    if finished:
        print(f"rlkd: {folder} had come to its end; figures: {folder / 'result.json'}", file=sys.stderr)
    return finished
