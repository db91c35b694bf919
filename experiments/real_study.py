"""What the studies of real models share: methods, one training a (method, seed) kept in a file of its own, tables.

A study can be stopped and called again: rows that are there are not trained anew. Baselines need no policy, so they
can run before one is learned. All rows of a study share one cost profile (`cost_profile.json` in --out), made at first.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkd.agents.policy.bundle import Bundle, load_bundle
from rlkd.agents.policy.controllers import Controller
from rlkd.compression.real.cut import ship
from rlkd.compression.selection import exit_ends, keep_top
from rlkd.data import Preference
from rlkd.envs.action import ControlConfig, published_setting, with_values
from rlkd.envs.real import RealConfig, RealScenario, build_real_scenario
from rlkd.errors import UserError
from rlkd.io.files import read_json, write_whole
from rlkd.io.records import write_json
from rlkd.models.real.attachment import AttachConfig
from rlkd.runs.distil_real import distil_module
from rlkd.runs.folder import git_state
from rlkd.students.real.module import ModuleTrainConfig

FAMILIES = ("hard_label", "response", "feature", "attention")
WEIGHTS = (0.9, 0.6)  # accuracy weights that are reported
BASELINES = ("kd", "fine_tune")
LEGEND = (
    "`kd`: labels and the teacher's softened answers half and half at T = 4; `fine_tune`: labels alone; both whole and without exits, so that J's cost",
    "terms give them nothing. `policy_W`: told the accuracy weight W; `static_W`: its own best held setting for W. Same weights, batches and steps for all.",
    "Means over seeds (lowest to highest). Latency: of the shipped student by the clock, median over seeds, in brackets how much faster than the dense one",
    "beside it; the machine had other work. J = w accuracy + 0.75 (1 - w) (1 - latency / dense) + 0.25 (1 - w) (1 - energy / dense), latency and energy from the profile.",
)


@dataclass(frozen=True)
class Method:
    """One way of setting the controls; `weight` is the preference that it is told, None where it hears none."""

    name: str
    controller: Controller
    controls: ControlConfig
    plan: Tensor | None
    weight: float | None
    attach: AttachConfig
    source: str  # what the controls come from, so that rows of another policy are not taken for these


def constant(position: Tensor) -> Controller:
    """The same position [9] in every window."""
    return lambda observation, episodes, window: position[None].clone()


def baselines() -> list[Method]:
    """Fixed-weight distillation (labels and softened answers half and half, T = 4) and labels alone.

    Nothing is pruned and there is no early exit, neither at inference nor in the loss.
    """
    controls = ControlConfig()
    dense = published_setting(controls)[None]
    none = {f"weight_{name}": 0.0 for name in FAMILIES}
    kd = {**none, "weight_hard_label": 0.5, "weight_response": 0.5, "temperature": 4.0}
    settings = {"kd": kd, "fine_tune": {**none, "weight_hard_label": 1.0}}
    return [
        Method(
            name,
            constant(with_values(dense, values, controls)[0]),
            controls,
            None,
            None,
            AttachConfig(exits=()),
            "fixed",
        )
        for name, values in settings.items()
    ]


def learned(bundle: Bundle, weights: tuple[float, ...]) -> list[Method]:
    """The policy, and its own best static setting, for every accuracy weight."""
    policy = bundle.policy
    methods = []
    for weight in weights:
        best = policy.static.best(torch.tensor([Preference(weight).weights()]))[0]
        shared = (policy.controls, policy.plan, weight, AttachConfig(), bundle.digest[:16])
        methods.append(Method(f"policy_{weight:g}", policy.controller(), *shared))
        methods.append(Method(f"static_{weight:g}", constant(best), *shared))
    return methods


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that every study has."""
    parser.add_argument("--policy", type=Path, default=None, help="bundle; without one only the baselines are trained")
    parser.add_argument("--out", type=Path, required=True, help="rows, cost profile and tables; a second call goes on")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--retime", action="store_true", help="read latencies anew, on a machine that is quiet now")
    parser.add_argument("--methods", default="", help="comma-separated; by default all")
    parser.add_argument("--rate_exponent", type=float, default=0.5, help="train.rate_exponent, for what is learned")
    parser.add_argument("--docs", type=Path, default=None, help="write the tables to this path with .md and .json")


