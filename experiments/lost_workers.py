"""Kill a random worker of training runs at a random moment, and see that each ends with the bytes of an undisturbed run.

    python experiments/lost_workers.py --runs 20 --workers processes     # one line a run
    python experiments/lost_workers.py --runs 20 --workers ray --write docs/results/lost_workers.md

A run is the search of the start and the policy training of `rlkd train` in small, with references, rollouts and evaluations,
by two workers. The kill is SIGKILL to one of the two, chosen at random, at a moment that is uniform over the time that an
undisturbed run takes, the start of its workers included. All are compared with an undisturbed run without workers.
"""

import argparse
import json
import logging
import os
import platform
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from rlkd.agents.baselines.search import SearchConfig, search_setting
from rlkd.agents.policy.controllers import RunOptions
from rlkd.agents.policy.policy import Policy
from rlkd.agents.ppo.train import Listeners, PPOConfig, Rollout, train
from rlkd.configs import ExperimentConfig
from rlkd.configs.schema import ScenarioConfig
from rlkd.envs.references import References
from rlkd.envs.scenario import Scenario, build_scenario
from rlkd.io.files import write_whole
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig
from rlkd.workers import IN_PROCESS, Workers, WorkersConfig, open_workers

NUM_WORKERS = 2


@dataclass(frozen=True)
class Killed:
    """One run."""

    part: str  # in which the worker was killed
    redone: int  # pieces of work that were lost and done again, as far as the main process knows
    is_same: bool  # whether it ended with the bytes of the undisturbed run


def job() -> ExperimentConfig:
    """Two scenarios in seconds, two chunks each."""
    main = ScenarioConfig(
        num_windows=3, teacher=TeacherConfig(num_samples=(40, 897), num_steps=60), train=TrainConfig(3, 16)
    )
    other = replace(
        main, dataset="generated:classes=4,inputs=6", warm_windows=1, student=StudentConfig(widths=(8, 8), exits=(1,))
    )
    return ExperimentConfig(
        scenarios=(main, other),
        validation=(replace(main, num_windows=2),),
        search=SearchConfig(5, 4, 2, 4),
        ppo=PPOConfig(
            num_students=6,
            num_tasks=6,
            num_iterations=4,
            batch_size=18,
            num_epochs=2,
            hidden=16,
            evaluate_every=2,
            num_evaluation_tasks=4,
        ),
        chunk_students=3,
    )


def trained(
    scenarios: Sequence[Scenario], validation: Sequence[Scenario], workers: Workers, at: Callable[[str], object]
) -> bytes:
    """Return start, metrics of every rollout, evaluations and last policy of one run, as bytes.

    Args:
        scenarios: whose references are trained anew.
        validation: likewise.
        workers: of the run.
        at: called with the part that begins.
    """
    config = job()
    groups = [[replace(s, known=References()) for s in group] for group in (scenarios, validation)]
    options = RunOptions(num_parallel=config.chunk_students, workers=workers)
    at("search")
    start = search_setting(groups[0], config.search, torch.Generator().manual_seed(1), options=options)
    groups = [[replace(s, start=start) for s in group] for group in groups]
    rows: list[Any] = []
    policies: list[Callable[[], Policy]] = []

    def on_rollout(rollout: Rollout, logger: Any) -> None:
        rows.append(asdict(rollout))
        at(f"after rollout {rollout.iteration}")

    listeners = Listeners(lambda n: None, on_rollout, lambda e: rows.append(asdict(e)), policies.append)
    at("policy training, before its first rollout ended")
    train(groups[0], config.ppo, 2, listeners=listeners, validation=groups[1], options=options)
    weights = policies[0]().weights
    tensors = b"".join(tensor.numpy().tobytes() for tensor in (start, *weights.values()))
    return tensors + json.dumps(rows).encode()


