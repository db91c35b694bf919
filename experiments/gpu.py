"""The lock-step population on a GPU: how many students a second, where the time goes, and whether results agree.

    python experiments/gpu.py --docs docs/results/gpu

A training is what `rlkd train` and `compare` do with a student: reset, 12 windows of 15 steps at batch 48 on digits, an
evaluation on validation after each, one on test at the end, through `rlkd.envs.episodes.Episodes` under held controls.
"recorded" replays a window as one CUDA graph (`rlkd.students.recorded`), "plain" launches its kernels one by one.
Rounds are interleaved: every round trains every population once. The first training of a population, which records, is
told apart. Tests of the GPU run first, and what they say stands in the result.
"""

import argparse
import gc
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import rlkd.envs.episodes
from rlkd.agents.evaluation.comparison import interval, paired
from rlkd.agents.policy.controllers import RunOptions, run
from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.errors import UserError
from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.runs.folder import git_state, use_one_thread
from rlkd.students import Population

ROOT = Path(__file__).resolve().parent.parent
SIZES, CPU_SIZES = (128, 512, 2048, 8192, 16384), (128, 256)
NUM_AGREED = 256
NUM_LOOKS = 1
LARGEST_PLAIN = 2048  # beyond, launching is hidden behind the kernels' own time
FIRST_SEED = 5_000_000


@dataclass
class Watch:
    """Seconds spent in functions, by name; a GPU is waited for before a clock is read."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its seconds added to those of `name`."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            wait(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return call


def wait(device: str) -> None:
    """Until the device has done what it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize()


@dataclass
class Way:
    """One population and what was measured of it."""

    device: str
    num_students: int
    record: bool
    episodes: Episodes | None = None
    first_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    memory_bytes: int = 0
    failure: str = ""

    @property
    def name(self) -> str:
        """As the table has it."""
        kind = "" if self.device == "cpu" else ", recorded" if self.record else ", plain"
        return f"{self.device}{kind}"

    def begin(self, scenario: Scenario) -> None:
        """Build the population and train once, which loads kernels and records."""
        with patch("rlkd.envs.scenario.Population", partial(Population, record=self.record)):
            self.episodes = Episodes(scenario, self.num_students)
        self.first_s = self.train(0)

    def measure(self, number: int) -> None:
        """One round."""
        self.seconds.append(self.train(number))

    def train(self, number: int) -> float:
        """Seconds of one whole training."""
        assert self.episodes is not None
        first = FIRST_SEED + number * self.num_students
        began = time.perf_counter()
        self.episodes.reset(range(first, first + self.num_students))
        for _ in range(self.episodes.scenario.config.num_windows):
            self.episodes.step(self.episodes.start)
        self.episodes.evaluate("test")
        wait(self.device)
        return time.perf_counter() - began

    def look_inside(self, number: int) -> None:
        """Shares of one training's time, beside the rounds: the watch makes it slower."""
        assert self.episodes is not None
        students, watch = population(self.episodes), Watch(self.device)
        with ExitStack() as stack:
            for owner, function, name in (
                (rlkd.envs.episodes, "draw_task", "drawing tasks"),
                (students, "reset", "first weights"),
                (students, "_draw", "drawing batches"),
                (students, "train_window", "training steps"),
                (students, "evaluate", "evaluation"),
                (self.episodes, "_task_features", "task features of tasks"),
            ):
                stack.enter_context(patch.object(owner, function, watch.timed(name, getattr(owner, function))))
            whole = self.train(number)
        watch.seconds["training steps"] -= watch.seconds["drawing batches"]  # drawn inside
        watch.seconds["cost, observation, reward"] = whole - sum(watch.seconds.values())
        self.shares.append({name: seconds / whole for name, seconds in watch.seconds.items()})

    def row(self, steps: int) -> dict[str, Any]:
        """Figures for JSON."""
        figures: dict[str, Any] = {"device": self.device, "recorded": self.record, "num_students": self.num_students}
        if self.failure or not self.seconds:
            return {**figures, "failure": self.failure or "no round was measured"}
        n = self.num_students
        rates = [n / s for s in self.seconds]
        shares = (
            {name: statistics.median(s[name] for s in self.shares) for name in self.shares[0]} if self.shares else {}
        )
        return {
            **figures,
            "first_training_s": self.first_s,
            "training_s": self.seconds,
            "trainings_per_s": {"median": statistics.median(rates), "low": min(rates), "high": max(rates)},
            "updates_per_s": statistics.median(rates) * steps,
            "share": shares,
            "memory_bytes": self.memory_bytes,
        }


def population(episodes: Episodes) -> Population:
    """The students, which are many."""
    assert isinstance(episodes.students, Population)
    return episodes.students