def rows_of(config: RealConfig, options: Any) -> dict[str, list[dict[str, Any]]]:
    """Every chosen method on every seed, from files where they are there, else trained now."""
    methods = [*baselines(), *(learned(load_bundle(options.policy), WEIGHTS) if options.policy else [])]
    if options.methods:
        names = options.methods.split(",")
        unknown = sorted(set(names) - {method.name for method in methods})
        if unknown:
            raise UserError(f"--methods: got {unknown[0]!r}; allowed: {', '.join(m.name for m in methods)} (--policy?)")
        methods = [method for method in methods if method.name in names]
    options.out.mkdir(parents=True, exist_ok=True)
    profile = options.out / "cost_profile.json"
    scenarios: dict[str, RealScenario] = {}

    def scenario_for(method: Method) -> RealScenario:
        key = f"{method.source} {method.weight} {method.attach}"
        if key not in scenarios:
            scenarios.clear()  # one model at a time in memory
            told = replace(_for(config, method), preference=Preference(method.weight or WEIGHTS[0]))
            if profile.exists():
                told = replace(told, cost=replace(config.cost, profile=str(profile)))
            scenarios[key] = build_real_scenario(told, method.controls, method.plan)
            if not profile.exists():
                scenarios[key].profile.save(profile)
            write_whole(options.out / f"mapping-{method.source}.txt", scenarios[key].tables)
        return scenarios[key]

    rows: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        for seed in range(options.first_seed, options.first_seed + options.num_seeds):
            row = _row(config, method, seed, options.out, lambda method=method: scenario_for(method))
            if options.retime and seed == options.first_seed:
                times = _retimed(scenario_for(method), row)
            rows.setdefault(method.name, []).append({**row, "measured": times} if options.retime else row)
            print(f"seed {seed} {method.name}: accuracy {row['accuracy']:.4f} MACs {row['macs_ratio']:.3f}", flush=True)
    return rows


