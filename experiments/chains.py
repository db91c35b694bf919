"""Study: chains under a goal by the command that users run; write docs/results/chains.json and chains.md.

    RLKD_DATA=data python experiments/chains.py --out runs/chains --docs docs/results/chains

Every data set and seed: `rlkd distil --goal.keep 0.98 --goal.reference dense` with the default student. The study goes
on where it was stopped.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from study_results import write_results

from rlkd.cli.main import main as rlkd
from rlkd.runs.folder import use_one_thread

SETS = {"letter": "letter", "fashion_mnist": "Fashion-MNIST 14x14", "satellite": "satellite"}
KEEP = 0.98
BAR = 0.9


def row_of(folder: Path, dataset: str, seed: int) -> dict[str, Any]:
    """Distil the student of a seed, unless its run is finished; returns what it reached."""
    if not (folder / "result.json").exists():
        begin = ["--task.dataset", dataset, "--seed", str(seed), "--goal.keep", str(KEEP), "--goal.reference", "dense"]
        resume = ["--resume", str(folder)] if (folder / "config.yaml").exists() else ["--out", str(folder), *begin]
        code = rlkd(["distil", *resume])
        if code not in (0, 1):
            raise SystemExit(f"{folder}: rlkd distil ended with {code}")
    result = json.loads((folder / "result.json").read_text())
    reached = result["methods"]["policy"]
    kept = {name: reached[name] for name in ("accuracy", "floor", "shortfall", "macs_ratio", "latency_ratio")}
    return {
        "seed": seed,
        **kept,
        "goal_met": result["goal_met"],
        "speedup_over_dense": result["speedup_over_dense"],
        "speedup_over_teacher": result["speedup_over_teacher"],
    }


def page(rows: dict[str, list[dict[str, Any]]], command: str, policy: str) -> str:
    """Results as Markdown."""
    lines = [
        "# Chains under a goal",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, policy {policy}. Each "
        f"seed: `rlkd distil --task.dataset SET --goal.keep {KEEP:g} --goal.reference dense --seed N`, the default student. "
        f"Test data, read once. Bar: goal met by at least {BAR:.0%} of the seeds.",
        "",
        "| data | seeds | goal met | within 1 point | worst shortfall | accuracy, mean | MACs, median | measured, over dense | "
        "over teacher | bar |",
        "|" + "---|" * 10,
    ]
    for dataset, some in rows.items():
        met = sum(row["goal_met"] for row in some)

        def middle(name: str, some: list[dict[str, Any]] = some) -> float:
            return float(statistics.median(row[name] for row in some))

        cells = [
            SETS[dataset],
            f"{len(some)}",
            f"{met} of {len(some)}",
            f"{sum(row['shortfall'] <= 0.01 for row in some)} of {len(some)}",
            f"{max(row['shortfall'] for row in some):.4f}",
            f"{statistics.mean(row['accuracy'] for row in some):.4f}",
            f"{middle('macs_ratio'):.2f}",
            f"{middle('speedup_over_dense'):.2f} x",
            f"{middle('speedup_over_teacher'):.2f} x",
            "reached" if met >= BAR * len(some) else "missed",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Speed-ups are medians over seeds of each run's own measurement."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the runs; a second call goes on")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["letter", "fashion_mnist"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--docs", type=Path, default=None, help="write a page and JSON to this path")
    options = parser.parse_args()
    use_one_thread()
    rows = {
        dataset: [row_of(options.out / f"{dataset}{seed}", dataset, seed) for seed in range(options.seeds)]
        for dataset in options.sets
    }
    folders = [options.out / f"{dataset}{row['seed']}" for dataset in rows for row in rows[dataset]]
    (policy,) = {json.loads((path / "student" / "student.json").read_text())["policy_sha256"][:12] for path in folders}
    command = shlex.join(["python", *sys.argv])
    write_results(options.docs, page(rows, command, policy), {"command": command, "policy": policy, "sets": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
