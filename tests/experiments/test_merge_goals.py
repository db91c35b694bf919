"""Runs on the same tasks become one; runs on others are refused."""

import csv
from pathlib import Path

import pytest
from merge_goals import merged

from rlkd.io.records import write_json

COLUMNS = ("goal", "method", "task_seed", "score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio", "floor")
GOAL = "keep 0.98"


def run(folder: Path, scores: dict[str, list[float]], *, tasks: tuple[int, ...] = (1, 2), dense: float = 0.9) -> Path:
    """Write a run with these scores by method; floors are 0.8 and every student but the dense one has 0.795."""
    folder.mkdir()
    scores = {"dense": [0.0, 0.0], **scores}
    with (folder / "result.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*COLUMNS, "shortfall", "goal_met"])
        for method, values in scores.items():
            for task, score in zip(tasks, values, strict=True):
                accuracy, short = (dense, 0.0) if method == "dense" else (0.795, 0.005)
                out.writerow([GOAL, method, task, score, accuracy, 0.5, 0.5, 0.5, 0.8, short, method == "dense"])
    methods = {method: {"trainings_per_task": 50.0 if method == "tpe_50" else 1.0} for method in scores}
    goals = [{"name": GOAL, "goal": {"keep": 0.98}, "methods": methods}]
    write_json(folder / "result.json", {"schema": 2, "goals": goals})
    return folder


def test_each_method_comes_from_the_first_run_that_has_it(tmp_path: Path) -> None:
    first = run(tmp_path / "first", {"policy": [0.6, 0.8]})
    second = run(tmp_path / "second", {"policy": [0.1, 0.1], "tpe_50": [0.5, 0.5]})
    (entry,) = merged([first, second])["goals"]
    assert entry["methods"]["policy"]["score"]["mean"] == pytest.approx(0.7)
    assert entry["paired"]["policy-tpe_50"]["difference"] == pytest.approx(0.2)
    assert entry["methods"]["tpe_50"]["trainings_per_task"] == 50
    policy = entry["methods"]["policy"]
    assert (policy["goal_met"], policy["goal_met_within_1_point"]) == (0.0, 1.0)
    assert entry["methods"]["dense"]["goal_met"] == 1.0


def test_other_tasks_and_another_dense_student_are_refused(tmp_path: Path) -> None:
    first = run(tmp_path / "first", {"policy": [0.6, 0.8]})
    with pytest.raises(SystemExit, match="other tasks"):
        merged([first, run(tmp_path / "tasks", {"tpe_50": [0.5, 0.5]}, tasks=(1, 3))])
    with pytest.raises(SystemExit, match="another accuracy"):
        merged([first, run(tmp_path / "dense", {"tpe_50": [0.5, 0.5]}, dense=0.91)])
