"""Kill a random worker of training runs at a random moment, and see that each ends with the bytes of an undisturbed run.

    python experiments/lost_workers.py --runs 20 --workers processes     # one line a run
    python experiments/lost_workers.py --runs 20 --workers ray --write docs/results/lost_workers.md

A run is `rlkd train` in small, every phase of it, with two workers. The kill is SIGKILL to one of the two, chosen at
random, at a moment that is uniform over the time that an undisturbed run with workers takes. The undisturbed run that all
are compared with has no workers.
"""

import argparse
import json
import logging
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from crash import EXACT, without_clocks

from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.ppo.train import PPOConfig
from rlkd.configs import ComparisonConfig, ExperimentConfig
from rlkd.configs.schema import ScenarioConfig
from rlkd.io.files import write_whole
from rlkd.models import StudentConfig
from rlkd.runs.train import train_experiment
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig
from rlkd.workers import Workers, WorkersConfig, open_workers

NUM_WORKERS = 2


class Quiet:
    """Reports the phase of a run to nobody but the harness."""

    def __init__(self) -> None:
        self.now = "start"

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Keep the name."""
        self.now = name

    def advance(self, num_students: int) -> None:
        """Show nothing."""

    def figures(self, **values: float) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Killed:
    """One run."""

    phase: str  # in which the worker was killed
    is_hit: bool  # whether there was a worker to kill
    redone: int  # pieces of work that were lost and done again, as far as the main process knows
    differs: tuple[str, ...]


def job() -> ExperimentConfig:
    """Every phase in seconds: two scenarios, two chunks each."""
    main = ScenarioConfig(
        num_windows=3, teacher=TeacherConfig(num_samples=(40, 897), num_steps=60), train=TrainConfig(4, 16)
    )
    other = ScenarioConfig(
        dataset="generated:classes=4,inputs=6",
        num_windows=3,
        warm_windows=1,
        student=StudentConfig(widths=(8, 8)),
        teacher=TeacherConfig(num_samples=(40, 0), num_steps=60),
        train=TrainConfig(4, 16),
    )
    return ExperimentConfig(
        scenarios=(main, other),
        validation=(ScenarioConfig(**{**vars(main), "student": StudentConfig(widths=(12, 8))}),),
        search=SearchConfig(5, 4, 2, 4),
        ppo=PPOConfig(
            num_students=8,
            num_tasks=6,
            num_iterations=4,
            batch_size=16,
            num_epochs=2,
            hidden=16,
            evaluate_every=2,
            num_evaluation_tasks=4,
        ),
        comparison=ComparisonConfig(4, (0.98,)),
        chunk_students=4,
    )


def pids_of(kind: str, workers: Workers) -> list[int]:
    """Process numbers of the workers that there are now."""
    if kind == "processes":
        return list(workers.pids)  # type: ignore[attr-defined]
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.name().startswith("ray::") and "_do" in child.name()]


def killed_run(folder: Path, kind: str, wait_s: float, r: random.Random) -> tuple[Quiet, str, bool]:
    """Run the job; kill a worker after `wait_s` of the run, or as soon after that as one works."""
    progress, ended = Quiet(), threading.Event()
    seen: list[str] = []

    def kill(workers: Workers) -> None:
        if ended.wait(wait_s):
            return
        while not ended.is_set():
            pids = pids_of(kind, workers)
            if pids:
                seen.append(progress.now)
                os.kill(r.choice(pids), signal.SIGKILL)
                return
            time.sleep(0.002)

    with open_workers(WorkersConfig(kind, NUM_WORKERS)) as workers:
        thread = threading.Thread(target=kill, args=(workers,))
        thread.start()
        folder.mkdir()
        try:
            train_experiment(job(), folder, 0, progress, workers=workers)
        finally:
            ended.set()
            thread.join()
    return progress, seen[0] if seen else "", bool(seen)


def differing(folder: Path, whole: Path) -> tuple[str, ...]:
    """Names of the files that differ."""
    exact = [name for name in (*EXACT, "config.yaml") if (folder / name).read_bytes() != (whole / name).read_bytes()]
    results: list[Any] = [without_clocks(json.loads((f / "result.json").read_text())) for f in (folder, whole)]
    return (*exact, *["result.json"] * (results[0] != results[1]))


class Redone(logging.Handler):
    """Counts the warnings of lost pieces."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one message."""
        self.count += "a worker is lost" in record.getMessage()


