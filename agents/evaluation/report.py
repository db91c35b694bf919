"""Read runs back from their TensorBoard event files and results, and draw them: three figures and one HTML page."""

import base64
import html
import io
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlkd.agents.evaluation.events import Scalars, read_scalars
from rlkd.agents.evaluation.verdict import (
    asked_and_reached,
    classes_of,
    student_of,
    timed,
    verdict,
    weak_spots,
    what_the_policy_did,
)
from rlkd.envs.action import CONTROLS
from rlkd.errors import UserError
from rlkd.io.files import MAX_JSON_BYTES, inside, number, parse_json, read_bytes, read_json, reason, write_whole

# Okabe & Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_EVENT_FILES = 64
MAX_CLASSES = 40  # rows of the table of classes


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    scalars: Scalars  # steps and values of every tag
    result: dict[str, Any] | None  # result.json; None if the run did not get to its end
    texts: dict[str, str]  # command.txt, versions.json, config.yaml, as far as they exist
    notes: tuple[str, ...] = ()  # what could not be read of the event files
    windows: tuple[dict[str, Any], ...] = ()  # controls and validation metrics of the one student, a row a window
    date: str = ""  # of the last event file

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def label(self) -> str:
        """The name for a legend, where matplotlib reads dollar signs as formulas and hides what begins with "_"."""
        text = self.name.replace("$", r"\$")
        return f" {text}" if text.startswith("_") else text


def read_run(folder: Path | str) -> Run:
    """Read one run folder.

    Raises:
        UserError: no such folder, no event file in it, or a file that cannot be read.
    """
    folder = Path(folder)
    events = folder / "tensorboard"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    files = sorted(events.glob("*tfevents*")) if events.is_dir() else []
    if not files:
        raise UserError(f"{events}: holds no TensorBoard event file; give the folder of a train or replay run")
    if len(files) > MAX_EVENT_FILES:
        raise UserError(f"{events}: holds {len(files)} event files; allowed: at most {MAX_EVENT_FILES}")
    scalars, notes = read_scalars([inside(folder, f"tensorboard/{file.name}") for file in files])
    if notes and not scalars:
        raise UserError(f"{notes[0]}; give the folder of another run")
    result = None
    if (folder / "result.json").exists():
        result = read_json(inside(folder, "result.json"), "a run's result")
    names = ("command.txt", "versions.json", "config.yaml")
    texts = {
        name: read_bytes(inside(folder, name), MAX_JSON_BYTES).decode(errors="replace")
        for name in names
        if (folder / name).exists()
    }
    date = time.strftime("%Y-%m-%d", time.localtime(max(file.stat().st_mtime for file in files)))
    run = Run(folder, scalars, result, texts, tuple(notes), _read_windows(folder), date)
    try:
        _section(run), _points(run), controls_over_windows([run])  # all that the report takes is there, of its kind
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{folder / 'result.json'}: not a run's result, or a damaged one ({reason(error):.100})"
        ) from error
    return run


