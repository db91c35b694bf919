"""A short run of experiments/fuzz.py, and proof that it would notice."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import KINDS, MAX_MIB, fuzz

FUZZ = Path(__file__).parent.parent.parent / "experiments" / "fuzz.py"


def test_two_hundred_damaged_files_end_in_success_or_one_line() -> None:
    call = [sys.executable, str(FUZZ), "--num", "200", "--seed", "7"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=FUZZ.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 damaged files, 0 of which" in done.stdout
    assert f"limited to {MAX_MIB} MiB" in done.stdout
    accepted = 0
    for kind in KINDS:
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {kind} |"))
        accepted += int(row.split("|")[3])
        # of event files, all that can be read is read, and the rest is noted
        assert int(row.split("|")[4]) > 5 or "event files" in row, row
    assert accepted > 20  # damage that leaves a file sound is tried too


@pytest.mark.parametrize(
    ("kind", "guard", "seen"),
    [
        ("cost profile", "rlkd.io.files:_check_depth", "RecursionError"),
        ("student", "rlkd.compression.compact:_check_architecture", "Error"),
        ("policy bundle", "rlkd.agents.policy.bundle:_check_values", "AssertionError"),
    ],
)
def test_the_fuzzer_notices_a_guard_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, kind: str, guard: str, seen: str
) -> None:
    assert not fuzz(400, seed=7, only=kind)[kind].failures
    module, name = guard.split(":")
    monkeypatch.setattr(sys.modules[module], name, lambda *_: None)
    failures = fuzz(400, seed=7, only=kind)[kind].failures
    assert any(seen in failure for failure in failures), "what this guard is for was never tried"
