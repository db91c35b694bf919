"""Kill training runs at random moments, resume them, and see that each ends as if nobody had killed it.

    python experiments/crash.py                                    # 50 runs, each killed once or twice
    python experiments/crash.py --write docs/results/crash.md      # the same, with its figures written down

A run is the default job in small, a process of its own, and a kill is SIGKILL: nothing in it can react. It comes at a
moment that is uniform over the run's length, or over its share of that if the run is killed more than once. Then the
run is resumed, and at its end the policy's checksum, `metrics.jsonl`, the student and `result.json` less what a clock
read are compared with those of a run that nobody killed. Processes are forked from this one, which saves them the time
of imports; every fifth run consists of interpreters of their own.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import rlkd.cli.train  # noqa: F401 - not for this process: children are forked with it
from rlkd.cli.main import main
from rlkd.io.checkpoints import Checkpoints
from rlkd.io.files import write_whole
from rlkd.io.journal import FOLDER, NAME

# every phase of the default job, on its data set, in seconds
SCENARIO = (
    "{num_windows: 3, train: {steps_per_window: 5, batch_size: 32}, teacher: {num_samples: [40, 897], num_steps: 60}"
)
JOB = [
    *("--config", "smoke", "--scenarios", f"[{SCENARIO}}}]"),
    *("--validation", f"[{SCENARIO}, student: {{widths: [12, 8]}}}}]"),
    *("--ppo.num_iterations", "8", "--ppo.batch_size", "24", "--comparison.num_tasks", "8"),
]
EXACT = (
    "policy/policy.safetensors",
    "metrics.jsonl",
    "evaluations.jsonl",
    "student/student.safetensors",
    "policy/bundle.json",
)
CLOCKS = ("wall_s", "trainings_per_s", "measured")
MAX_S = 600.0  # of one process; a run takes seconds


@dataclass
class Killed:
    """One run: where each kill found it, and what differs at its end."""

    moments: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    sha256: str = ""


def job(arguments: list[str], log: Path, cache: Path) -> None:
    """What a child process does: `rlkd train`, what it says going to a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["RLKD_CACHE"] = str(cache)
    sys.exit(main(["train", *arguments]))


def start(folder: Path, seed: int, cache: Path, fresh: bool) -> BaseProcess:
    """Begin the job in `folder`, or go on with it; in an interpreter of its own if `fresh`."""
    new = [*JOB, "--seed", str(seed), "--out", str(folder)]
    arguments = ["--resume", str(folder)] if (folder / "config.yaml").exists() else new
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    process = context.Process(target=job, args=(arguments, folder.parent / f"{folder.name}.log", cache))
    process.start()
    return process


def finish(folder: Path, seed: int, cache: Path, fresh: bool) -> None:
    """Run the job to its end; AssertionError with the end of its log if it fails."""
    process = start(folder, seed, cache, fresh)
    process.join(MAX_S)
    log = (folder.parent / f"{folder.name}.log").read_text(errors="replace")
    assert process.exitcode == 0, f"{folder.name} ended with {process.exitcode}: {log[-2000:]}"


def kill_after(process: BaseProcess, folder: Path, wait_s: float) -> bool:
    """Kill the process `wait_s` after there is something to resume; False if it came to its end before."""
    while not (folder / "versions.json").exists() and process.is_alive():
        time.sleep(0.01)
    process.join(wait_s)
    process.kill()
    process.join(MAX_S)
    return process.exitcode == -signal.SIGKILL


def entries(folder: Path) -> list[dict[str, Any]]:
    """The whole entries of a run's journal."""
    journal = folder / FOLDER / NAME
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [json.loads(line.split(" ", 1)[1]) for line in lines if line.endswith("}")]


def moment(folder: Path) -> str:
    """What the run had finished when it was killed."""
    labels = [entry["label"] for entry in entries(folder)]
    if "PPO" in labels:
        return "comparison" if labels[-1] != "PPO" else "just after PPO"
    saved = Checkpoints(folder / FOLDER, 2).newest()
    if saved:
        return "PPO, after some updates"
    if "observations" in labels:
        return "PPO, before its first update"
    return "search for the start" if len(labels) > 1 else "before the first training was over"


