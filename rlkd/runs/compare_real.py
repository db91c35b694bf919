"""`rlkd compare --data ...`: one real student under several ways of setting its controls, paired by seed.

All methods train the same student, for the same number of steps, from the same initial weights on the same batches,
and ship the best of their windows as validation saw them. The shipped students of a seed are timed in one interleaved
run, together with the teacher. J reads that measured latency, so that students of different depths can be compared.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.evaluation.comparison import paired, summarise
from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.controllers import Controller, Results
from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.cost import time_calls
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.guard import GuardConfig
from rlkd.envs.real import RealScenario
from rlkd.envs.reward import weighed
from rlkd.errors import UserError
from rlkd.io.files import read_json
from rlkd.io.records import plain, write_json
from rlkd.runs.distil_real import DistilledModule, distil_module
from rlkd.runs.folder import Progress
from rlkd.runs.goals import with_goal
from rlkd.runs.real_methods import PATIENCE, REAL_METHODS, RealCompareConfig, RealMethod, plain_setting

TIMED_BATCHES = (1, 32)
TIMED_ROUNDS = 31
WITHIN = 0.01


def compare_real(
    config: RealCompareConfig, bundle: Bundle, folder: Path, *, seed: int, progress: Progress
) -> dict[str, Any]:
    """Train every method on every seed and fill `folder` with rows, students and `result.json`.

    Rows that `folder` has already are not trained again.

    Args:
        config: checked here.
        bundle: the policy; its control ranges hold for all methods.
        folder: of the run.
        seed: of the first training; the others follow.
        progress: called after every window.

    Returns:
        The content of `result.json`, schema 2.
    """
    config.check()
    names, seeds = config.method_names(), range(seed, seed + config.num_seeds)
    scenarios = _Scenarios(config, bundle, folder, seed)
    num_trainings = sum(REAL_METHODS[name].count(config) for name in names) * len(seeds)
    progress.phase("comparison", num_trainings, config.num_windows)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one in seeds:
        for name in names:
            rows[name].append(_row(name, one, config, bundle, scenarios, folder, progress))
        _time_together({name: rows[name][-1] for name in names}, one, scenarios, folder)
    result = summary(rows, config, scenarios.preference, seed)
    write_json(folder / "result.json", result)
    return result


class _Scenarios:
    """Scenarios of a comparison, built when they are asked for; all share references and cost profile."""

    def __init__(self, config: RealCompareConfig, bundle: Bundle, folder: Path, seed: int) -> None:
        self._config, self._bundle, self._seed = config, bundle, seed
        self._made: dict[tuple[str, bool, int], RealScenario] = {}
        self._folder = folder
        self.preference = config.goal.weights(config.preference)

    def of(self, name: str) -> RealScenario:
        """Return the scenario of a method of REAL_METHODS."""
        method = REAL_METHODS[name]
        key = (method.exits, method.starts_as_policy, method.num_blocks_less)
        if key not in self._made:
            self._made[key] = self._build(method)
        return self._made[key]

    def _build(self, method: RealMethod) -> RealScenario:
        config, policy = self._config, self._bundle.policy
        if method.exits == "none":
            config = dataclasses.replace(config, attach=dataclasses.replace(config.attach, exits=(), patience=0))
        if method.exits == "every block" or method.num_blocks_less:
            whole = len(self.of("policy").student.plan.blocks)
            if whole <= method.num_blocks_less:
                raise UserError("methods: got 'smaller'; the student has one block alone; leave it out")
            if method.num_blocks_less:
                layers = whole - method.num_blocks_less
                config = dataclasses.replace(config, cut=dataclasses.replace(config.cut, layers=layers))
            else:
                exits = tuple(range(1, whole))
                attach = dataclasses.replace(config.attach, exits=exits, patience=PATIENCE)
                config = dataclasses.replace(config, attach=attach)
        profile = self._folder / f"cost_profile-{method.exits.replace(' ', '_')}-{method.num_blocks_less}.json"
        if profile.exists():
            config = dataclasses.replace(config, cost=dataclasses.replace(config.cost, profile=str(profile)))
        start = policy.start if method.starts_as_policy else plain_setting(policy.controls)
        scenario = build_real_scenario(config, policy.controls, start, self._seed)
        if not profile.exists():
            scenario.profile.save(profile)
        scenario = with_goal(scenario, config.goal, config.preference)
        if self._made:  # a share of the dense student's accuracy means the dense student of the first scenario
            scenario = dataclasses.replace(scenario, known=next(iter(self._made.values())).known)
        return scenario


def _row(
    name: str,
    seed: int,
    config: RealCompareConfig,
    bundle: Bundle,
    scenarios: _Scenarios,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """One method's figures on one seed, from its file where it is there; else trained now, its student saved."""
    file, place = folder / "rows" / f"{name}-{seed}.json", folder / "students" / f"{name}-{seed}"
    if file.exists():
        return dict(read_json(file, "a row of a comparison"))
    scenarios.of("policy")  # before the others: the floor may be a share of its dense student's accuracy
    scenario = scenarios.of(name)
    best: tuple[DistilledModule, list[dict[str, float]]] | None = None
    guard = guard_of(name, config)
    trainings = REAL_METHODS[name].trainings(config, bundle, seed)
    controller: Controller | None = next(trainings)
    while controller is not None:
        windows: list[dict[str, float]] = []

        def on_window(row: dict[str, float], observation: Tensor, windows: Any = windows) -> None:
            windows.append(row)
            progress.advance(1)

        done = distil_module(scenario, controller, seed, on_window, None, guard)
        score = done.figures["validation_score"]
        if best is None or score > best[0].figures["validation_score"]:
            best = (done, windows)
        try:
            controller = trainings.send(score)
        except StopIteration:
            controller = None
    assert best is not None
    done, windows = best
    save_module_student(done.student, place, scenario.processor, {"figures": done.figures})
    row = {"method": name, "seed": seed, "diverged": done.diverged, **done.figures, "windows": windows}
    write_json(file, row)
    return row


