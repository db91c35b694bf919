"""Student updates per second, measured in one run: lock-step population, one-student loop, SubprocVecEnv.

All train the same default student through the same environment code under constant controls, evaluation after
every window included. Populations on a GPU train from reset to the end, because the CPU takes much of their time: it
draws tasks, first weights and batches. Rounds are interleaved and medians taken, so that a slow moment of the machine
affects all ways alike. Read the ratios; absolute rates depend on the machine and on what else runs there.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import SubprocVecEnv

from rlkd.envs.action import NUM_CONTROLS, FlattenAction, decode
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.envs.single import DistillationEnv

NUM_PROCESSES = 2


def _env_maker(config: EnvConfig) -> Callable[[], FlattenAction]:
    def make() -> FlattenAction:
        torch.set_num_threads(1)
        return FlattenAction(DistillationEnv(config))

    return make


@dataclass(frozen=True)
class Way:
    """One way of training: so many students, windows a measurement, and torch threads."""

    num_students: int
    num_windows: int
    num_threads: int
    step: Callable[[], object]
    windows_per_step: int = 1

    def updates_per_s(self, steps_per_window: int) -> float:
        """Measured once."""
        torch.set_num_threads(self.num_threads)
        seconds = _window_s(self.step, self.num_windows)
        torch.set_num_threads(1)
        return self.num_students * self.windows_per_step * steps_per_window / seconds


def _window_s(step: Callable[[], object], num_windows: int) -> float:
    began = time.perf_counter()
    for _ in range(num_windows):
        step()
    return (time.perf_counter() - began) / num_windows


def whole_training(episodes: Episodes) -> None:
    """Every student from its first weights to its last window."""
    episodes.reset(range(episodes.num_students))
    for _ in range(episodes.scenario.config.num_windows):
        episodes.step(episodes.start)


def bench(
    config: EnvConfig,
    num_students: int,
    num_rounds: int,
    device_students: Sequence[int] = (),
) -> dict[str, Any]:
    """Updates/s of each way, ratios to the lock-step population, and where its step spends its time.

    SubprocVecEnv has a core for each of its processes, so the population is measured with as many threads too.

    Args:
        config: of the environment; if `train.device` is a GPU, populations there are measured beside the others.
        num_students: of the population on the CPU.
        num_rounds: interleaved.
        device_students: sizes of the populations on the GPU; by default num_students.
    """
    device, config = config.train.device, replace(config, train=replace(config.train, device="cpu"))
    scenario = build_scenario(config)
    population, solo = Episodes(scenario, num_students), Episodes(scenario, 1)
    population.reset(range(num_students))
    solo.reset([0])
    processes = SubprocVecEnv([_env_maker(config)] * NUM_PROCESSES, start_method="spawn")
    one, two = "lock-step, 1 thread", f"lock-step, {NUM_PROCESSES} threads"
    try:
        processes.reset()
        zeros = np.zeros((NUM_PROCESSES, NUM_CONTROLS), dtype=np.float32)
        ways = {
            one: Way(num_students, 3, 1, lambda: population.step(population.start)),
            two: Way(num_students, 3, NUM_PROCESSES, lambda: population.step(population.start)),
            "one-student loop": Way(1, 40, 1, lambda: solo.step(solo.start)),
            f"SubprocVecEnv, {NUM_PROCESSES} processes": Way(NUM_PROCESSES, 40, 1, lambda: processes.step(zeros)),
        }
        if device != "cpu":
            there = replace(scenario, config=replace(config, train=replace(config.train, device=device)))
            for size in device_students or (num_students,):
                train = partial(whole_training, Episodes(there, size))
                ways[f"lock-step, {device}, {size:,} students"] = Way(size, 1, 1, train, config.num_windows)
        steps = config.train.steps_per_window
        for way in ways.values():
            way.updates_per_s(steps)  # warm-up
        rounds = [{name: way.updates_per_s(steps) for name, way in ways.items()} for _ in range(num_rounds)]
    finally:
        processes.close()
    return {
        "num_students": num_students,
        "num_rounds": num_rounds,
        "updates_per_s": {
            name: {
                "median": statistics.median(r[name] for r in rounds),
                "low": min(r[name] for r in rounds),
                "high": max(r[name] for r in rounds),
                "trainings_per_s": statistics.median(r[name] for r in rounds) / (steps * config.num_windows),
            }
            for name in ways
        },
        "ratio": {
            lock_step: {
                name: statistics.median(r[lock_step] / r[name] for r in rounds)
                for name in ways
                if not name.startswith("lock-step")
            }
            for lock_step in (one, two)
        },
        "step_share": step_shares(scenario, num_students),
    }


def step_shares(scenario: Scenario, num_students: int, num_windows: int = 6) -> dict[str, float]:
    """Share of an environment step's time that goes to each part."""
    episodes = Episodes(scenario, num_students)
    episodes.reset(range(num_students))
    controls = decode(episodes.start, scenario.config.controls, scenario.data.num_classes)
    students = episodes.students
    parts: dict[str, Callable[[], object]] = {
        "selection": lambda: students.set_controls(controls),
        "training and telemetry": lambda: students.train_window(controls),
        "evaluation and cost": lambda: episodes.evaluate("validation"),
    }
    seconds = {name: statistics.median(_window_s(part, 1) for _ in range(num_windows)) for name, part in parts.items()}
    seconds["training and telemetry"] -= seconds["selection"]  # train_window selects first
    whole = statistics.median(_window_s(lambda: episodes.step(episodes.start), 1) for _ in range(num_windows))
    seconds["observation and reward"] = max(0.0, whole - sum(seconds.values()))
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()}
