"""Measure policy training with 1 and 2 workers, fit a model of its throughput, and compute it for up to 1,024 workers.

    python experiments/scale.py --out docs/results/scale        # writes scale.json and scale.md

Measured, on one machine: (1) policy training without workers, with processes and with Ray, in turns, from one round's end
to a later one's, so that start-up is left out, by the clock and by processor time; (2) processor time of a piece of work by its number of students; (3) sending
a piece and receiving its arrays; (4) one update of the policy by its number of windows. The model is a round: the main
process sends pieces one after the other, workers train them, the main process receives them and updates. It is computed
event by event, with piece times that scatter as measured.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scale_model import WINDOWS, Costs, reading_of, round_s, table_of

from rlkd.agents.policy.controllers import RunOptions
from rlkd.agents.ppo.rollouts import Actor, Collector, RolloutEnv
from rlkd.agents.ppo.train import Listeners, PPOConfig, new_agent, task_pool, train
from rlkd.configs.schema import ExperimentConfig, ScenarioConfig
from rlkd.data import TaskDistribution
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.prepare import Group, train_missing
from rlkd.envs.scenario import Scenario, build_scenario
from rlkd.envs.vector import first_streams
from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
from rlkd.workers import Work, Workers, WorkersConfig, open_workers

CHUNKS = (4, 8, 16, 32)
ROWS = (1000, 4000)
BUSY_LOAD = 2.5  # two workers, and the main process that waits for them


def job(num_students: int) -> ExperimentConfig:
    """Two scenarios of `configs/default.yaml` with shorter episodes, two chunks each, without search and comparison."""
    main = ScenarioConfig(num_windows=WINDOWS, train=TrainConfig(10, 64))
    other = ScenarioConfig(
        dataset="generated:seed=1,classes=6,inputs=36,difficulty=0.1",
        student=StudentConfig(widths=(24, 24, 24), exits=(1, 2)),
        num_windows=WINDOWS,
        train=TrainConfig(10, 64),
    )
    task = TaskDistribution(floor_share=0.7, limit_share=0.3, reference="teacher")
    ppo = PPOConfig(num_students=num_students, num_tasks=num_students, num_iterations=3, batch_size=256)
    return ExperimentConfig(scenarios=(main, other), task=task, ppo=ppo, chunk_students=num_students // 2)


def used() -> dict[str, dict[int, float]]:
    """Return the processor seconds of each process so far: this one, workers, and what serves them."""
    me = psutil.Process()
    table: dict[str, dict[int, float]] = {"main": {me.pid: time.process_time()}, "workers": {}, "servers": {}}
    for process in me.children(recursive=True):
        try:
            times, name = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        is_worker = (name.startswith("ray::") and "Agent" not in name) or "forkserver" in name
        table["workers" if is_worker else "servers"][process.pid] = times.user + times.system
    return table


def timed_training(
    scenarios: Sequence[Scenario], config: ExperimentConfig, workers: Workers, num_workers: int | None
) -> dict[str, Any]:
    """Train a policy; return seconds of a round after the first, by the clock and by processors, and the policy."""
    clock: list[float] = []
    processors: list[dict[str, dict[int, float]]] = []

    def on_rollout(rollout: Any, logger: Any) -> None:
        clock.append(time.perf_counter())
        processors.append(used())

    listeners = Listeners(lambda n: None, on_rollout)
    options = RunOptions(num_parallel=config.chunk_students, workers=workers)
    learned = train(scenarios, config.ppo, 3, listeners=listeners, options=options)
    updates = config.ppo.num_students * sum(s.num_windows * s.train.steps_per_window for s in config.scenarios)
    rounds = len(clock) - 1
    spent = {
        kind: [s - processors[0][kind].get(pid, 0.0) for pid, s in processors[-1][kind].items()]
        for kind in ("main", "workers", "servers")
    }
    each = sorted((seconds / rounds for seconds in spent["workers"]), reverse=True)
    weights = b"".join(tensor.numpy().tobytes() for tensor in learned.policy.weights.values())
    # one Ray worker at a time can be now this process, now that one
    path_s = spent["main"][0] / rounds + (sum(each) if num_workers == 1 else max(each, default=0.0))
    return {
        "wall_s": (clock[-1] - clock[0]) / rounds,
        "updates_per_s": updates * rounds / (clock[-1] - clock[0]),
        "main_s": spent["main"][0] / rounds,
        "workers_s": [seconds for seconds in each if seconds > 0.001],
        "servers_s": sum(spent["servers"]) / rounds,
        "path_s": path_s,
        "path_updates_per_s": updates / path_s,
        "weights": weights,
    }


def measure_training(num_students: int, num_rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Train without workers and with 1 and 2 workers of each kind, in turns."""
    ways = {"no workers": WorkersConfig(), **{f"{k}, {n}": WorkersConfig(k, n) for k in kinds for n in (1, 2)}}
    config = job(num_students)
    scenarios = [build_scenario(env) for env in config.envs(config.scenarios)]
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    weights = set()
    if "ray" in kinds:
        import ray

        ray.init(  # one for both; "local": else Ray joins a cluster that runs here, or ran
            address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
        )
    with ExitStack() as stack:
        workers = {name: stack.enter_context(open_workers(way)) for name, way in ways.items()}
        for number in range(num_rounds):
            for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
                row = timed_training(scenarios, config, workers[name], ways[name].num_workers)
                weights.add(row.pop("weights"))
                table[name].append({**row, "load": os.getloadavg()[0]})
                print(number, name, json.dumps(table[name][-1]), flush=True)

    def ratio(way: str, base: str, what: str) -> dict[str, Any]:
        pairs = [b[what] / a[what] for a, b in zip(table[way], table[base], strict=True)]
        return {"median": statistics.median(pairs), "all": pairs}

    pairs, ones = [(f"{k}, 2", f"{k}, 1") for k in kinds], [f"{k}, 1" for k in kinds]
    return {
        "num_students": num_students,
        "num_scenarios": len(scenarios),
        "num_windows": WINDOWS,
        "rounds": table,
        "same_policy": len(weights) == 1,
        "speedup_by_processors": {f"{two} over 1": ratio(two, one, "path_s") for two, one in pairs},
        "speedup_by_clock": {f"{two} over 1": ratio(two, one, "wall_s") for two, one in pairs},
        "time_by_processors": {f"{way} to no workers": ratio("no workers", way, "path_s") for way in ones},
        "time_by_clock": {f"{way} to no workers": ratio("no workers", way, "wall_s") for way in ones},
    }


