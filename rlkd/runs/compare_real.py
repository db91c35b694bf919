"""`rlkd compare --data ...`: one real student under several ways of setting its controls, paired by seed.

All methods train the same student, for the same number of steps, from the same initial weights on the same batches,
and ship the best of their windows as validation saw them. The shipped students of a seed are timed in one interleaved
run, together with the teacher. J reads that measured latency, so that students of different depths can be compared.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.baselines.recipes import INPUTS, RECIPES, UNITS, for_all
from rlkd.agents.evaluation.comparison import paired, summarise
from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.controllers import Controller, Results, hold_start
from rlkd.compression.real.cut import load_module_student, save_module_student
from rlkd.cost import time_calls
from rlkd.envs.action import ControlConfig, published_setting, with_exit_kind, with_values
from rlkd.envs.real import RealConfig, RealScenario, build_real_scenario
from rlkd.envs.reward import KAPPA, MAX_PENALTY
from rlkd.errors import UserError
from rlkd.io.files import read_json
from rlkd.io.records import plain, write_json
from rlkd.losses import FAMILIES
from rlkd.models.real.attachment import AttachConfig
from rlkd.runs.distil_real import DistilledModule, distil_module
from rlkd.runs.folder import Progress
from rlkd.runs.goals import with_goal

TIMED_BATCHES = (1, 32)
TIMED_ROUNDS = 31
NNCF_STEP, NNCF_INPUTS = 0.5, 0.5  # a first step of 0.1; inputs are pruned half as far as units
CUBIC_END, ONE_SHOT_AT = 0.6, 0.4  # last axes of the recipes: pruned at 70 % and at 42 % of the training
WITHIN = 0.01


@dataclass(frozen=True)
class RealCompareConfig(RealConfig):
    """`rlkd compare --data ...`: the same real student under several controllers."""

    methods: str = "policy,plain,cubic,one_shot,nncf,smaller"
    """Comma-separated: REAL_METHODS. `plain` always joins: its student is the dense one that ratios refer to."""
    num_seeds: int = 3
    """Trainings of every method."""
    shares: tuple[float, ...] = (0.7, 0.4)
    """Final shares of kept units and inputs that `cubic` and `one_shot` try, one training each; the best on validation
    counts."""

    def method_names(self) -> list[str]:
        """`methods` as a list, each once, `plain` first."""
        return list(dict.fromkeys(["plain", *(name.strip() for name in self.methods.split(","))]))

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        super().check()
        for name in self.method_names():
            if name not in REAL_METHODS:
                raise UserError(f"methods: got {name!r}; allowed: {', '.join(REAL_METHODS)}")
        if "smaller" in self.method_names() and self.student:
            raise UserError("methods: got 'smaller' and --student; allowed with a student that is cut from the teacher")
        if self.num_seeds < 1:
            raise UserError(f"num_seeds: got {self.num_seeds}; allowed: at least 1")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"shares: got {list(self.shares)}; allowed: one or more, each above 0 and at most 1")


@dataclass(frozen=True)
class RealMethod:
    """One way of setting the controls of a real student."""

    meaning: str
    controllers: Callable[[RealCompareConfig, ControlConfig, Bundle | None], list[Controller]]
    """One for each training of a seed; the best on validation ships."""
    has_exits: bool = False
    """Whether early exits are attached."""
    num_blocks_less: int = 0
    """How many blocks fewer than the others its student has."""


def plain_setting(controls: ControlConfig) -> Tensor:
    """[12], labels and softened answers half and half at T = 4 (Hinton et al. 2015); nothing is left out."""
    values: dict[str, float | Tensor] = {f"weight_{name}": 0.0 for name in FAMILIES}
    values |= {"weight_hard_label": 0.5, "weight_response": 0.5, "temperature": 4.0}
    return with_exit_kind(with_values(published_setting(controls)[None], values, controls), "never")[0]


def _plain(config: RealCompareConfig, controls: ControlConfig, bundle: Bundle | None) -> list[Controller]:
    return [RECIPES["constant"].controller(for_all(plain_setting(controls)))]


def _pruned(
    recipe: str, last: float, config: RealCompareConfig, controls: ControlConfig, bundle: Bundle | None
) -> list[Controller]:
    """`recipe` at every share, with the loss weights of `plain`."""
    made = []
    for share in config.shares:
        values: dict[str, float | Tensor] = {"unit_keep": share, "feature_keep": share}
        setting = with_values(plain_setting(controls)[None], values, controls)[0]
        made.append(RECIPES[recipe].controller(for_all(torch.cat([setting, torch.tensor([last])]))))
    return made


def _nncf(config: RealCompareConfig, controls: ControlConfig, bundle: Bundle | None) -> list[Controller]:
    point = plain_setting(controls)
    point[UNITS], point[INPUTS] = NNCF_STEP, NNCF_INPUTS
    return [RECIPES["nncf"].controller(for_all(point))]


def _policy(config: RealCompareConfig, controls: ControlConfig, bundle: Bundle | None) -> list[Controller]:
    assert bundle is not None
    return [bundle.policy.controller()]


def _start(config: RealCompareConfig, controls: ControlConfig, bundle: Bundle | None) -> list[Controller]:
    return [hold_start]


REAL_METHODS: dict[str, RealMethod] = {
    "policy": RealMethod("closed loop: the learned policy", _policy, has_exits=True),
    "start": RealMethod("the setting that the policy begins with, unchanged", _start, has_exits=True),
    "plain": RealMethod("plain distillation: labels and softened answers at T = 4, the whole student", _plain),
    "cubic": RealMethod(
        "plain distillation, units and inputs pruned along the cubic schedule (Zhu & Gupta 2017)",
        partial(_pruned, "cubic", CUBIC_END),
    ),
    "one_shot": RealMethod(
        "plain distillation, pruned once at two fifths, then fine-tuned", partial(_pruned, "one_shot", ONE_SHOT_AT)
    ),
    "nncf": RealMethod("plain distillation, pruned while above the floor (NNCF's rule)", _nncf),
    "smaller": RealMethod("plain distillation of a student with one block less", _plain, num_blocks_less=1),
}


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
    num_trainings = sum(len(_controllers(name, config, bundle)) for name in names) * len(seeds)
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
        self._made: dict[tuple[bool, int], RealScenario] = {}
        self._folder = folder
        self.preference = config.goal.weights(config.preference)

    def of(self, has_exits: bool, num_blocks_less: int) -> RealScenario:
        """Return the scenario of a method."""
        key = (has_exits, num_blocks_less)
        if key not in self._made:
            self._made[key] = self._build(*key)
        return self._made[key]

    def _build(self, has_exits: bool, num_blocks_less: int) -> RealScenario:
        config, policy = self._config, self._bundle.policy
        if not has_exits:
            config = dataclasses.replace(config, attach=AttachConfig(blocks=config.attach.blocks, exits=()))
        if num_blocks_less:
            whole = len(self.of(True, 0).student.plan.blocks)
            if whole <= num_blocks_less:
                raise UserError("methods: got 'smaller'; the student has one block alone; leave it out")
            config = dataclasses.replace(config, cut=dataclasses.replace(config.cut, layers=whole - num_blocks_less))
        profile = self._folder / f"cost_profile-{'exits' if has_exits else 'plain'}-{num_blocks_less}.json"
        if profile.exists():
            config = dataclasses.replace(config, cost=dataclasses.replace(config.cost, profile=str(profile)))
        start = policy.start if has_exits else plain_setting(policy.controls)  # step sizes begin alike
        scenario = build_real_scenario(config, policy.controls, start, self._seed)
        if not profile.exists():
            scenario.profile.save(profile)
        scenario = with_goal(scenario, config.goal, config.preference)
        if self._made:  # a share of the dense student's accuracy means the dense student of the first scenario
            scenario = dataclasses.replace(scenario, known=next(iter(self._made.values())).known)
        return scenario


def _controllers(name: str, config: RealCompareConfig, bundle: Bundle) -> list[Controller]:
    return REAL_METHODS[name].controllers(config, bundle.policy.controls, bundle)


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
    method = REAL_METHODS[name]
    first = scenarios.of(True, 0)  # before the others: the floor may be a share of its dense student's accuracy
    scenario = scenarios.of(method.has_exits, method.num_blocks_less) if name != "policy" else first
    best: tuple[DistilledModule, list[dict[str, float]]] | None = None
    for controller in _controllers(name, config, bundle):
        windows: list[dict[str, float]] = []

        def on_window(row: dict[str, float], observation: Tensor, windows: Any = windows) -> None:
            windows.append(row)
            progress.advance(1)

        done = distil_module(scenario, controller, seed, on_window, None, config.guard)
        if best is None or done.figures["validation_score"] > best[0].figures["validation_score"]:
            best = (done, windows)
    assert best is not None
    done, windows = best
    save_module_student(done.student, place, scenario.processor, {"figures": done.figures})
    row = {"method": name, "seed": seed, "diverged": done.diverged, **done.figures, "windows": windows}
    write_json(file, row)
    return row


def _time_together(rows: Mapping[str, dict[str, Any]], seed: int, scenarios: _Scenarios, folder: Path) -> None:
    """Put `measured` into the rows of one seed: seconds of a batch, all students and the teacher in one run."""
    file = folder / "rows" / f"measured-{seed}.json"
    saved = dict(read_json(file, "latencies of a comparison")) if file.exists() else {}
    if set(saved) != set(rows):
        scenario = scenarios.of(True, 0)
        students = {name: load_module_student(folder / "students" / f"{name}-{seed}") for name in rows}
        saved = {name: {} for name in rows}
        for size in sorted({*TIMED_BATCHES, scenario.profile.batch_size}):
            test = scenario.data.splits["test"]
            index = test[torch.arange(size) % len(test)]
            calls: dict[str, Callable[[], object]] = {
                name: partial(student, **scenario.data.batch(index)) for name, student in students.items()
            }
            if scenario.teacher is not None and scenario.teacher_data is not None:
                calls["teacher"] = partial(scenario.teacher.eval(), **scenario.teacher_data.batch(index))
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
        gain = weights[0] * accuracy + weights[1] * (1 - latency) + weights[2] * (1 - energy)
        values = {
            "score": gain - min(MAX_PENALTY, KAPPA * shortfall),
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
        trainings = len(config.shares) if name in ("cubic", "one_shot") else 1
        methods[name] = summarise(results[name], trainings, everything, generator)
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
