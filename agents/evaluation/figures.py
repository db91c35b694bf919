"""Figures of recorded runs: curves, controls, accuracy against cost."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlkd.agents.evaluation.recorded_run import Run
from rlkd.agents.evaluation.verdict import student_of, timed
from rlkd.envs.action import CONTROLS
from rlkd.envs.guard import NO_WINDOW
from rlkd.io.files import number

# Okabe & Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ONE_STUDENT = {
    "student/score": "score J after each window (validation)",
    "student/accuracy": "accuracy after each window (validation)",
}


def _against(run: Run, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of `tag` over student trainings where the run counts them, else over its own steps."""
    steps, values = run.scalars.get(tag, ([], []))
    counted_at, trainings = run.scalars.get("student/num_trainings", ([], []))
    if not counted_at:
        return np.array(steps), np.array(values)
    # between two counts, where a damaged file lost one, the count grows evenly; nothing is trained before the first
    return np.interp(steps, [0, *counted_at], [0.0, *trainings]), np.array(values)


def _grid(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=x == "window"))
    axis.spines[["top", "right"]].set_visible(False)


def _at_most_one(axis: Axes) -> None:
    """End the vertical axis just above 1: no accuracy is greater."""
    axis.set_ylim(top=min(axis.get_ylim()[1], 1.005))


def _progress_name(runs: list[Run]) -> str:
    trained = ["student/num_trainings" in run.scalars for run in runs]
    if all(trained):
        return "student trainings"
    return "student trainings, or window of a replay" if any(trained) else "window"


