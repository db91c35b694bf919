"""Several runs of one experiment with different seeds: mean and interval of what they reach."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from rlkd.errors import UserError
from rlkd.io.records import write_json

COUNTED = ("score", "accuracy", "latency_ratio", "macs_ratio", "goal_met_within_1_point")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`.

    Raises:
        UserError: fewer than two seeds, one twice, or no whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or len(set(parts)) < len(parts) or not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds: got {text!r:.60}; allowed: two or more different whole numbers, such as 0,1,2")
    return tuple(int(part) for part in parts)


def mean_interval(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Return mean and 95 % interval of Student's t over n runs.

    Args:
        values: of at least two runs.
    """
    n = len(values)
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def summarise(results: Mapping[int, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Write `summary.json`: what every method reaches under every goal, over the seeds; returns its content.

    Args:
        results: content of `result.json` by seed.
        folder: that has the runs.
    """
    first = next(iter(results.values()))
    goals: dict[str, dict[str, dict[str, Any]]] = {}
    for i, entry in enumerate(first["goals"]):
        rows: dict[str, dict[str, Any]] = {}
        for method in entry["methods"]:
            rows[method] = {}
            for key in COUNTED:
                found = [_number(r["goals"][i]["methods"][method].get(key)) for r in results.values()]
                if all(value is not None for value in found):
                    rows[method][key] = mean_interval([float(value) for value in found if value is not None])
        goals[str(entry["name"])] = rows
    summary = {"seeds": list(results), "interval": "95 % of Student's t over the seeds", "goals": goals}
    write_json(folder / "summary.json", summary)
    return summary


def _number(value: Any) -> float | None:
    """Return a metric, or the mean of one that has an interval of its own."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return None if value is None else float(value)
