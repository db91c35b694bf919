"""What the commands that train one student print: the goal before, and the outcome."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlkd.envs.guard import UNTOUCHED
from rlkd.runs.goals import PossibleStudent, goal_line
from rlkd.runs.outcome import FAR, Outcome

TABLE_WIDTH = 110


def show_goal(found: Sequence[PossibleStudent] | str) -> None:
    """Print the students that can come out as a table, or a line about the floor."""
    if isinstance(found, str):
        Console().print(found, highlight=False, soft_wrap=True)
    else:
        Console(width=max(Console().width, TABLE_WIDTH)).print(_possible_table(found))


def _possible_table(rows: Sequence[PossibleStudent]) -> Table:
    table = Table(title="what is possible (by the cost profile; ratios to the dense student)", title_justify="left")
    for column in ("student", "inputs kept", "units kept", "leaves at", "latency", "ms", "MACs", "energy", "size"):
        table.add_column(column, justify="left" if column in ("student", "leaves at") else "right", no_wrap=True)
    for row in rows:
        latency, energy, macs, size = row.cost.ratios[0].tolist()
        kept = [f"{row.feature_keep:.3f}", f"{row.unit_keep:.3f}", row.exit]
        costs = [f"{latency:.3f}", f"{float(row.cost.latency_s) * 1e3:.3g}"]
        table.add_row(row.name, *kept, *costs, *(f"{value:.3f}" for value in (macs, energy, size)))
    return table


def print_outcome(outcome: Outcome) -> int:
    """Print how the student did, and give the exit code."""
    done = outcome.done
    for line in _lines(outcome.folder, done.figures, done.measured, outcome.far):
        Console().print(line, highlight=False, soft_wrap=True)
    if done.diverged:
        print(f"rlkd: the student diverged in window {len(outcome.history)}; do not ship it", file=sys.stderr)
    if outcome.broken:
        print(f"rlkd: {outcome.broken}", file=sys.stderr)
    return 1 if done.diverged or outcome.broken else 0


def _windows(count: int) -> str:
    return f"{count} window{'s' if count != 1 else ''}"


def _shipping(best_window: int) -> str:
    """Return which student ships."""
    return "the untouched student ships" if best_window == UNTOUCHED else f"window {best_window} ships"


def _lines(
    folder: Path, figures: dict[str, Any], measured: dict[str, dict[str, float]], far: dict[int, float]
) -> list[str]:
    """Return the lines that are printed at the end of a run."""
    lines = [
        f"validation, by which to choose among runs: J {figures['validation_score']:.4f}, accuracy "
        f"{figures['validation_accuracy']:.4f} ({_shipping(figures['best_window'])})",
        f"test, to report once and not to choose by: J {figures['score']:.4f}, accuracy {figures['accuracy']:.4f} "
        f"(teacher {figures['teacher_accuracy']:.4f}), MACs {figures['macs_ratio']:.3f} and parameters "
        f"{figures['size_ratio']:.3f} of the dense student's",
    ]
    if "perplexity" in figures:
        lines.append(
            f"perplexity {figures['perplexity']:.2f} (teacher {figures['teacher_perplexity']:.2f}), next token right "
            f"{figures['next_token_accuracy']:.4f} (teacher {figures['teacher_next_token_accuracy']:.4f}); accuracy "
            "above is that perplexity between the anchors in mapping.txt"
        )
    for name in (key for key in measured if key.startswith("batch_")):
        row = measured[name]
        teacher = (
            f", teacher {row['teacher_latency_s'] * 1e6:.1f} us, speed-up {row['speedup_over_teacher']:.2f}"
            if "teacher_latency_s" in row
            else ""
        )
        lines.append(
            f"measured on {row['threads']} thread, {name.replace('_', ' ')}: {row['latency_s'] * 1e6:.1f} us "
            f"(IQR {row['spread_s'] * 1e6:.1f}, 95th percentile {row['p95_s'] * 1e6:.1f}), dense "
            f"{row['dense_latency_s'] * 1e6:.1f} us, speed-up {row['speedup']:.2f}{teacher}"
        )
    profile_us = measured["profile_latency_s"] * 1e6  # type: ignore[operator]
    lines.append(f"the cost profile had predicted {profile_us:.1f} us at batch {measured['profile_batch']}")
    if far:
        lines.append(
            f"note: in {_windows(len(far))} the policy saw something over {FAR:g} deviations from its training tasks; "
            "its choices there are guesses"
        )
    if figures["num_undone"]:
        lines.append(f"note: the guard undid {_windows(figures['num_undone'])}, which fell below the floor")
    if figures["num_held"]:
        lines.append(
            f"note: in {_windows(figures['num_held'])} the guard kept more units and inputs than the policy chose, "
            "because the student began trained (guard.hold)"
        )
    if figures["num_rollbacks"]:
        lines.append(
            f"note: {_windows(figures['num_rollbacks'])} had numbers that were not finite and had to be undone; the "
            "student went on with smaller steps"
        )
    if figures["goal_met"] is False:
        lines.append(
            "note: to come closer, train longer (--num_windows), give a larger student, or state the floor against the "
            "dense student (--goal.reference dense); see docs/distil.md"
        )
    lines.append(f"student: {folder / 'student'}   figures: {folder / 'result.json'}")
    lines.append(goal_line(figures, measured))
    return lines