def _read_windows(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the rows of the windows of a run's one student; empty where there are none."""
    for name in ("windows.jsonl", "metrics.jsonl"):
        if (folder / name).exists():
            text = read_bytes(inside(folder, name), MAX_JSON_BYTES).decode(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            rows = [parse_json(line.encode(), f"{folder / name}: line {i}") for i, line in enumerate(lines[:-1], 1)]
            if lines and text.endswith("\n"):  # the last line of a run that was killed may be torn
                rows.append(parse_json(lines[-1].encode(), f"{folder / name}: line {len(lines)}"))
            if all("window" in row and "temperature" in row for row in rows):
                return tuple(rows)
    return ()


def write_report(runs: list[Run], out: Path) -> list[Path]:
    """Write the figures that the runs have data for, and `report.html`; returns their paths."""
    figures = {
        "reward_curves": reward_curves(runs),
        "controls": controls(runs),
        "controls_over_windows": controls_over_windows(runs),
        "accuracy_cost": accuracy_cost(runs),
    }
    images = {}
    for name, figure in figures.items():
        if not any(axis.has_data() for axis in figure.axes):
            continue
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a run's name may be in any script
            figure.savefig(buffer, format="png", dpi=150)
        images[name] = buffer.getvalue()
        write_whole(out / f"{name}.png", images[name])
    write_whole(out / "report.html", page(runs, images))
    return [*(out / f"{name}.png" for name in images), out / "report.html"]


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
            best = int(student_of(run.result or {"methods": {}}).get("best_window", 0))
            if best:
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
    points = [point for run in runs for point in _points(run)]
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


def _points(run: Run) -> list[tuple[str, str, dict[str, float]]]:
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


_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-top:1px solid var(--line);padding-top:1rem}
figure{margin:1rem 0;overflow-x:auto}img{max-width:100%;background:#fff;border-radius:4px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}pre{overflow-x:auto;background:var(--soft);padding:.7rem}
h3{font-size:1rem;margin:1.2rem 0 .2rem}.date{color:#888;margin:-.6rem 0 1rem}
.verdict{font-size:1.05rem;border-left:4px solid #0072B2;padding:.2rem .8rem;background:var(--soft)}
caption{text-align:left;font-weight:600;padding:.3rem 0}
"""


ONE_STUDENT = {
    "student/score": "score J after each window (validation)",
    "student/accuracy": "accuracy after each window (validation)",
}
TITLES = {
    "reward_curves": "Curves, read from the event files. A policy that learns is evaluated on scenarios that it is not "
    "trained on.",
    "controls": "Mean controls over the student trainings, 0 to 1 through their ranges.",
    "controls_over_windows": "What the policy did: controls over the windows of the student's training, in their own "
    "units. The dotted line is the window that ships.",
    "accuracy_cost": "Test accuracy against cost; left is cheaper, up is better.",
}


def page(runs: list[Run], images: dict[str, bytes]) -> str:
    """Return one self-contained HTML page; every text from a run is escaped."""
    figures = [
        f'<figure><img alt="{TITLES[name]}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{TITLES[name]}</figcaption></figure>"
        for name, image in images.items()
    ]
    names = html.escape(", ".join(run.name for run in runs))
    dates = html.escape(", ".join(dict.fromkeys(run.date for run in runs if run.date)))
    heads = "".join(_head(run, has_name=len(runs) > 1) for run in runs)
    sections = "".join(_section(run) for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>rlkd: {names}</title><style>{_STYLE}</style></head>"
        f'<body><h1>{names}</h1><p class="date">{dates}</p>{heads}{"".join(figures)}{sections}</body></html>\n'
    )


def _head(run: Run, *, has_name: bool) -> str:
    """Return the verdict of a run, what was asked and reached, what the policy did, and where the student is weak."""
    parts = [f"<h2>{html.escape(run.name)}</h2>"] if has_name else []
    if run.result is None:
        return "".join(parts)
    text = verdict(run.result)
    parts.append(f'<p class="verdict">{html.escape(text)}</p>' if text else "")
    rows = asked_and_reached(run.result)
    if rows:
        header = ["on test data", "asked", "student", "dense student", "teacher"]
        parts.append(_rows("What was asked, what was reached", header, rows))
    best_window = int(student_of(run.result).get("best_window", 0))
    parts += [_list("What the policy did", what_the_policy_did(run.windows, best_window))]
    classes = classes_of(student_of(run.result))
    if classes:
        cells = [[name, str(count), f"{accuracy:.4f}"] for name, count, accuracy in classes[:MAX_CLASSES]]
        more = f", the worst {MAX_CLASSES} of {len(classes)}" if len(classes) > MAX_CLASSES else ""
        parts.append(_rows(f"Classes, the worst first{more}", ["class", "test samples", "accuracy"], cells))
    parts.append(_list("Where it is weak", weak_spots(run.result)))
    return "".join(parts)


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return f"<h3>{title}</h3><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _section(run: Run) -> str:
    parts = [f"<h2>{html.escape(run.name)}: all figures</h2>"]
    parts += [f"<p>Note: {html.escape(note)}.</p>" for note in run.notes]
    if run.result is None:
        parts.append("<p>This run has no result: it was stopped before its end, or is still running.</p>")
    else:
        _head(run, has_name=False)
        tables = run.result.get("goals")
        if tables:
            parts += [_table(str(table["name"]), table) for table in tables]
        else:
            parts.append(_plain_table(run.result["methods"]))
        cost = run.result["cost"]
        searched = f"{cost['search_trainings']} for the search, " if "search_trainings" in cost else ""
        line = (
            f"Number of tasks: {run.result.get('num_tasks')}, {run.result.get('split')} data. "
            f"{cost.get('agent_trainings', 0)} student trainings for the agent, {searched}"
            f"{cost['wall_s']:.0f} s."
        )
        parts.append(f"<p>{html.escape(line)}</p>")
    for name, text in run.texts.items():
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>")
    return "".join(parts)


def _rows(caption: str, header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table(caption: str, table: dict[str, Any]) -> str:
    pairs = {name.split("-", 1)[1]: row for name, row in table["paired"].items()}
    first = next((name.split("-", 1)[0] for name in table["paired"]), "")
    header = ["method", "J mean", "J IQM [95 %]", "accuracy", "MACs", "latency", "energy"]
    header += ["goals met within 1 point", "shortfall", f"{first}'s lead [95 %]", "wins"]
    rows = []
    for name, m in table["methods"].items():
        low, high = m["score"]["ci95"]
        row = pairs.get(name)
        lead = f"{row['difference']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]" if row else ""
        wins = f"{row['probability_of_improvement']:.0%}" if row else ""
        means = [f"{m[key]['mean']:.3f}" for key in ("accuracy", "macs_ratio", "latency_ratio", "energy_ratio")]
        met = m["goal_met_within_1_point"]
        goals = ["" if met is None else f"{met:.1%}", f"{m['shortfall']:.4f}"]
        score = [f"{m['score']['mean']:.4f}", f"{m['score']['iqm']:.4f} [{low:.4f}, {high:.4f}]"]
        rows.append([name, *score, *means, *goals, lead, wins])
    return _rows(caption, header, rows)


def _plain_table(methods: dict[str, Any]) -> str:
    keys = ["score", "validation_accuracy", "accuracy", "floor", "shortfall", "teacher_accuracy"]
    keys += ["macs_ratio", "latency_ratio", "energy_ratio", "size_ratio"]
    rows = [[name, *(f"{entry[key]:.4f}" if key in entry else "" for key in keys)] for name, entry in methods.items()]
    return _rows("one student", ["method", *keys], rows)
