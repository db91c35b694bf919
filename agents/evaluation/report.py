"""Read runs back from their TensorBoard event files and results, and draw them: three figures and one HTML page."""

import base64
import html
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlkd.agents.evaluation.events import Scalars, read_scalars
from rlkd.envs.action import CONTROLS
from rlkd.errors import UserError
from rlkd.io.files import MAX_JSON_BYTES, inside, number, read_bytes, read_json, reason, write_whole

# Okabe & Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_EVENT_FILES = 64


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    scalars: Scalars  # steps and values of every tag
    result: dict[str, Any] | None  # result.json; None if the run did not get to its end
    texts: dict[str, str]  # command.txt, versions.json, config.yaml, as far as they exist
    notes: tuple[str, ...] = ()  # what could not be read of the event files

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
    run = Run(folder, scalars, result, texts, tuple(notes))
    try:
        _section(run), _points(run)  # whatever the report takes from the result is there and of its kind
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{folder / 'result.json'}: not a run's result, or a damaged one ({reason(error):.100})"
        ) from error
    return run


def write_report(runs: list[Run], out: Path) -> list[Path]:
    """Write `reward_curves.png`, `controls.png`, `accuracy_cost.png` and `report.html`; returns their paths."""
    figures = {
        "reward_curves": reward_curves(runs),
        "controls": controls(runs),
        "accuracy_cost": accuracy_cost(runs),
    }
    images = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a run's name may be in any script
            figure.savefig(buffer, format="png", dpi=150)
        images[name] = buffer.getvalue()
        write_whole(out / f"{name}.png", images[name])
    write_whole(out / "report.html", page(runs, images))
    return [*(out / f"{name}.png" for name in figures), out / "report.html"]


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
    axis.locator_params(axis="x", nbins=5)
    axis.spines[["top", "right"]].set_visible(False)


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
        ("student/margin", "margin: accuracy less the floor (validation)", "share of samples"),
    ]
    always = ("reward/return", "student/score", "student/accuracy")
    panels = [panel for panel in panels if panel[0] in always or any(panel[0] in run.scalars for run in runs)]
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
        if not axis.lines:
            axis.text(0.5, 0.5, "not recorded", ha="center", transform=axis.transAxes)
    if axes[-2].lines:
        axes[-2].legend(fontsize=8, frameon=False)
    return figure


def controls(runs: list[Run]) -> Figure:
    """Mean unit control over the run, a panel a control and a line a run."""
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
        _grid(axis, f"accuracy against {title}", f"{title}, ratio to the dense student", "test accuracy")
        axis.margins(0.15)
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
    return [(f"{run.label}: {m}", "", {n: drawn(e[n], n) for n in names}) for m, e in run.result["methods"].items()]


_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-top:1px solid var(--line);padding-top:1rem}
figure{margin:1rem 0;overflow-x:auto}img{max-width:100%;background:#fff;border-radius:4px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}pre{overflow-x:auto;background:var(--soft);padding:.7rem}
caption{text-align:left;font-weight:600;padding:.3rem 0}
"""


def page(runs: list[Run], images: dict[str, bytes]) -> str:
    """One self-contained HTML page; every text from a run is escaped."""
    titles = {
        "reward_curves": "Reward curves, read from the event files.",
        "controls": "Controls over the run.",
        "accuracy_cost": "Test accuracy against cost; left is cheaper, up is better.",
    }
    parts = [
        f'<figure><img alt="{titles[name]}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{titles[name]}</figcaption></figure>"
        for name, image in images.items()
    ]
    parts += [_section(run) for run in runs]
    names = html.escape(", ".join(run.name for run in runs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>rlkd: {names}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{names}</h1>{''.join(parts)}</body></html>\n"
    )


def _section(run: Run) -> str:
    parts = [f"<h2>{html.escape(run.name)}</h2>"]
    parts += [f"<p>Note: {html.escape(note)}.</p>" for note in run.notes]
    if run.result is None:
        parts.append("<p>This run has no result: it was stopped before its end, or is still running.</p>")
    else:
        tables = run.result.get("goals")
        if tables:
            parts += [_table(str(table["name"]), table) for table in tables]
        else:
            parts.append(_plain_table(run.result["methods"]))
        cost = run.result["cost"]
        searched = f"{cost['search_trainings']} for the search, " if "search_trainings" in cost else ""
        line = (
            f"{run.result.get('num_tasks')} tasks, {run.result.get('split')} data. "
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