def pids_of(kind: str, workers: Workers) -> list[int]:
    """Process numbers of the workers that there are now."""
    if kind == "processes":
        return list(workers.pids)  # type: ignore[attr-defined]
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.name().startswith("ray::") and "_do" in child.name()]


def killed_run(run: Callable[..., bytes], kind: str, wait_s: float, r: random.Random) -> tuple[bytes, str]:
    """Return the bytes of a run, and the part in which a worker was killed, after `wait_s` or as soon as one works."""
    ended, parts, killed = threading.Event(), ["start"], list[str]()

    def kill(workers: Workers) -> None:
        if ended.wait(wait_s):
            return
        while not ended.is_set():
            pids = pids_of(kind, workers)
            if pids:
                killed.append(parts[-1])
                os.kill(r.choice(pids), signal.SIGKILL)
                return
            time.sleep(0.002)

    with open_workers(WorkersConfig(kind, NUM_WORKERS)) as workers:
        thread = threading.Thread(target=kill, args=(workers,))
        thread.start()
        try:
            found = run(workers, parts.append)
        finally:
            ended.set()
            thread.join()
    return found, "".join(killed)


class Redone(logging.Handler):
    """Counts the warnings of lost pieces."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one message."""
        self.count += "a worker is lost" in record.getMessage()


def harness(num_runs: int, kind: str, seed: int, show: Callable[[str], object]) -> list[Killed]:
    """Kill one worker in each of `num_runs` runs that have one to kill."""
    config = job()
    scenarios, validation = (
        [build_scenario(env) for env in config.envs(group)] for group in (config.scenarios, config.validation)
    )
    if kind == "ray":  # one cluster for all runs: it takes seconds to start
        import ray

        ray.init(
            address="local",  # else Ray joins a cluster that runs here, or ran
            num_cpus=NUM_WORKERS,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    run = partial(trained, scenarios, validation)
    whole = run(IN_PROCESS, lambda part: None)
    for _ in range(2):  # the first run warms up what all runs share
        began_s = time.perf_counter()
        with open_workers(WorkersConfig(kind, NUM_WORKERS)) as workers:
            assert run(workers, lambda part: None) == whole, "workers alone change the bytes"
            duration_s = time.perf_counter() - began_s
    r, runs, counter = random.Random(seed), list[Killed](), Redone()
    logging.getLogger("rlkd.workers.processes").addHandler(counter)
    while len(runs) < num_runs:
        before = counter.count
        found, part = killed_run(run, kind, r.uniform(0, 0.95 * duration_s), r)
        if part:  # else the run was over before its kill and does not count
            runs.append(Killed(part, counter.count - before, found == whole))
            show(f"{kind} {len(runs)}: killed in: {part}; redone {runs[-1].redone}; same end: {runs[-1].is_same}")
    return runs


def page(tables: dict[str, list[Killed]], command: str, wall_s: float) -> str:
    """Return the results as Markdown."""
    text = "# Lost workers\n\n"
    for kind, runs in tables.items():
        same = sum(run.is_same for run in runs)
        parts = sorted({run.part for run in runs})
        text += (
            f"`--workers {kind}`: {len(runs)} runs, in each of which one of {NUM_WORKERS} workers was killed by SIGKILL at a "
            f"random moment: {same} of {len(runs)} ended with the bytes of an undisturbed run without workers (start, metrics "
            "of all rollouts, evaluations, last policy).\n\n| part of the run | kills |\n|---|---|\n"
        )
        text += "".join(f"| {part} | {sum(run.part == part for run in runs)} |\n" for part in parts) + "\n"
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
        tables[kind] = harness(given.runs, kind, given.seed, lambda line: print(line, flush=True))
    command = f"python experiments/lost_workers.py --runs {given.runs} --workers {given.workers} --seed {given.seed}"
    text = page(tables, command, time.perf_counter() - began_s)
    print(text)
    if given.write:
        write_whole(given.write, text)
    return int(not all(run.is_same for runs in tables.values() for run in runs))


if __name__ == "__main__":
    sys.exit(main())