def attempt(way: Way, action: Callable[[], None]) -> None:
    """Do it; a population that does not fit or cannot be recorded is told of and left out from then on."""
    if way.failure:
        return
    try:
        action()
    except RuntimeError as error:  # out of memory, and whatever CUDA says
        way.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        way.episodes = None
        print(f"{way.name}, {way.num_students}: {way.failure}", flush=True)
        gc.collect()
        if way.device != "cpu":
            torch.cuda.empty_cache()


def measure(ways: list[Way], scenarios: dict[str, Scenario], num_rounds: int, save: Callable[[], None]) -> None:
    """Fill the ways in, round by round; `save` is called after each."""
    for way in ways:
        on_gpu = way.device != "cpu"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        attempt(way, partial(way.begin, scenarios[way.device]))
        if on_gpu:
            way.memory_bytes = torch.cuda.max_memory_allocated() - before
        print(f"{way.name}, {way.num_students}: first training {way.first_s:.2f} s", flush=True)
    for number in range(1, num_rounds + 1):
        for way in ways:
            attempt(way, partial(way.measure, number))
        save()
    for number in range(num_rounds + 1, num_rounds + 1 + NUM_LOOKS):
        for way in ways:
            attempt(way, partial(way.look_inside, number))
    save()


def in_process(command: list[str], limit_s: float) -> tuple[int, list[str]]:
    """Exit code and lines of a Python command in a process of its own, which is stopped after `limit_s`."""
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return 124, [f"stopped after {limit_s:.0f} s"]
    return done.returncode, [line for line in done.stdout.splitlines() if line.strip()]


def can_record(device: str) -> bool:
    """Whether a window can be recorded, tried in a process of its own: a failed recording can spoil the GPU's state."""
    code, lines = in_process([__file__, "--device", device, "--try_recording"], 90)
    print(f"recording: exit code {code}", *lines[-30:], sep="\n", flush=True)
    return code == 0