def reward_curves(runs: list[Run]) -> Figure:
    """Return of an episode, score and accuracy of the students at its end, one line a run; on the right, goals met.

    Where the policy was evaluated while it learned, panels in front show what it reached on validation scenarios.
    """
    panels = [
        ("eval/score", "validation scenarios: score", "J"),
        ("eval/goal_met", "validation scenarios: goals met", "share of students with a floor"),
        ("reward/return", "return (gain in J)", "J"),
        ("student/score", "final score while learning", "J"),
        ("student/accuracy", "final accuracy while learning", "share of samples"),
        ("student/goal_met", "goals met while learning", "share of students with a floor"),
        ("student/margin", "margin to the floor (validation)", "share of samples"),
    ]
    panels = [panel for panel in panels if any(panel[0] in run.scalars for run in runs)]
    if _progress_name(runs) == "window":  # one student, and no policy that learns
        panels = [(tag, ONE_STUDENT.get(tag, title), unit) for tag, title, unit in panels]
    if not panels:
        return Figure()
    num_columns = min(4, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(3.7 * num_columns, 3.4 * num_rows), layout="constrained")
    axes = [axis for row in figure.subplots(num_rows, num_columns, squeeze=False) for axis in row]
    for axis in axes[len(panels) :]:
        axis.remove()
    axes = axes[: len(panels)]
    for axis, (tag, title, unit) in zip(axes, panels, strict=True):
        for i, run in enumerate(runs):
            x, y = _against(run, tag)
            if len(x):
                axis.plot(x, y, color=COLOURS[i % len(COLOURS)], label=run.label, linewidth=1.5)
        _grid(axis, title, _progress_name(runs), unit)
        if tag == "student/accuracy":
            _at_most_one(axis)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def controls_over_windows(runs: list[Run]) -> Figure:
    """Draw the controls of one student over the windows of its training in their own units, a line a run."""
    drawn = [run for run in runs if run.windows]
    if not drawn:
        return Figure()
    panels = [
        ("weight_hard_label", "weight on the labels", "share of all loss weights", False),
        ("weight_response", "weight on the teacher's answers", "share of all loss weights", False),
        ("weight_feature", "weight on the teacher's features", "share of all loss weights", False),
        ("weight_attention", "weight on the teacher's attention maps", "share of all loss weights", False),
        ("temperature", "temperature", "softening of the teacher's answers", True),
        ("step_size", "learning rate", "step size", True),
        ("feature_keep", "inputs kept", "share of the inputs", False),
        ("unit_keep", "units kept", "share of the units", False),
        ("first_exit_rate", "samples that leave at the first exit", "share of validation samples", False),
        ("accuracy", "accuracy, and the floor (dashed)", "share of validation samples", False),
        ("latency_ratio", "latency by the cost profile", "ratio to the dense student", False),
        ("macs_ratio", "MACs", "ratio to the dense student", False),
    ]
    panels = [panel for panel in panels if any(panel[0] in run.windows[0] for run in drawn)]
    figure = Figure(figsize=(14, 2.9 * math.ceil(len(panels) / 4)), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(panels) / 4), 4, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (name, title, unit, is_log) in zip(axes, panels, strict=False):
        for i, run in enumerate(drawn):
            rows = [row for row in run.windows if name in row]
            x, y = [float(row["window"]) for row in rows], [float(row[name]) for row in rows]
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(x, y, color=colour, label=run.label, linewidth=1.5, marker=".", markersize=4)
            best = int(student_of(run.result or {"methods": {}}).get("best_window", NO_WINDOW))
            if best > 0:
                axis.axvline(best, color=colour, linestyle=":", linewidth=1)
            if name == "accuracy" and any(row.get("floor") for row in rows):
                axis.plot(x, [float(row.get("floor", 0)) for row in rows], color=colour, linestyle="--", linewidth=1)
        _grid(axis, title, "window", unit)
        if is_log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        elif name not in ("accuracy", "latency_ratio"):
            axis.set_ylim(-0.03, 1.03)
        if name == "accuracy":
            _at_most_one(axis)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def controls(runs: list[Run]) -> Figure:
    """Mean unit control over the run, a panel a control and a line a run."""
    runs = [run for run in runs if not run.windows and any(f"action/{name}" in run.scalars for name in CONTROLS)]
    if not runs:
        return Figure()
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, name in zip(figure.subplots(3, 4, sharey=True).flat, CONTROLS, strict=True):
        for i, run in enumerate(runs):
            axis.plot(*_against(run, f"action/{name}"), color=COLOURS[i % len(COLOURS)], label=run.label, linewidth=1.5)
        _grid(axis, name, "", "")
        axis.set_ylim(-0.03, 1.03)
    figure.supxlabel(_progress_name(runs), fontsize=10)
    figure.supylabel("mean unit control (0 to 1)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.axes[0].legend(handles, labels, fontsize=8, frameon=False)
    return figure


def accuracy_cost(runs: list[Run]) -> Figure:
    """Test accuracy against MACs and latency, a colour a method, a label a goal."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    points = [point for run in runs for point in points_of(run)]
    if not points:
        return Figure()
    methods = list(dict.fromkeys(label for label, _, _ in points))
    for axis, cost, title in zip(
        axes, ("macs_ratio", "latency_ratio"), ("MACs", "latency (cost profile)"), strict=True
    ):
        together: dict[tuple[str, float, float], list[str]] = {}  # goals whose points would hide each other
        for label, goal, row in points:
            together.setdefault((label, round(row[cost], 2), round(row["accuracy"], 2)), []).append(goal)
        for label, _, row in points:
            i = methods.index(label)
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.scatter(row[cost], row["accuracy"], color=colour, marker=marker, s=45, zorder=3)
        for (label, x, y), goals in together.items():
            offset = (6, 4) if methods.index(label) % 2 == 0 else (6, -11)
            axis.annotate(", ".join(sorted(goals)), (x, y), offset, textcoords="offset points", fontsize=8)
        for i, label in enumerate(methods):
            axis.scatter([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=label)
        if not any(label.endswith(": dense") for label in methods):
            axis.axvline(1.0, color="#888", linestyle=":", linewidth=1)  # its accuracy is not recorded
            axis.annotate("dense student", (1.0, 0.0), (3, 4), ("data", "axes fraction"), "offset points", fontsize=8)
        _grid(axis, f"accuracy against {title}", f"{title}, ratio to the dense student", "test accuracy")
        axis.margins(0.15)
        _at_most_one(axis)
        axis.set_xlim(left=0.0)
    if methods:
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def points_of(run: Run) -> list[tuple[str, str, dict[str, float]]]:
    """(label, goal, mean metrics) of every method and goal of a run."""
    if run.result is None:
        return []
    names = ("accuracy", "macs_ratio", "latency_ratio")

    def drawn(value: Any, name: str) -> float:
        return number(value, name, -1e9, 1e9)

    if "goals" in run.result:
        return [
            (f"{run.label}: {method}", str(table["name"]), {name: drawn(entry[name]["mean"], name) for name in names})
            for table in run.result["goals"]
            for method, entry in table["methods"].items()
        ]
    points = [
        (f"{run.label}: {method}", "", {name: drawn(entry[name], name) for name in names})
        for method, entry in run.result["methods"].items()
        if all(name in entry for name in names)
    ]
    return [*points, *_teacher_point(run)]


def _teacher_point(run: Run) -> list[tuple[str, str, dict[str, float]]]:
    """Return the teacher's accuracy and cost beside the dense student's; nothing where a run does not tell."""
    student = student_of(run.result or {"methods": {}})
    if not {"macs_of_teacher", "macs_of_dense_student", "teacher_accuracy"} <= set(student):
        return []
    row = timed(student)
    if "teacher_latency_s" not in row:
        return []
    values = {
        "accuracy": student["teacher_accuracy"],
        "macs_ratio": student["macs_of_teacher"] / student["macs_of_dense_student"],
        "latency_ratio": row["teacher_latency_s"] / row["dense_latency_s"],
    }
    return [(f"{run.label}: teacher", "", {n: number(v, n, -1e9, 1e9) for n, v in values.items()})]
