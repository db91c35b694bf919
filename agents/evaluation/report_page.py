"""The HTML page of a report: verdict, what was asked and reached, figures and tables of recorded runs."""

import base64
import html
from typing import Any

from rlkd.agents.evaluation.recorded_run import Run
from rlkd.agents.evaluation.verdict import (
    asked_and_reached,
    classes_of,
    student_of,
    verdict,
    weak_spots,
    what_the_policy_did,
)
from rlkd.envs.guard import NO_WINDOW

MAX_CLASSES = 40  # rows of the table of classes
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
    sections = "".join(section(run) for run in runs)
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
    best_window = int(student_of(run.result).get("best_window", NO_WINDOW))
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


def section(run: Run) -> str:
    """Return all that a run recorded: notes, tables of its result, command, versions, configuration."""
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