def harness(num_runs: int, kind: str, seed: int, work: Path, show: Callable[[str], object]) -> list[Killed]:
    """Kill one worker in each of `num_runs` runs that have one to kill."""
    r, runs = random.Random(seed), list[Killed]()
    os.environ["RLKD_CACHE"] = str(work / "cache")
    if kind == "ray":  # one cluster for all runs: it takes seconds to start
        import ray

        ray.init(num_cpus=NUM_WORKERS, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    (work / "whole").mkdir()
    train_experiment(job(), work / "whole", 0, Quiet())
    counter = Redone()
    logging.getLogger("rlkd.workers.processes").addHandler(counter)
    profiles = list((work / "whole").glob("cost_profile*.json"))
    began_s = time.perf_counter()
    with open_workers(WorkersConfig(kind, NUM_WORKERS)) as workers:
        (work / "timed").mkdir()
        train_experiment(job(), work / "timed", 0, Quiet(), workers=workers)
    duration_s = time.perf_counter() - began_s
    assert profiles
    assert not differing(work / "timed", work / "whole"), differing(work / "timed", work / "whole")
    number = 0
    while len(runs) < num_runs:
        number += 1
        folder, before = work / f"run{number}", counter.count
        _, phase, is_hit = killed_run(folder, kind, r.uniform(0, 0.9 * duration_s), r)
        run = Killed(phase, is_hit, counter.count - before, differing(folder, work / "whole"))
        if run.is_hit:  # else the run was over before its kill and does not count
            runs.append(run)
            show(
                f"run {len(runs)}: killed in {run.phase}; redone {run.redone}: {', '.join(run.differs) or 'the same end'}"
            )
    return runs


def page(tables: dict[str, list[Killed]], command: str, wall_s: float) -> str:
    """Return the results as Markdown."""
    text = "# Lost workers\n\n"
    for kind, runs in tables.items():
        same = sum(not run.differs for run in runs)
        phases = sorted({run.phase for run in runs})
        text += (
            f"`--workers {kind}`: {len(runs)} runs of `rlkd train`, in each of which one of {NUM_WORKERS} workers was killed by "
            f"SIGKILL at a random moment: {same} of {len(runs)} ended with the bytes of an undisturbed run without workers "
            "(policy, `metrics.jsonl`, `evaluations.jsonl`, student, `result.json` less what a clock read).\n\n"
            "| phase | kills |\n|---|---|\n"
        )
        text += "".join(f"| {p} | {sum(run.phase == p for run in runs)} |\n" for p in phases) + "\n"
        if kind == "processes":
            busy = sum(run.redone > 0 for run in runs)
            text += f"In {busy} of the runs the killed worker had a piece of work, which was done again.\n\n"
    host = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    return text + f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, {wall_s:.0f} s ({host}).\n"


def main() -> int:
    """Parse, run, print, write; 0 if all runs end the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="runs in which a worker is killed, of each kind")
    parser.add_argument("--workers", default="processes,ray", help="kinds, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--write", type=Path, default=None, help="also write the page to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    tables = {}
    for kind in given.workers.split(","):
        with tempfile.TemporaryDirectory() as work:
            tables[kind] = harness(given.runs, kind, given.seed, Path(work), lambda line: print(line, flush=True))
    command = f"python experiments/lost_workers.py --runs {given.runs} --workers {given.workers} --seed {given.seed}"
    text = page(tables, command, time.perf_counter() - began_s)
    print(text)
    if given.write:
        write_whole(given.write, text)
    return int(any(run.differs for runs in tables.values() for run in runs))


if __name__ == "__main__":
    sys.exit(main())