def measure_costs(num_repeats: int, kinds: Sequence[str]) -> tuple[Costs, dict[str, Any]]:
    """Measure pieces, transfers and updates in this process by processor time, transfers by the clock of idle pipes."""
    config = job(64)
    scenario = build_scenario(config.envs(config.scenarios)[0])
    pool = task_pool(3, 0, 16)
    train_missing([Group(scenario, pool, scenario.config.task)])
    mean, deviation = np.zeros(len(OBSERVATIONS), np.float32), np.ones(len(OBSERVATIONS), np.float32)
    collector = Collector(scenario, pool, mean, deviation)
    env = RolloutEnv([collector], 64, 3, chunk_students=64, on_window=lambda n: None)
    agent = new_agent(env, config.ppo, env.num_steps, 0)
    actor = Actor.of(agent.policy)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    pieces: dict[int, list[float]] = {}
    for n in CHUNKS:
        noise, streams = torch.randn(WINDOWS, n, 12, generator=generator), first_streams(5, n)
        collector.episode(actor, streams, noise, on_window=lambda k: None)  # warm
        pieces[n] = []
        for _ in range(num_repeats):
            began_s = time.process_time()
            collector.episode(actor, streams, noise, on_window=lambda k: None)
            pieces[n].append(time.process_time() - began_s)
    slope, fixed = np.polyfit(CHUNKS, [statistics.median(pieces[n]) for n in CHUNKS], 1)
    scatter = statistics.mean(float(np.std(np.log(times), ddof=1)) for times in pieces.values())
    updates = _measure_updates(num_repeats)
    per_window, update_fixed = np.polyfit(ROWS, [updates[n] for n in ROWS], 1)
    transfers = {kind: _measure_transfer(kind, num_repeats) for kind in kinds}
    slowest = transfers[kinds[-1]]
    costs = Costs(
        piece_fixed_s=max(0.0, float(fixed)),
        piece_student_s=float(slope),
        piece_scatter=scatter,
        send_s=slowest["send_s"],
        receive_fixed_s=slowest["receive_fixed_s"],
        receive_student_s=slowest["receive_student_s"],
        worker_s=slowest["worker_s"],
        update_fixed_s=max(0.0, float(update_fixed)),
        update_window_s=float(per_window),
    )
    return costs, {"pieces_s": pieces, "updates_s": updates, "transfers": transfers}


