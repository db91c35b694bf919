"""A progress bar with the figures that matter, and the tables at the end."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Bar:
    """Implements `rlkd.runs.folder.Progress` on a terminal; on a pipe it prints a line a phase instead."""

    def __init__(self, updates_per_window: int) -> None:
        self.console = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task: TaskID | None = None
        self._updates_per_window = updates_per_window
        self._windows, self._began, self._shown = 0, time.monotonic(), ""

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Start a bar of `num_trainings` trainings."""
        self._windows, self._began, self._shown = 0, time.monotonic(), ""
        if self._task is not None:
            self._bar.update(self._task, figures="")
        self._task = self._bar.add_task(name, total=num_trainings * num_windows, figures="")
        if not self.console.is_terminal:
            self.say(f"{name}: {num_trainings} student trainings")

    def advance(self, num_students: int) -> None:
        """Move the bar by one window of `num_students` students."""
        self._windows += num_students
        rate = self._windows * self._updates_per_window / max(time.monotonic() - self._began, 1e-9)
        if self._task is not None:
            self._bar.update(self._task, advance=num_students, figures=f"{self._shown} {rate:,.0f} updates/s")

    def figures(self, **values: float) -> None:
        """Show figures beside the bar."""
        values.pop("updates_per_s", None)
        self._shown = " ".join(f"{name} {value:.3f}" for name, value in values.items())

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def comparison_table(title: str, entry: dict[str, Any]) -> Table:
    """Methods in rows: score with interval, accuracy, costs, and the paired difference."""
    table = Table(title=title, title_justify="left")
    for column in (
        "method",
        "J mean",
        "J iqm [95 %]",
        "accuracy",
        "MACs",
        "latency",
        "energy",
        "goals met within 1 point",
        "shortfall",
        "lead in J over it [95 %]",
        "wins",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    pairs = {name.split("-", 1)[1]: (name.split("-", 1)[0], row) for name, row in entry["paired"].items()}
    for name, m in entry["methods"].items():
        low, high = m["score"]["ci95"]
        lead = wins = ""
        if name in pairs:
            row = pairs[name][1]
            lead = f"{row['difference']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]"
            wins = f"{row['probability_of_improvement']:.0%}"
        table.add_row(
            name,
            f"{m['score']['mean']:.4f}",
            f"{m['score']['iqm']:.4f} [{low:.4f}, {high:.4f}]",
            *(f"{m[key]['mean']:.3f}" for key in ("accuracy", "macs_ratio", "latency_ratio", "energy_ratio")),
            "" if m["goal_met_within_1_point"] is None else f"{m['goal_met_within_1_point']:.1%}",
            f"{m['shortfall']:.4f}",
            lead,
            wins,
        )
    return table


def front_table(title: str, front: dict[str, Any]) -> Table:
    """Fronts in rows: hypervolume with interval, trainings, and the policy's lead."""
    table = Table(title=title, title_justify="left")
    for column in ("front", "trainings a task", "hypervolume mean", "iqm [95 %]", "policy's lead [95 %]", "wins"):
        table.add_column(column, justify="left" if column == "front" else "right")
    for name, m in front["methods"].items():
        low, high = m["hypervolume"]["ci95"]
        row = front["paired"].get(f"policy-{name}")
        lead = f"{row['difference']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]" if row else ""
        wins = f"{row['probability_of_improvement']:.0%}" if row else ""
        area = m["hypervolume"]
        table.add_row(
            name,
            str(m["trainings_per_task"]),
            f"{area['mean']:.4f}",
            f"{area['iqm']:.4f} [{low:.4f}, {high:.4f}]",
            lead,
            wins,
        )
    return table