def compare(folder: Path, whole: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    names = [name for name in EXACT if (folder / name).read_bytes() != (whole / name).read_bytes()]
    ours, theirs = (without_clocks(json.loads((f / "result.json").read_text())) for f in (folder, whole))
    return names + ["result.json"] * (ours != theirs)


def without_clocks(tree: Any) -> Any:
    """The tree less what a clock read."""
    return {k: without_clocks(v) for k, v in tree.items() if k not in CLOCKS} if isinstance(tree, dict) else tree


def harness(num_runs: int, most_kills: int, min_kills: int, *, seed: int, work: Path) -> list[Killed]:
    """Kill runs, each one to `most_kills` times; work in an empty folder.

    Args:
        num_runs: at least so many runs, each of which was killed.
        most_kills: of one run.
        min_kills: at least so many kills in all; further runs make up for what is missing.
        seed: of the job and of the moments.
        work: an empty folder.
    """
    r = random.Random(seed)
    cache, whole = work / "cache", work / "whole"
    finish(whole, seed, cache, fresh=True)  # also trains teachers and times students, which the cache then has
    total_s = json.loads((whole / "timing.jsonl").read_text().splitlines()[-1])["wall_s"]
    duration_s = total_s - entries(whole)[0]["elapsed_s"]  # less that
    runs: list[Killed] = []
    for number in itertools.count():
        if len(runs) >= num_runs and sum(len(run.moments) for run in runs) >= min_kills:
            return runs
        folder, run, wanted, fresh = work / f"run{number}", Killed(), r.randint(1, most_kills), number % 5 == 4
        for _ in range(wanted):
            wait_s = r.uniform(0.0, duration_s * 2 / (wanted + 1))
            if not kill_after(start(folder, seed, cache, fresh), folder, wait_s):
                break
            run.moments.append(moment(folder))
        if run.moments:  # else it was faster than its first kill and does not count
            finish(folder, seed, cache, fresh)
            run.differs = compare(folder, whole)
            run.sha256 = json.loads((folder / "result.json").read_text())["policy_sha256"]
            runs.append(run)
            print(f"run {len(runs)}: {'; '.join(run.moments)}: {', '.join(run.differs) or 'the same end'}", flush=True)
    raise AssertionError("unreachable")


def page(runs: list[Killed], command: str, wall_s: float) -> str:
    """The figures as Markdown."""
    same = sum(not run.differs for run in runs)
    moments = Counter(moment for run in runs for moment in run.moments)
    rows = "\n".join(f"| {name} | {count} |" for name, count in moments.most_common())
    ends = Counter(run.sha256 for run in runs)
    hashes = ", ".join(f"`{sha256[:16]}` ({count} runs)" for sha256, count in ends.items())
    host = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    return (
        "# Killed runs\n\n"
        f"{len(runs)} runs of `rlkd train`, killed {sum(moments.values())} times by SIGKILL at random moments and resumed "
        f"each time: {same} of {len(runs)} ended with the policy, `metrics.jsonl`, student and `result.json` (less what a "
        "clock read) of the run that nobody killed, byte for byte. Checksums of their policies: "
        f"{hashes}.\n\n| what the run was in | kills |\n|---|---|\n{rows}\n\n"
        f"Job: `rlkd train {' '.join(JOB)}`.\n\n"
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, {wall_s:.0f} s ({host}). `tests/test_crash.py` kills a run "
        "five times.\n"
    )


def command_line() -> int:
    """Parse, run, print, write; 0 if every run ended the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs that are killed")
    parser.add_argument("--kills", type=int, default=2, help="most kills of one run; at least one")
    parser.add_argument("--min_kills", type=int, default=50, help="kills in all; further runs if they are fewer")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the moments")
    parser.add_argument("--write", type=Path, default=None, help="also write the page to this file")
    given = parser.parse_args()
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        runs = harness(given.runs, given.kills, given.min_kills, seed=given.seed, work=Path(work))
    command = f"python experiments/crash.py --runs {given.runs} --kills {given.kills} --seed {given.seed}"
    text = page(runs, command, time.perf_counter() - began_s)
    print(text)
    if given.write:
        write_whole(given.write, text)
    return int(any(run.differs for run in runs))


if __name__ == "__main__":
    sys.exit(command_line())
