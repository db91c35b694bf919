import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlkd.errors import UserError
from rlkd.io.lock import LOCK, hold, process_start, read_owner
from rlkd.runs.folder import run_folder

HOLDER = """
import sys
from pathlib import Path
from rlkd.io.lock import hold
from rlkd.errors import UserError
print("ready", flush=True)
sys.stdin.readline()
try:
    with hold(Path(sys.argv[1]), resume=len(sys.argv) > 2):
        print("got it", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""


def holder(folder: Path, *resume: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *resume], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert answer(process) == "ready"
    return process


def answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
def test_of_several_runs_at_once_exactly_one_gets_the_folder(tmp_path: Path) -> None:
    runs = [holder(tmp_path) for _ in range(4)]
    for run in runs:
        go(run)
    answers = [answer(run) for run in runs]
    assert answers.count("got it") == 1
    owner = runs[answers.index("got it")]
    for said in answers:
        assert said == "got it" or f"is in use by another run (process {owner.pid} on " in said, said
    go(owner)
    for run in runs:
        run.communicate()
    assert not list(tmp_path.iterdir())  # the lock went with its owner


def test_a_lock_that_is_only_just_made_is_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path):
        content = (tmp_path / LOCK).read_bytes()
        (tmp_path / LOCK).write_bytes(b"")
        writer = threading.Timer(0.2, (tmp_path / LOCK).write_bytes, [content])
        writer.start()
        assert read_owner(tmp_path)["pid"] == os.getpid()
        writer.join()


def test_a_lock_that_a_killed_run_left_is_recognised(tmp_path: Path) -> None:
    run = holder(tmp_path)
    go(run)
    assert answer(run) == "got it"
    since = read_owner(tmp_path)["since"]
    run.kill()
    run.communicate()
    with pytest.raises(UserError, match=rf"what a run left that died \(process {run.pid} on .*, since {since[:10]}"):
        hold(tmp_path).__enter__()
    assert (tmp_path / LOCK).exists()  # nobody's work is cleared away unasked


@pytest.mark.slow
def test_of_several_that_resume_a_killed_run_exactly_one_takes_its_lock_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / LOCK).write_text(json.dumps({"pid": 2**31 - 1, "host": platform.node(), "since": "", "ticks": None}))
    runs = [holder(tmp_path, "resume") for _ in range(4)]
    for run in runs:
        go(run)
    answers = [answer(run) for run in runs]
    assert answers.count("got it") == 1
    owner = runs[answers.index("got it")]
    assert read_owner(tmp_path)["pid"] == owner.pid
    for said in answers:
        assert said == "got it" or "is in use by another run" in said or "just going on with it" in said, said
    go(owner)
    for run in runs:
        run.communicate()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]  # the lock went, the work is there


def test_a_run_that_is_alive_is_not_resumed(tmp_path: Path) -> None:
    with (
        hold(tmp_path),
        pytest.raises(UserError, match=r"--resume: .* is in use by another run .*; wait for it, or delete run.lock"),
    ):
        hold(tmp_path, resume=True).__enter__()
    (tmp_path / LOCK).write_text("torn")
    with pytest.raises(UserError, match=r"delete run\.lock if no run works there"):
        hold(tmp_path, resume=True).__enter__()
    assert (tmp_path / LOCK).read_text() == "torn"
    (tmp_path / LOCK).unlink()
    with hold(tmp_path, resume=True):  # one that ended in an orderly way left no lock
        assert read_owner(tmp_path)["pid"] == os.getpid()


def test_a_number_that_another_process_was_given_since_is_no_owner(tmp_path: Path) -> None:
    with hold(tmp_path):
        owner = json.loads((tmp_path / LOCK).read_text())
    start = process_start(os.getpid())
    if start is None:
        pytest.skip("this system does not tell when a process began")
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with pytest.raises(UserError, match="is in use by another run"):
        hold(tmp_path).__enter__()
    (tmp_path / LOCK).write_text(json.dumps({**owner, "ticks": start - 1}))
    with pytest.raises(UserError, match="what a run left that died"):
        hold(tmp_path).__enter__()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "elsewhere"}, "belongs to a run on another machine .process .* on elsewhere"),
        ({"pid": 0}, "is in use by another run .*pid is 0"),  # kill(0, 0) would ask our own group
        ({"pid": 2**31 - 1}, "what a run left that died"),
        ({"ticks": "x"}, "is in use by another run .*ticks"),
    ],
)
def test_foreign_and_damaged_locks_are_told_apart(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with hold(tmp_path):
        owner = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**owner, **change}))
    with pytest.raises(UserError, match=words):
        hold(tmp_path).__enter__()


def test_the_lock_goes_when_a_run_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with hold(tmp_path):
            assert (tmp_path / LOCK).exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_with_content_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="exists and is not empty"), hold(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(UserError, match="exists and is no folder"), run_folder(tmp_path / "result.json", "train"):
        pass
    with (
        pytest.raises(UserError, match=r"cannot write .*choose another folder"),
        run_folder(tmp_path / "result.json" / "deeper", "train"),
    ):
        pass


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda text, *_: "20260102-030405")
    with run_folder(None, "train") as first, run_folder(None, "train") as second:
        assert (first.name, second.name) == ("train-20260102-030405", "train-20260102-030405-2")


def test_a_run_that_looked_before_another_one_locked_does_not_get_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(tmp_path):
        monkeypatch.setattr("rlkd.io.lock._refuse_content", lambda *_, **__: None)  # it saw an empty folder
        with pytest.raises(UserError, match="is in use by another run"):
            hold(tmp_path).__enter__()
        assert read_owner(tmp_path)["pid"] == os.getpid()


def test_a_run_that_came_and_went_between_look_and_lock_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleave(path: Path, *args: int) -> int:
        (tmp_path / "result.json").write_text("{}")
        return real(path, *args)

    real = os.open
    monkeypatch.setattr("rlkd.io.lock.os.open", interleave)
    with pytest.raises(UserError, match="exists and is not empty"):
        hold(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
