"""Write docs/results/exit_gate.md: a student's own exit gates against the confidence threshold, paired.

    python experiments/exit_gate.py

Both rules train the same students of the same tasks from the same weights on the same batches under the same held
controls; the exit control stands between its ends, so samples are decided on one by one. One cost profile serves both:
the gate's extra work is counted.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rlkd.agents.baselines.schedules import follow

from rlkd.agents.evaluation.comparison import compare, paired
from rlkd.agents.evaluation.held_out import held_out_seeds
from rlkd.agents.policy.controllers import Results, run
from rlkd.cost import CostConfig, save_profile
from rlkd.data import Preference
from rlkd.envs.action import CONTROLS, EXIT_DEAD_ZONE, published_setting
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.io.cache import cache_dir
from rlkd.models import GateConfig, StudentConfig
from rlkd.models.gate import START
from rlkd.runs.folder import use_one_thread

DOCS = Path(__file__).parent.parent / "docs" / "results"
NUM_TASKS, ACCURACY_WEIGHTS = 64, (0.6, 0.9)
STUDENTS = {
    "48-48, one exit": StudentConfig(),
    "128-128-128, two exits": StudentConfig(widths=(128,) * 3, exits=(1, 2)),
}
GATES = {
    "gate": GateConfig(enabled=True),
    "gate, beta 1": GateConfig(enabled=True, beta_start=1.0, beta_end=1.0),
}


def setting(scenario: Scenario) -> torch.Tensor:
    """[1, 9]: the published weights, three fifths of the inputs, half of the units, exits at the gates' own start."""
    position = published_setting(scenario.config.controls)
    chance = 1.0 / scenario.data.num_classes
    exit_position = EXIT_DEAD_ZONE + (1 - 2 * EXIT_DEAD_ZONE) * (START - chance) / (1 - chance)
    for name, value in (("feature_keep", 0.8), ("unit_keep", 0.77), ("learning_rate", 0.7)):
        position[CONTROLS.index(name)] = value
    position[CONTROLS.index("exit_threshold")] = exit_position
    return position[None]


def of_student(student: StudentConfig) -> dict[str, dict[str, Results]]:
    """Results of every rule for each accuracy weight."""
    plain = build_scenario(EnvConfig(student=student))
    profile = cache_dir() / "exit_gate_profile.json"
    save_profile(plain.profile, profile)
    cost = CostConfig(profile=str(profile))
    scenarios = {"threshold": plain}
    for name, gate in GATES.items():
        scenarios[name] = build_scenario(EnvConfig(student=dataclasses.replace(student, gate=gate), cost=cost))
    seeds = held_out_seeds(0, NUM_TASKS)
    tables: dict[str, dict[str, Results]] = {}
    for weight in ACCURACY_WEIGHTS:
        tasks = plain.config.task.with_preference(Preference(weight))
        table = {}
        for name, scenario in scenarios.items():
            controller = follow(setting(scenario))
            table[name] = run(scenario, controller, seeds, tasks)
            table[f"{name}, tuned"] = run(scenario, controller, seeds, tasks, tune_exit=True)
        tables[str(weight)] = table
    return tables


def page(tables: dict[str, dict[str, dict[str, Any]]], wall_s: float) -> str:
    """The whole of exit_gate.md."""
    lines = [
        "# The student's own exit gates against the confidence threshold",
        "",
        f"Command: `python experiments/exit_gate.py`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, {wall_s:.0f} s.",
        f"{NUM_TASKS} held-out tasks of the default distribution (digits), test data; the same students, batches and held controls for all, 180 updates.",
        f"*threshold*: a sample leaves at a confidence of {START}. *gate*: it leaves where the trained gate says so, L = distillation - beta E[R], beta 0.1 rising to 0.3",
        "by 0.05 every 1,000 updates (180 updates never rise); beta 1 for comparison. *tuned*: each student's exit control is set on validation afterwards: for the",
        "threshold any of eleven positions, for gates an end (all leave, none leaves early) or the gate. Latency is the cost profile's at batch 1,024.",
    ]
    for student, by_weight in tables.items():
        lines += ["", f"## {student}", ""]
        lines += [
            "| accuracy weight | rule | J mean | accuracy | MACs | latency | gate's lead in J over that (95 %) | wins |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for weight, table in by_weight.items():
            for name, m in table["methods"].items():
                row = table["paired"].get(name)
                lead = wins = ""
                if row:
                    low, high = row["ci95"]
                    lead = f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
                    wins = f"{row['probability_of_improvement']:.0%}"
                lines.append(
                    f"| {weight} | {name} | {m['score']['mean']:.4f} | {m['accuracy']['mean']:.4f} | {m['macs_ratio']['mean']:.3f} "
                    f"| {m['latency_ratio']['mean']:.3f} | {lead} | {wins} |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train, compare, write."""
    use_one_thread()
    began = time.perf_counter()
    generator = np.random.default_rng(0)
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for student, config in STUDENTS.items():
        tables[student] = {}
        for weight, results in of_student(config).items():
            table = compare(results, dict.fromkeys(results, 1.0), 0, "gate")
            table["paired"] = {
                "threshold": paired(results["gate"], results["threshold"], generator),
                "threshold, tuned": paired(results["gate, tuned"], results["threshold, tuned"], generator),
                "gate, beta 1": paired(results["gate"], results["gate, beta 1"], generator),
            }
            tables[student][weight] = table
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "exit_gate.json").write_text(json.dumps(tables, indent=1) + "\n")
    text = page(tables, time.perf_counter() - began)
    (DOCS / "exit_gate.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