def moving_controller(scenario: Scenario, seeds: range) -> Callable[[Tensor, Episodes, int], Tensor]:
    """Controls that go, in a line and another one for every task, from the published setting to a drawn one."""
    ends = torch.stack([torch.rand(NUM_CONTROLS, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    by_seed = dict(zip(seeds, ends, strict=True))

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        end = torch.stack([by_seed[task.seed] for task in episodes.tasks])  # [N, 9]
        return torch.lerp(episodes.start, end, window / (scenario.config.num_windows - 1))

    return controller


def agreement(scenarios: dict[str, Scenario], device: str, num_tasks: int) -> dict[str, Any]:
    """Final J on test of the same tasks: GPU against CPU, and as a scale the CPU against itself in other company."""
    seeds = range(FIRST_SEED - num_tasks, FIRST_SEED)
    cpu = scenarios["cpu"]
    controller = moving_controller(cpu, seeds)

    def final(scenario: Scenario, num_parallel: int) -> Any:
        return run(scenario, controller, seeds, scenario.config.task, options=RunOptions(num_parallel=num_parallel))

    reference, gpu, again = (
        final(cpu, num_tasks),
        final(scenarios[device], num_tasks),
        final(scenarios[device], num_tasks),
    )
    halves = final(cpu, num_tasks // 2)
    generator = np.random.default_rng(0)
    rows = {}
    for name, one, other in (("gpu-cpu", gpu, reference), ("gpu-gpu", again, gpu), ("cpu-cpu", halves, reference)):
        gap = np.abs(one.score - other.score)
        rows[name] = {
            "largest_difference": float(gap.max()),
            "mean_difference": float(gap.mean()),
            "num_equal": int((gap == 0).sum()),
            "paired": paired(one, other, generator),
        }
    means = {name: interval(r.score, "mean", generator) for name, r in (("cpu", reference), ("gpu", gpu))}
    return {"num_tasks": num_tasks, "mean_score": means, "num_diverged": int(gpu.diverged.sum()), "pairs": rows}


def run_tests() -> dict[str, Any]:
    """What the tests of the GPU say."""
    began = time.perf_counter()
    command = ["-m", "pytest", "-W", "default", "-p", "no:cacheprovider", "--tb=short", "--durations=5"]
    command += ["tests/students/test_population_cuda.py", "tests/students/test_device.py"]
    _, lines = in_process(command, 150)
    print(*lines[-150:], sep="\n", flush=True)
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else "", "failed": failed, "seconds": time.perf_counter() - began}


def page(result: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = [
        "# The population on a GPU",
        "",
        f"Command: `{result['command']}`, {result['date']}, {result['gpu']}, torch {result['torch']}, one CPU thread of",
        f"{result['num_cores']} cores ({result['cpu']}). TF32 is off. Trainings are whole ones under held controls: reset, 12 windows of 15 steps",
        "at batch 48 on digits, an evaluation after each, test at the end; medians of interleaved rounds, in brackets the slowest",
        "and the fastest. `recorded` replays a window as one CUDA graph, `plain` launches kernel by kernel; the first training records.",
        "",
        "| where | students | trainings/s | updates/s | first training | GPU memory at most |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["ways"]:
        kind = "" if row["device"] == "cpu" else ", recorded" if row["recorded"] else ", plain"
        head = f"| {row['device']}{kind} | {row['num_students']:,} |"
        if "failure" in row:
            lines.append(f"{head} {row['failure']} | | | |")
            continue
        r, memory = row["trainings_per_s"], row["memory_bytes"] / 2**30
        lines.append(
            f"{head} {r['median']:,.0f} ({r['low']:,.0f} to {r['high']:,.0f}) | {row['updates_per_s']:,.0f} | "
            f"{row['first_training_s']:.2f} s | {f'{memory:.1f} GiB' if memory else ''} |"
        )
    named = next((list(row["share"]) for row in result["ways"] if row.get("share")), [])
    lines += [
        "",
        "Where a training's time goes (a watch that waits for the GPU at every part makes it somewhat slower):",
        "",
    ]
    lines += [f"| where | students | {' | '.join(named)} |", "|---|---|" + "---|" * len(named)]
    for row in result["ways"]:
        if row.get("share"):
            kind = "" if row["device"] == "cpu" else ", recorded" if row["recorded"] else ", plain"
            shares = " | ".join(f"{row['share'][name]:.0%}" for name in named)
            lines.append(f"| {row['device']}{kind} | {row['num_students']:,} | {shares} |")
    if "agreement" in result:
        a = result["agreement"]
        lines += [
            "",
            f"Final J on test of {a['num_tasks']} tasks under controls that move, another way for every task. Mean J is",
            f"{a['mean_score']['cpu']['mean']:.4f} on the CPU and {a['mean_score']['gpu']['mean']:.4f} on the GPU. The last row is the scale: the CPU against itself, each",
            "student beside other ones, which changes rounding alone.",
            "",
            "| pair | equal J | largest difference | mean absolute difference | mean difference (95 %) |",
            "|---|---|---|---|---|",
        ]
        labels = {"gpu-cpu": "GPU - CPU", "gpu-gpu": "GPU again - GPU", "cpu-cpu": "CPU in halves - CPU"}
        for name, row in a["pairs"].items():
            low, high = row["paired"]["ci95"]
            lines.append(
                f"| {labels[name]} | {row['num_equal']} | {row['largest_difference']:.4f} | {row['mean_difference']:.5f} | "
                f"{row['paired']['difference']:+.5f} ({low:+.5f} to {high:+.5f}) |"
            )
    if "tests" in result:
        lines += ["", f"Tests of the GPU there: {result['tests']['summary']}"]
        lines += [f"- {line}" for line in result["tests"]["failed"]]
    return "\n".join(lines) + "\n"


def describe(device: str) -> dict[str, Any]:
    """Of the machine and the versions."""
    on_gpu = device != "cpu"
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "schema": 1,
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if on_gpu else "no GPU (a dry run: the CPU stands in for it)",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": model[0].split(":")[1].strip() if model else "",
        "num_cores": os.cpu_count(),
        **git_state(ROOT),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a dry run: small, and on a machine without a GPU too")
    parser.add_argument("--without_tests", action="store_true")
    parser.add_argument("--try_recording", action="store_true", help="only train eight students, recorded")
    parser.add_argument("--docs", type=Path, default=None, help="write the figures to this path with .md and .json")
    options = parser.parse_args()
    use_one_thread()
    device = "cpu" if options.quick and not torch.cuda.is_available() else options.device
    config = EnvConfig()
    there = replace(config, train=replace(config.train, device=device))
    there.check()
    result = describe(device)
    ways: list[Way] = []

    def save() -> None:
        result["ways"] = [way.row(config.num_windows * config.train.steps_per_window) for way in ways]
        if options.docs is not None:
            write_whole(options.docs.with_suffix(".md"), page(result))
            write_json(options.docs.with_suffix(".json"), result)

    if options.try_recording:
        Way(device, 8, True).begin(build_scenario(there))
        return 0
    if not options.without_tests:
        result["tests"] = run_tests()
        save()
    scenario = build_scenario(config)
    scenarios = {"cpu": scenario, device: replace(scenario, config=there)}
    sizes, cpu_sizes = ((8, 16), (8,)) if options.quick else (SIZES, CPU_SIZES)
    modes = (True, False) if can_record(device) else (False,)
    with patch("rlkd.envs.scenario.Population", partial(Population, record=modes[0])):
        result["agreement"] = agreement(scenarios, device, 8 if options.quick else NUM_AGREED)
    save()
    ways += [Way("cpu", n, False) for n in cpu_sizes]
    ways += [Way(device, n, record) for n in sizes for record in modes if record == modes[0] or n <= LARGEST_PLAIN]
    measure(ways, scenarios, 1 if options.quick else options.num_rounds, save)
    print(page(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"gpu: {error}", file=sys.stderr)
        sys.exit(2)