def guard_of(name: str, config: RealCompareConfig) -> GuardConfig:
    """Return the guard of a method of REAL_METHODS; it holds no units of methods whose schedules are fixed."""
    return dataclasses.replace(config.guard, hold=config.guard.hold and REAL_METHODS[name].may_hold)


def _time_together(rows: Mapping[str, dict[str, Any]], seed: int, scenarios: _Scenarios, folder: Path) -> None:
    """Put `measured` into the rows of one seed: seconds of a batch, all students and the teacher in one run."""
    file = folder / "rows" / f"measured-{seed}.json"
    saved = dict(read_json(file, "latencies of a comparison")) if file.exists() else {}
    if set(saved) != set(rows):
        scenario = scenarios.of("policy")
        students = {name: load_module_student(folder / "students" / f"{name}-{seed}") for name in rows}
        saved = {name: {} for name in rows}
        for size in sorted({*TIMED_BATCHES, scenario.profile.batch_size}):
            test = scenario.data.splits["test"]
            index = test[torch.arange(size) % len(test)]
            calls: dict[str, Callable[[], object]] = {
                name: partial(student, **scenario.data.batch(index)) for name, student in students.items()
            }
            if scenario.teacher is not None and scenario.teacher_data is not None:
                calls["teacher"] = partial(scenario.teacher.cpu().eval(), **scenario.teacher_data.batch(index))
            with torch.inference_mode():
                timed = dict(zip(calls, time_calls(list(calls.values()), TIMED_ROUNDS), strict=True))
            for name in rows:
                own = timed[name].median_s
                saved[name][f"batch_{size}"] = {
                    "latency_s": own,
                    "spread_s": timed[name].spread_s,
                    "p95_s": timed[name].p95_s,
                    "speedup_over_dense": timed["plain"].median_s / own,
                    **({"speedup_over_teacher": timed["teacher"].median_s / own} if "teacher" in timed else {}),
                }
        write_json(file, saved)
    for name, row in rows.items():
        row["measured"] = saved[name]