def _measure_updates(num_repeats: int) -> dict[int, float]:
    """Processor seconds of one update of the policy, by the windows of its rollout."""
    found = {}
    for rows in ROWS:
        students = rows // 10
        scenario = build_scenario(replace(job(64).envs(job(64).scenarios)[0], num_windows=10))
        collector = Collector(scenario, [0], np.zeros(len(OBSERVATIONS)), np.ones(len(OBSERVATIONS)))
        env = RolloutEnv([collector], students, 0, chunk_students=students, on_window=lambda n: None)
        agent = new_agent(env, replace(PPOConfig(), num_students=students, batch_size=512), 10, 0)
        agent._setup_learn(rows)
        buffer = agent.rollout_buffer
        buffer.reset()
        generator = np.random.default_rng(0)
        for _ in range(10):
            seen = generator.normal(size=(students, len(OBSERVATIONS))).astype(np.float32)
            actions = generator.normal(size=(students, 12)).astype(np.float32)
            rewards = generator.normal(size=students).astype(np.float32)
            values, log_probs = torch.zeros(students), torch.full((students,), -10.0)
            buffer.add(seen, actions, rewards, np.zeros(students), values, log_probs)
        buffer.compute_returns_and_advantage(torch.zeros(students, 1), np.ones(students))
        times = []
        for _ in range(max(2, num_repeats // 2)):
            began_s = time.process_time()
            agent.train()
            times.append(time.process_time() - began_s)
        found[rows] = statistics.median(times)
    return found


def _answer(num_students: int, on_window: Callable[[int], object]) -> list[Any]:
    """Arrays of the size of an episode, at once."""
    sizes = (len(OBSERVATIONS), 12, 1, 1, 1, 1, 12)
    arrays = [np.zeros((WINDOWS, num_students, size), dtype=np.float32) for size in sizes]
    infos = [{"student": {f"metric_{i}": 0.5 for i in range(20)}, "episode": {"r": 1.0}} for _ in range(num_students)]
    return [arrays, infos]


def _measure_transfer(kind: str, num_repeats: int) -> dict[str, float]:
    """Seconds of the main process for a piece whose work takes no time, and of a whole round trip."""
    payload = torch.zeros(WINDOWS, 64, 12), [torch.zeros(64, 64) for _ in range(4)]

    def work(rest: Any, num_students: int, on_window: Callable[[int], object]) -> Any:
        return _answer(num_students, on_window)

    with open_workers(WorkersConfig(kind, 1)) as workers:
        list(workers.run([Work((0,), work, (payload, 4), 4, 1)]))
        main_s, trip_s = {}, {}
        for n in (4, 64):
            trips, mains = [], []
            for _ in range(num_repeats):
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                list(workers.run([Work((i,), work, (payload, n), n, 1) for i in range(8)]))
                trips.append((time.perf_counter() - began_s) / 8)
                mains.append((time.process_time() - began_cpu_s) / 8)
            main_s[n], trip_s[n] = statistics.median(mains), min(trips)
    per_student = max(0.0, (main_s[64] - main_s[4]) / 60)
    fixed = max(0.0, main_s[4] - 4 * per_student)
    return {
        "send_s": fixed / 2,
        "receive_fixed_s": fixed / 2,
        "receive_student_s": per_student,
        "worker_s": max(0.0, trip_s[4] - main_s[4]),
        "round_trip_s": trip_s[4],
    }


def page(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    kind = "pipes between processes" if result["kinds"][-1] == "processes" else "Ray's object store"
    t, costs, rows = result["training"], result["costs"], result["table"]
    lines = ["# Many workers", "", "## Measured: policy training with 1 and 2 workers", "", result["note"], ""]
    lines += [
        "| way | main process, s | workers, s | updates/s by processors | updates/s by the clock | load |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in t["rounds"].items():
        main_s = ", ".join(f"{row['main_s']:.2f}" for row in found)
        workers_s = ", ".join("/".join(f"{s:.2f}" for s in row["workers_s"]) or "-" for row in found)
        path = ", ".join(f"{row['path_updates_per_s']:,.0f}" for row in found)
        clock = ", ".join(f"{row['updates_per_s']:,.0f}" for row in found)
        load = ", ".join(f"{row['load']:.0f}" for row in found)
        lines.append(f"| {name} | {main_s} | {workers_s} | {path} | {clock} | {load} |")
    lines += ["", f"All end with the same policy: {'yes' if t['same_policy'] else 'NO'}.", ""]
    lines += ["| ratio of paired rounds | median | each |", "|---|---|---|"]
    for title, group in (
        ("speed-up by processors", t["speedup_by_processors"]),
        ("speed-up by the clock", t["speedup_by_clock"]),
        ("time by processors", t["time_by_processors"]),
        ("time by the clock", t["time_by_clock"]),
    ):
        for name, row in group.items():
            lines.append(f"| {title}: {name} | {row['median']:.2f} | {', '.join(f'{v:.2f}' for v in row['all'])} |")
    lines += ["", "## Model", ""]
    lines += [
        "A round is sent piece by piece by the main process, trained by workers that take the next piece when they are free, "
        "received piece by piece, and followed by an update in the main process. Each number is measured on this machine:",
        "",
        "| cost | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.3g} |" for name, value in costs.items()),
        "",
        f"By the model 2 workers are {result['predicted_speedup']:.2f} times as fast as 1 on idle processors.",
        "",
        f"## Computed: {t['num_scenarios']} scenarios, episodes of 12 windows",
        "",
        "Students are those of each scenario; the chunk is the best one for the number of workers.",
        "",
        "| workers | students | chunk | seconds a round | trainings/s | speed-up | efficiency | share of the update |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['num_workers']:,} | {r['num_students']:,} | {r['chunk_students']} | {r['round_s']:.2f} | "
            f"{r['trainings_per_s']:,.0f} | {r['speedup']:.1f} | {r['efficiency']:.2f} | {r['update_share']:.2f} |"
            for r in rows
            if r["num_workers"] >= 8
        ),
        "",
        result["reading"],
        "",
        "Assumptions: every worker is as fast as this machine's, with a processor of its own; the network moves a piece's arrays "
        f"as fast as {kind} here; no worker is lost (a loss costs at most one piece time more in its round); times "
        "of pieces scatter log-normally as those measured here; evaluations and the search are left out; the main process "
        "receives one piece at a time.",
        "",
        f"Command: `{result['command']}`, {result['date']} ({result['machine']}).",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, fit, compute, write; 0 if all ways end with the same policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale"), help="without ending")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of every way")
    parser.add_argument("--students", type=int, default=32, help="of every scenario")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of every cost")
    parser.add_argument("--kinds", default="processes,ray", help="of workers; the model has the transfers of the last")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds = given.kinds.split(",")
    costs, raw = measure_costs(given.repeats, kinds)
    print(json.dumps([asdict(costs), raw]), flush=True)
    training = measure_training(given.students, given.rounds, kinds)
    rows = table_of(costs, training["num_scenarios"], 12)
    measured = {"num_scenarios": training["num_scenarios"], "num_windows": training["num_windows"]}
    one, two = (round_s(costs, n, given.students, given.students // 2, **measured) for n in (1, 2))
    load = max(row["load"] for found in training["rounds"].values() for row in found)
    busy = (
        f"Other work ran on the machine (load up to {load:.0f}), so the clock says little."
        if load > BUSY_LOAD
        else "No other work ran on the machine."
    )
    note = (
        f"Two scenarios of {given.students} students, {WINDOWS} windows of 10 steps, in four pieces, on {os.cpu_count()} processors; "
        f"seconds are those of a round (rollouts and update) after the first. {busy} *By processors* means the processor seconds of "
        "the main process and of its busiest worker, one after the other, which is what a round takes on idle processors but for waiting."
    )
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {torch.__version__}",
        "kinds": kinds,
        "training": training,
        "costs": asdict(costs),
        "measured_costs": raw,
        "predicted_speedup": one / two,
        "table": rows,
        "reading": reading_of(rows),
        "note": note,
    }
    write_json(given.out.with_suffix(".json"), json.loads(json.dumps(result)))
    write_whole(given.out.with_suffix(".md"), page(result))
    print(page(result))
    return int(not training["same_policy"])


if __name__ == "__main__":
    sys.exit(main())