def _retimed(scenario: RealScenario, row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Latencies at batch 1 and 32 of a student cut as the row's and of the dense one, in turn, medians of 21 rounds.

    Time depends on what is kept and not on what was learned, so the weights are those from before the training; where
    samples leave at a threshold between its ends it would depend on both, and the row's own times are kept.
    """
    last = row["windows"][-1]
    always, never = (bool(end) for end in exit_ends(torch.tensor([last["exit_threshold"]]), scenario.data.num_classes))
    if not (always or never):
        return dict(row["measured"])
    groups = scenario.student.plan.groups
    masks = tuple(keep_top(torch.rand(g.size), torch.tensor(last["unit_keep"])) for g in groups)
    keep = last["feature_keep"] if scenario.student.plan.select_after is not None else 1.0
    students = [
        ship(scenario.student, scenario.kind, masks, keep, last["exit_threshold"]),
        ship(scenario.student, scenario.kind, tuple(torch.ones(g.size) for g in groups), 1.0, 1.0),
    ]
    test, measured = scenario.data.splits["test"], {}
    for size in (1, 32):
        inputs = scenario.data.batch(test[torch.arange(size) % len(test)])
        seconds: list[list[float]] = [[], []]
        with torch.inference_mode():
            for _ in range(22):
                for student, times in zip(students, seconds, strict=True):
                    began = time.perf_counter()
                    student(**inputs)
                    times.append(time.perf_counter() - began)
        ours, dense = (float(np.median(times[1:])) for times in seconds)
        measured[f"batch_{size}"] = {"latency_s": ours, "dense_latency_s": dense, "speedup": dense / ours}
    return measured


def _for(config: RealConfig, method: Method) -> RealConfig:
    """`config` with the method's exits; what holds the published learning rate needs no exponent."""
    plain = replace(config.train, rate_exponent=ModuleTrainConfig().rate_exponent)
    train = config.train if method.weight is not None else plain
    return replace(config, attach=method.attach, train=train)


def _row(
    config: RealConfig, method: Method, seed: int, out: Path, scenario: Callable[[], RealScenario]
) -> dict[str, Any]:
    """One training's figures, from its file where it is there and was made under the same configuration."""
    settings = {"config": _changed(asdict(_for(config, method)), asdict(RealConfig(teacher="", data="")))}
    settings |= {"preference": method.weight, "controls": asdict(method.controls), "by": method.source}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = out / "rows" / f"{method.name}-{seed}.json"
    if file.exists():
        row = read_json(file, "a row of a study")
        if row["key"] == key:
            return row
    windows: list[dict[str, Any]] = []
    made = scenario()
    began = time.perf_counter()
    done = distil_module(made, method.controller, seed, lambda row, observation: windows.append(row))
    row = {
        "key": key,
        "method": method.name,
        "seed": seed,
        "diverged": done.diverged,
        **done.figures,
        "measured": done.measured,
        "wall_s": time.perf_counter() - began,
        "windows": windows,
    }
    write_json(file, row)
    return row


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, so that an option that is added later does not make old rows void."""
    return {
        name: _changed(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != defaults[name]
    }


def score(row: dict[str, Any], weight: float) -> float:
    """J of a row under the accuracy weight `weight`, on its figures; a diverged student has 0."""
    a, latency, energy = Preference(weight).weights()
    if row["diverged"]:
        return 0.0
    return float(a * row["accuracy"] + latency * (1 - row["latency_ratio"]) + energy * (1 - row["energy_ratio"]))


def write_tables(title: str, about: str, rows: dict[str, list[dict[str, Any]]], teacher: Any, path: Path) -> None:
    """`path`.md and `path`.json: means over seeds with the lowest and highest seed, and paired differences of J."""
    command = shlex.join(["python", *sys.argv])
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}.",
    ]
    lines += [about, *LEGEND, "", "| method | accuracy | agreement | MACs kept | left early |"]
    lines[-1] += " batch 1 | batch 32 |" + "".join(f" J at {w:g} |" for w in WEIGHTS) + " wall s |"
    lines.append("|" + "---|" * (8 + len(WEIGHTS)))
    for name, some in rows.items():
        told = None if name in BASELINES else float(name.rpartition("_")[2])
        scores = [_spread([score(row, w) for row in some]) if told in (None, w) else "" for w in WEIGHTS]
        cells = [
            name,
            _spread([row["accuracy"] for row in some]),
            _spread([row["teacher_agreement"] for row in some]),
            f"{_mean(row['macs_ratio'] for row in some):.2f}",
            f"{_mean(sum(row['exit_rates'][:-1]) for row in some):.2f}",
            *(_latency(some, size) for size in (1, 32)),
            *scores,
            f"{_mean(row['wall_s'] for row in some):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    pairs = _pairs(rows)
    lines += ["", "| policy less | accuracy weight | J, mean over seeds (each seed) | accuracy |", "|---|---|---|---|"]
    for pair in pairs:
        each = ", ".join(f"{d:+.3f}" for d in pair["differences"])
        lines.append(
            f"| {pair['other']} | {pair['weight']:g} | {pair['mean']:+.3f} ({each}) | {pair['accuracy']:+.3f} |"
        )
    write_whole(path.with_suffix(".md"), "\n".join(lines) + "\n")
    seeds = sorted({row["seed"] for some in rows.values() for row in some})
    card = {
        "schema": 1,
        "task": {"name": title, "teacher": teacher},
        "split": "test",
        "num_tasks": 1,
        "num_seeds": len(seeds),
        "command": command,
        **git_state(Path(__file__).resolve().parent.parent),
        "paired": pairs,
        "seeds": {
            name: [{k: v for k, v in row.items() if k != "windows"} for row in some] for name, some in rows.items()
        },
    }
    if not all(math.isfinite(row["accuracy"]) for some in rows.values() for row in some):
        raise UserError("an accuracy is not finite; see the rows")
    write_json(path.with_suffix(".json"), card)


def _pairs(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Differences of J and accuracy between the policy and every other method, seed by seed."""
    pairs = []
    for weight in WEIGHTS:
        ours = rows.get(f"policy_{weight:g}")
        for other in (f"static_{weight:g}", *BASELINES):
            if ours is None or other not in rows:
                continue
            theirs = {row["seed"]: row for row in rows[other]}
            both = [(row, theirs[row["seed"]]) for row in ours if row["seed"] in theirs]
            differences = [score(a, weight) - score(b, weight) for a, b in both]
            accuracy = _mean(a["accuracy"] - b["accuracy"] for a, b in both)
            pairs.append(
                {
                    "other": other,
                    "weight": weight,
                    "mean": _mean(differences),
                    "differences": differences,
                    "accuracy": accuracy,
                }
            )
    return pairs


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _spread(values: list[float]) -> str:
    return f"{_mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _latency(some: list[dict[str, Any]], size: int) -> str:
    """Median over seeds of the shipped student's measured latency, and how much faster than the dense one's."""
    timed = [row["measured"][f"batch_{size}"] for row in some]
    ms, speedup = (float(np.median([t[name] for t in timed])) for name in ("latency_s", "speedup"))
    return f"{1e3 * ms:.1f} ms ({speedup:.2f} x)"
