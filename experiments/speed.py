"""Write docs/results/speed.md: how fast and how good the shipped student is beside the dense one.

    python experiments/speed.py RUN/policy

For each data set and seed the same student (widths 256, 256; same weights, batches, teacher) is trained whole under the
published fixed setting, and under the policy; the second is cut to its kept inputs and units. Both are then timed on
one thread, in turn, on real test inputs. MACs are counted, accuracy is read on test data once.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlkd.agents.evaluation.comparison import interval
from rlkd.agents.policy.bundle import load_bundle
from rlkd.agents.policy.controllers import follow
from rlkd.configs import DistilConfig
from rlkd.data import Preference, Range
from rlkd.envs.action import published_setting
from rlkd.envs.scenario import build_scenario
from rlkd.models import StudentConfig
from rlkd.runs.distil import distil
from rlkd.runs.folder import use_one_thread
from rlkd.teachers import TeacherConfig

DOCS = Path(__file__).parent.parent / "docs" / "results"
DATA_SETS = {"digits": 897, "fashion_mnist": 2000}  # labelled samples
SEEDS = range(5)
WIDTHS = (256, 256)
ACCURACY_WEIGHT = 0.98  # near the end of the range that policies learn: keep the accuracy, save what is free


def one(data_set: str, num_labels: int, seed: int, policy_folder: Path) -> dict[str, float]:
    """Figures of one seed."""
    policy = load_bundle(policy_folder).policy
    base = DistilConfig(
        student=StudentConfig(widths=WIDTHS),
        teacher=TeacherConfig(num_samples=(num_labels,), num_steps=1000),
        preference=Preference(ACCURACY_WEIGHT),
    )
    samples = Range(num_labels, num_labels)
    config = dataclasses.replace(base, task=dataclasses.replace(base.task, dataset=data_set, num_labels=samples))
    scenario = build_scenario(config.env(policy.controls), policy.start)
    small = distil(scenario, policy.controller(), seed, lambda row, observation: None)
    dense = distil(scenario, follow(published_setting(policy.controls)[None]), seed, lambda row, observation: None)
    return {
        "teacher_accuracy": small.figures["teacher_accuracy"],
        "accuracy": small.figures["compacted_accuracy"],
        "dense_accuracy": dense.figures["accuracy"],
        "macs_ratio": small.figures["macs_ratio"],
        **{f"speedup_{b}": small.measured[f"batch_{b}"]["speedup"] for b in (1, 64, 1024)},
        **{f"latency_{b}_s": small.measured[f"batch_{b}"]["latency_s"] for b in (1, 64, 1024)},
        **{f"dense_latency_{b}_s": small.measured[f"batch_{b}"]["dense_latency_s"] for b in (1, 64, 1024)},
    }


def row(data_set: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means with intervals over seeds; medians of what a clock read."""
    generator = np.random.default_rng(0)
    kept = np.array([r["accuracy"] / r["dense_accuracy"] for r in runs])
    return {
        "data_set": data_set,
        "relative_accuracy": interval(kept, "mean", generator),
        **{key: statistics.fmean(r[key] for r in runs) for key in ("teacher_accuracy", "accuracy", "dense_accuracy")},
        "macs_ratio": {
            "mean": statistics.fmean(r["macs_ratio"] for r in runs),
            "max": max(r["macs_ratio"] for r in runs),
        },
        **{
            key: {
                "median": statistics.median(r[key] for r in runs),
                "low": min(r[key] for r in runs),
                "high": max(r[key] for r in runs),
            }
            for key in runs[0]
            if key.startswith(("speedup", "latency", "dense_latency"))
        },
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The whole of speed.md."""
    lines = [
        "# The student that ships: speed beside accuracy",
        "",
        f"Command: `python experiments/speed.py RUN/policy`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, {len(SEEDS)} seeds.",
        f"An MLP with widths {list(WIDTHS)} and one exit, 180 updates. Dense: whole, under the published fixed setting. Compacted: replay of the policy (learned on",
        f"MLPs of at most 128 units, digits and generated data alone) at accuracy weight {ACCURACY_WEIGHT}, physically cut. Latencies: medians over seeds of medians over interleaved rounds (lowest to highest seed).",
        "",
        "| data set | teacher | dense accuracy | compacted accuracy | share of dense (95 %) | MACs kept (most) | batch 1 | batch 64 | batch 1024 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["relative_accuracy"]["ci95"]
        speeds = [
            f"{s['median']:.2f} x ({s['low']:.2f} to {s['high']:.2f}), {r[f'latency_{b}_s']['median'] * 1e6:.0f} us against {r[f'dense_latency_{b}_s']['median'] * 1e6:.0f}"
            for b in (1, 64, 1024)
            for s in (r[f"speedup_{b}"],)
        ]
        lines.append(
            f"| {r['data_set']} | {r['teacher_accuracy']:.3f} | {r['dense_accuracy']:.3f} | {r['accuracy']:.3f} "
            f"| {r['relative_accuracy']['mean']:.3f} ({low:.3f} to {high:.3f}) | {r['macs_ratio']['mean']:.3f} ({r['macs_ratio']['max']:.3f}) | "
            + " | ".join(speeds)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train, time, write."""
    if len(sys.argv) != 2:
        print("usage: python experiments/speed.py RUN/policy", file=sys.stderr)
        return 2
    use_one_thread()
    rows = [
        row(name, [one(name, num_labels, seed, Path(sys.argv[1])) for seed in SEEDS])
        for name, num_labels in DATA_SETS.items()
    ]
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")
    (DOCS / "speed.md").write_text(page(rows))
    print(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
