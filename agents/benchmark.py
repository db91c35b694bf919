"""Student updates per second, measured in one run: lock-step population, one-student loop, SubprocVecEnv.

All train the same default student through the same environment code under held controls, evaluation after
every window included. Rounds are interleaved and medians taken, so that a slow moment of the machine touches
every rival alike. Ratios are what to read; the absolute figures depend on the machine and its neighbours.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import SubprocVecEnv

from rlkd.envs.action import NUM_CONTROLS, FlattenAction, decode
from rlkd.envs.episodes import Episodes
from rlkd.envs.single import DistillationEnv
from rlkd.envs.world import EnvConfig, World, build_world

NUM_PROCESSES = 2


def _env_maker(config: EnvConfig) -> Callable[[], FlattenAction]:
    def make() -> FlattenAction:
        torch.set_num_threads(1)
        return FlattenAction(DistillationEnv(config))

    return make


def _window_s(step: Callable[[], object], num_windows: int) -> float:
    began = time.perf_counter()
    for _ in range(num_windows):
        step()
    return (time.perf_counter() - began) / num_windows


def bench(config: EnvConfig, num_students: int, num_rounds: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Updates/s of each way, ratios to the lock-step population, and where its step spends its time."""
    world = build_world(config, say=say)
    population, solo = Episodes(world, num_students), Episodes(world, 1)
    population.reset(range(num_students))
    solo.reset([0])
    processes = SubprocVecEnv([_env_maker(config)] * NUM_PROCESSES, start_method="spawn")
    try:
        processes.reset()
        zeros = np.zeros((NUM_PROCESSES, NUM_CONTROLS), dtype=np.float32)
        ways: dict[str, tuple[int, int, Callable[[], object]]] = {
            f"lock-step population of {num_students}": (num_students, 2, lambda: population.step(population.start)),
            "one-student loop": (1, 40, lambda: solo.step(solo.start)),
            f"SubprocVecEnv of {NUM_PROCESSES} processes": (NUM_PROCESSES, 40, lambda: processes.step(zeros)),
        }
        for _, num_windows, step in ways.values():
            _window_s(step, num_windows)
        rounds = [
            {name: _window_s(step, num_windows) for name, (_, num_windows, step) in ways.items()}
            for _ in range(num_rounds)
        ]
    finally:
        processes.close()
    per_window = config.train.steps_per_window
    rates = {
        name: [count * per_window / r[name] for r in rounds] for name, (count, _, _) in ways.items()
    }  # updates/s a round
    first = next(iter(rates))
    return {
        "threads": torch.get_num_threads(),
        "num_rounds": num_rounds,
        "updates_per_s": {
            name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for name, values in rates.items()
        },
        "ratio_of_lock_step": {
            name: statistics.median(a / b for a, b in zip(rates[first], values, strict=True))
            for name, values in rates.items()
            if name != first
        },
        "step_share": step_shares(world, num_students),
    }


def step_shares(world: World, num_students: int, num_windows: int = 6) -> dict[str, float]:
    """Share of an environment step's time that goes to each part."""
    episodes = Episodes(world, num_students)
    episodes.reset(range(num_students))
    controls = decode(episodes.start, world.config.controls, world.data.num_classes)
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
