"""Locks of run folders: `run.lock` names the process that works in a folder, so two runs never share one."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkd.errors import UserError
from rlkd.io.files import parse_json, read_bytes, reason, whole, write_error

LOCK = "run.lock"
OWNER_BYTES = 400  # every lock is this long


@contextmanager
def hold(folder: Path, resume: bool = False) -> Iterator[Path]:
    """Hold the lock of an existing folder; it is removed when the block ends, unless the process is killed.

    Args:
        folder: empty; with `resume` the folder of a run that ended or was killed, whose lock is taken over.
        resume: go on with the run in the folder.

    Raises:
        UserError: another run holds or left the lock, or the folder is not empty or cannot be written.
    """
    path = folder / LOCK
    owner = {"pid": os.getpid(), "host": platform.node(), "since": _now(), "ticks": process_start(os.getpid())}
    content = json.dumps(owner).encode().ljust(OWNER_BYTES) + b"\n"
    if resume and path.exists():
        _take_over(folder, content)
    else:
        _take(folder, content, resume)
    try:
        if not resume:
            _refuse_content(folder, is_own=True)  # another run may have come and gone since the first look
        yield folder
    except OSError as error:
        if error.errno is None or error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise write_error(folder, error) from error  # a full disk, reported by a write without a file name
    finally:
        path.unlink(missing_ok=True)


def _take(folder: Path, content: bytes, resume: bool) -> None:
    if not resume:
        _refuse_content(folder)
    try:
        # exactly one of several gets it
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise UserError(_taken(folder, resume)) from None
    except OSError as error:
        raise UserError(f"--out: cannot write {folder} ({error.strerror}); choose another folder") from error
    with open(descriptor, "wb") as file:
        file.write(content)


def _take_over(folder: Path, content: bytes) -> None:
    """Write this process into the lock of a run that died.

    The file is changed in place. If it were removed and made anew, two runs that both found it stale could remove each
    other's file. The kernel's lock on it lets them look one after the other, and the second one finds the first one's
    name.
    """
    path = folder / LOCK
    try:
        with path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_same = path.stat().st_ino == os.fstat(file.fileno()).st_ino  # its run has not just ended
            if not is_same or not _is_stale(folder):
                raise UserError(_taken(folder, resume=True))
            file.write(content)  # as long as the old one, and in one call: never torn
    except BlockingIOError as error:
        raise UserError(f"{folder}: another run is just going on with it; wait for it") from error
    except OSError as error:
        raise UserError(
            f"{folder}: cannot take over its {LOCK} ({error.strerror}); delete it if no run works there"
        ) from error


def _is_stale(folder: Path) -> bool:
    try:
        owner = read_owner(folder)
    except UserError:
        return False  # it cannot be decided
    return owner["host"] == platform.node() and not is_alive(owner)


def _refuse_content(folder: Path, is_own: bool = False) -> None:
    names = {path.name for path in folder.iterdir()}
    if LOCK in names and not is_own:
        raise UserError(_taken(folder))
    if names - {LOCK}:
        raise UserError(f"--out: {folder} exists and is not empty; choose another folder or move it away")


def _taken(folder: Path, resume: bool = False) -> str:
    """Return a message with the owner of the lock and whether its run can still be alive."""
    place = f"{'--resume' if resume else '--out'}: {folder}"
    elsewhere = "choose another folder"
    if resume:
        elsewhere = f"wait for it, or delete {LOCK} if no run works there"
    try:
        owner = read_owner(folder)
    except UserError as error:
        return f"{place} is in use by another run ({error}); {elsewhere}"
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    if owner["host"] != platform.node():
        move = "" if resume else ", or move it away"
        return f"{place} belongs to a run on another machine ({who}); {elsewhere}{move}"
    if resume or is_alive(owner):
        return f"{place} is in use by another run ({who}); {elsewhere}"
    return (
        f"{place} holds what a run left that died ({who}); go on with it by --resume {folder}, choose another folder "
        "or move it away"
    )


def read_owner(folder: Path) -> dict[str, Any]:
    """Read `pid`, `host`, `since` and `ticks` of the folder's lock; UserError if it is missing or cannot be read."""
    path = folder / LOCK
    for _ in range(20):
        try:
            if path.stat().st_size > 0:
                break
        except OSError:  # removed meanwhile; reading it raises the error
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
    """Whether the process still runs on this machine; a later process with the same number does not count."""
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        pass
    ticks = process_start(owner["pid"])
    return ticks is None or owner["ticks"] is None or ticks == owner["ticks"]


def process_start(pid: int) -> int | None:
    """Return the start of the process in clock ticks since the machine started; None without /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