def _results(
    rows: list[dict[str, Any]], dense: list[dict[str, Any]], config: RealCompareConfig, weights: tuple[float, ...]
) -> Results:
    """Return final metrics of one method, one entry a seed; costs relative to the dense student of the same seed.

    Args:
        rows: of the method.
        dense: of `plain`.
        config: says which batch J reads.
        weights: of accuracy, latency and energy in J.
    """
    timed = f"batch_{config.cost.batch_size}"
    columns: dict[str, list[Any]] = {f.name: [] for f in fields(Results)}
    for row, whole in zip(rows, dense, strict=True):
        lost = bool(row["diverged"])
        latency = 1.0 if lost else row["measured"][timed]["latency_s"] / whole["measured"][timed]["latency_s"]
        energy = 1.0 if lost else row["energy_j"] / whole["energy_j"]
        accuracy, floor = 0.0 if lost else row["accuracy"], row.get("floor", 0.0)
        shortfall = max(0.0, floor - accuracy)
        numbers = torch.tensor([accuracy, latency, energy, floor], dtype=torch.float64)
        a, latency_ratio, energy_ratio, least = numbers[:, None]  # [1] each
        preference = torch.tensor([weights], dtype=torch.float64)
        gained = weighed(a, latency_ratio, energy_ratio, preference, floor=least)
        values = {
            "score": float(gained),
            "accuracy": accuracy,
            "latency_ratio": latency,
            "energy_ratio": energy,
            "macs_ratio": 1.0 if lost else row["macs"] / whole["macs"],
            "diverged": lost,
            "num_rollbacks": row["num_rollbacks"],
            "floor": floor,
            "shortfall": shortfall,
            "goal_met": bool(row["goal_met"]),
            "goal_met_within_1_point": shortfall <= WITHIN and not lost,
        }
        for name, value in values.items():
            columns[name].append(value)
    return Results(**{name: np.array(values) for name, values in columns.items()})


def summary(
    rows: Mapping[str, list[dict[str, Any]]], config: RealCompareConfig, weights: tuple[float, ...], seed: int
) -> dict[str, Any]:
    """Return `result.json` (schema 2) of the rows of every method; pairs share initial weights and batches."""
    generator = np.random.default_rng(seed)
    results = {name: _results(some, rows["plain"], config, weights) for name, some in rows.items()}
    everything: NDArray[np.bool_] = np.ones(config.num_seeds, dtype=bool)
    methods: dict[str, Any] = {}
    for name, some in rows.items():
        methods[name] = summarise(results[name], REAL_METHODS[name].count(config), everything, generator)
        for other in ("dense", "teacher"):
            key = f"speedup_over_{other}"
            speeds = {
                size: statistics.median(row["measured"][size][key] for row in some)
                for size in some[0]["measured"]
                if key in some[0]["measured"][size]
            }
            if speeds:
                methods[name][key] = speeds[f"batch_{config.cost.batch_size}"]
                methods[name][f"{key}_by_batch"] = speeds
    first = "policy" if "policy" in results else "plain"
    pairs = {
        f"{first}-{name}": {
            **paired(results[first], other, generator),
            "accuracy_difference": float((results[first].accuracy - other.accuracy).mean()),
        }
        for name, other in results.items()
        if name != first
    }
    dense = rows["plain"][0]
    return {
        "schema": 2,
        "task": {"data": config.data, "teacher": config.teacher, "student": config.student, "cut": plain(config.cut)},
        "split": "test",
        "num_tasks": 1,
        "num_seeds": config.num_seeds,
        "num_steps": config.num_windows * config.train.steps_per_window,
        "goal": plain(config.goal),
        "teacher_accuracy": dense.get("teacher_accuracy"),
        "methods": methods,
        "paired": pairs,
        "seeds": {
            name: [{k: v for k, v in row.items() if k != "windows"} for row in some] for name, some in rows.items()
        },
    }
