"""Two runs never share a folder: whoever works in one holds `run.lock` in it, which names its owner."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkd.errors import UserError
from rlkd.files import parse_json, read_bytes, reason, whole, write_error

LOCK = "run.lock"


@contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """Hold the lock of an existing, empty folder; it goes when the run ends, however it ends, unless it is killed.

    Raises:
        UserError: another run holds the lock or left it, or the folder is not empty or cannot be written.
    """
    _refuse_content(folder)
    path = folder / LOCK
    owner = {"pid": os.getpid(), "host": platform.node(), "since": _now(), "ticks": process_start(os.getpid())}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # exactly one of several gets it
    except FileExistsError:
        raise UserError(_taken(folder)) from None
    except OSError as error:
        raise UserError(f"--out: cannot write {folder} ({error.strerror}); choose another folder") from error
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(owner).encode() + b"\n")
        _refuse_content(folder, mine=True)  # another run may have come and gone since the first look
        yield folder
    except OSError as error:
        if error.errno is None or error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise write_error(folder, error) from error  # a full disk, told by a write that knows no name
    finally:
        path.unlink(missing_ok=True)


def _refuse_content(folder: Path, mine: bool = False) -> None:
    names = {path.name for path in folder.iterdir()}
    if LOCK in names and not mine:
        raise UserError(_taken(folder))
    if names - {LOCK}:
        raise UserError(f"--out: {folder} exists and is not empty; choose another folder or move it away")


def _taken(folder: Path) -> str:
    """Who has the lock, and whether that run can still be alive."""
    try:
        owner = read_owner(folder)
    except UserError as error:
        return f"--out: {folder} is in use by another run ({error}); choose another folder"
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    if owner["host"] != platform.node():
        return f"--out: {folder} belongs to a run on another machine ({who}); choose another folder, or move it away"
    if is_alive(owner):
        return f"--out: {folder} is in use by another run ({who}); choose another folder"
    return f"--out: {folder} holds what a run left that died ({who}); choose another folder or move it away"


def read_owner(folder: Path) -> dict[str, Any]:
    """`pid`, `host`, `since` and `ticks` of the folder's lock; UserError if there is none or it cannot be read."""
    path = folder / LOCK
    for _ in range(20):
        try:
            if path.stat().st_size > 0:
                break
        except OSError:  # gone meanwhile; reading it says so
            break
        time.sleep(0.05)  # its owner has made it and is about to write
    owner = parse_json(read_bytes(path, 4096), f"{path}: not a lock")
    try:
        whole(owner["pid"], "pid", 1, 2**31)
        if owner["ticks"] is not None:
            whole(owner["ticks"], "ticks", 0, 2**63)
        return {"pid": owner["pid"], "host": str(owner["host"]), "since": str(owner["since"]), "ticks": owner["ticks"]}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a lock, or a damaged one ({reason(error):.60})") from error


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process still runs on this machine; another one that was given its number since does not count."""
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    ticks = process_start(owner["pid"])
    return ticks is None or owner["ticks"] is None or ticks == owner["ticks"]


def process_start(pid: int) -> int | None:
    """When the process began, in clock ticks since the machine started; None where /proc does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
