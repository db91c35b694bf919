"""Merge runs of `rlkd compare` on the same tasks into one result.json, which `publish_goals.py` takes.

    python experiments/merge_goals.py OUT RUN RUN ...

Each method comes from the first run that has it: give the run of the policy first, then those of tuned baselines and
searches. Runs must have the same goals and tasks, and the dense student the same accuracy on every task.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.agents.evaluation.comparison import compare
from rlkd.agents.policy.controllers import Results
from rlkd.io.records import write_json

WITHIN = 0.01  # of the goal, in accuracy
ROUNDING = 1e-6
Rows = list[dict[str, str]]


def read_rows(run: Path) -> dict[str, dict[str, Rows]]:
    """Return the rows of a run's result.csv by goal and method."""
    found: dict[str, dict[str, Rows]] = {}
    with (run / "result.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["goal"], {}).setdefault(row["method"], []).append(row)
    return found


def results_of(rows: Rows) -> Results:
    """Return one method's results; result.csv does not say which students diverged or rolled back."""

    def column(name: str) -> Any:
        return np.array([float(row[name]) for row in rows])

    shortfall = column("shortfall")
    return Results(
        score=column("score"),
        accuracy=column("accuracy"),
        latency_ratio=column("latency_ratio"),
        energy_ratio=column("energy_ratio"),
        macs_ratio=column("macs_ratio"),
        diverged=np.zeros(len(rows), dtype=bool),
        num_rollbacks=np.zeros(len(rows), dtype=np.int64),
        floor=column("floor"),
        shortfall=shortfall,
        goal_met=np.array([row["goal_met"] == "True" for row in rows]),
        goal_met_within_1_point=shortfall <= WITHIN + ROUNDING,
    )


def check_same(goal: str, runs: list[dict[str, Rows]]) -> None:
    """Raise SystemExit unless all methods have the same tasks and dense students are equally accurate."""
    first = next(iter(runs[0].values()))
    tasks = [row["task_seed"] for row in first]
    for run in runs:
        for method, rows in run.items():
            if [row["task_seed"] for row in rows] != tasks:
                raise SystemExit(f"{goal}: {method} has other tasks")
        dense = [float(row["accuracy"]) for row in run["dense"]]
        if max(abs(a - float(b["accuracy"])) for a, b in zip(dense, runs[0]["dense"], strict=True)) > ROUNDING:
            raise SystemExit(f"{goal}: the dense student has another accuracy in one of the runs")


def merged(paths: list[Path], seed: int = 9000) -> dict[str, Any]:
    """Return the content of result.json for all methods of the runs at `paths`; `seed` is of the intervals."""
    tables = [read_rows(path) for path in paths]
    contents = [json.loads((path / "result.json").read_text()) for path in paths]
    goals = []
    for entry in contents[0]["goals"]:
        name = entry["name"]
        runs = [table[name] for table in tables]
        check_same(name, runs)
        rows: dict[str, Rows] = {}
        spent: dict[str, float] = {}
        for run, content in zip(runs, contents, strict=True):
            (same,) = [other for other in content["goals"] if other["name"] == name]
            for method, some in run.items():
                if method not in rows:
                    rows[method], spent[method] = some, same["methods"][method]["trainings_per_task"]
        goals.append({**entry, **compare({m: results_of(some) for m, some in rows.items()}, spent, seed)})
    first = {key: value for key, value in goals[0].items() if key != "name"}
    return {**contents[0], **first, "goals": goals}


def main() -> int:
    """Write the merged result.json."""
    if len(sys.argv) < 4:
        print("usage: python experiments/merge_goals.py OUT RUN RUN ...", file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "result.json", merged([Path(path) for path in sys.argv[2:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
