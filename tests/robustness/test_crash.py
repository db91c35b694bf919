"""A short run of experiments/crash.py, and proof that it would notice."""

import json
import subprocess
import sys
from pathlib import Path

from crash import EXACT, compare

CRASH = Path(__file__).parent.parent.parent / "experiments" / "crash.py"


def test_runs_that_are_killed_five_times_end_as_if_nobody_had() -> None:
    call = [sys.executable, str(CRASH), "--runs", "1", "--kills", "5", "--min_kills", "5", "--seed", "2"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=CRASH.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    assert all(line.endswith(": the same end") for line in lines), done.stdout
    assert sum(line.count(";") + 1 for line in lines) >= 5


def test_the_harness_notices_each_difference(tmp_path: Path) -> None:
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        for name in EXACT:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("same")
        (folder / "result.json").write_text(json.dumps({"score": 1.0, "cost": {"wall_s": len(str(folder))}}))
    assert compare(tmp_path / "cut", tmp_path / "whole") == []  # what a clock read may differ
    for name in EXACT:
        (tmp_path / "cut" / name).write_text("other")
        assert compare(tmp_path / "cut", tmp_path / "whole") == [name]
        (tmp_path / "cut" / name).write_text("same")
    (tmp_path / "cut" / "result.json").write_text(json.dumps({"score": 2.0, "cost": {"wall_s": 0.0}}))
    assert compare(tmp_path / "cut", tmp_path / "whole") == ["result.json"]
