"""A progress bar with the figures that matter, and the tables at the end."""

import logging
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlkd.cli.output import HANDLER

logger = logging.getLogger(__name__)


class Bar:
    """Implement `rlkd.runs.folder.Progress` on a terminal; on a pipe or in a file, print lines.

    There is a line for each phase and for each iteration or window, and ten lines for a phase without figures.
    """

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
        self._name, self._num_trainings, self._num_windows = "", 1, 1
        self._windows, self._began, self._shown, self._tenths = 0, time.monotonic(), "", 0

    def __enter__(self) -> "Bar":
        self._bar.start()
        self._print_before, HANDLER.print_line = HANDLER.print_line, self._print
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        HANDLER.print_line = self._print_before
        self._bar.stop()

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Start a bar of `num_trainings` trainings."""
        self._name, self._num_trainings, self._num_windows = name, num_trainings, num_windows
        self._windows, self._began, self._shown, self._tenths = 0, time.monotonic(), "", 0
        if self._task is not None:
            self._bar.update(self._task, figures="")
        self._task = self._bar.add_task(name, total=num_trainings * num_windows, figures="")
        if not self.console.is_terminal:
            logger.info(f"{name}: {num_trainings} student trainings")

    def advance(self, num_students: int) -> None:
        """Move the bar by one window of `num_students` students."""
        self._windows += num_students
        if self._task is not None:
            self._bar.update(self._task, advance=num_students, figures=f"{self._shown} {self._rate():,.0f} updates/s")
        tenths = 10 * self._windows // max(self._num_trainings * self._num_windows, 1)
        if tenths > self._tenths and not self._shown and self._num_trainings > 1:  # a phase without figures
            self._tenths = tenths
            self._print_line()

    def figures(self, **values: float) -> None:
        """Show figures beside the bar, or print them as a line."""
        values.pop("updates_per_s", None)
        self._shown = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        self._print_line()

    def _rate(self) -> float:
        """Student updates per second in this phase."""
        return self._windows * self._updates_per_window / max(time.monotonic() - self._began, 1e-9)

    def _print_line(self) -> None:
        """Say how far the phase is, where no bar is shown."""
        if self.console.is_terminal:
            return
        if self._num_trainings == 1:
            place = f"window {self._windows} of {self._num_windows}"
        else:
            place = f"{self._windows // self._num_windows:,} of {self._num_trainings:,} student trainings"
        shown = f", {self._shown}" if self._shown else ""
        logger.info(f"{self._name}: {place}{shown}, {self._rate():,.0f} updates/s")

    def _print(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_comparison(console: Console, title: str, entry: dict[str, Any]) -> None:
    """Print methods in rows: score with interval, accuracy, costs, and the paired difference."""
    print_rows(console, title, [_comparison_row(name, m, entry["paired"]) for name, m in entry["methods"].items()])


def print_rows(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    """Print rows of the same columns as one table, or as several below each other where one would be too wide.

    Every table begins with the first column, so that no cell is cut off or broken.
    """
    first, *others = rows[0]
    shown = [first]
    for column in others:
        if len(shown) > 1 and _width(console, _table(title, [*shown, column], rows)) > console.width:
            console.print(_table(title, shown, rows))
            shown = [first]
        shown.append(column)
    console.print(_table(title, shown, rows))


def _width(console: Console, table: Table) -> int:
    """Characters that the table takes with every cell on one line."""
    return Measurement.get(console, console.options.update(width=1000), table).maximum


def _comparison_row(name: str, m: dict[str, Any], paired: dict[str, Any]) -> dict[str, str]:
    """Cells of one method by column."""
    low, high = m["score"]["ci95"]
    met = m["goal_met_within_1_point"]
    row = next((pair for pair_name, pair in paired.items() if pair_name.split("-", 1)[1] == name), None)
    return {
        "method": name,
        "J mean": f"{m['score']['mean']:.4f}",
        "J iqm [95 %]": f"{m['score']['iqm']:.4f} [{low:.4f}, {high:.4f}]",
        "accuracy": f"{m['accuracy']['mean']:.3f}",
        "MACs": f"{m['macs_ratio']['mean']:.3f}",
        "latency": f"{m['latency_ratio']['mean']:.3f}",
        "energy": f"{m['energy_ratio']['mean']:.3f}",
        "goals met within 1 point": "" if met is None else f"{met:.1%}",
        "shortfall": f"{m['shortfall']:.4f}",
        "lead in J over it [95 %]": _lead(row),
        "wins": f"{row['probability_of_improvement']:.0%}" if row else "",
    }


def _table(title: str, columns: list[str], rows: list[dict[str, str]]) -> Table:
    """Columns of `rows`, the first one on the left; what does not fit is folded, never cut off."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def print_front(console: Console, title: str, front: dict[str, Any]) -> None:
    """Print fronts in rows: hypervolume with interval, trainings, and the policy's lead."""
    rows = []
    for name, m in front["methods"].items():
        area = m["hypervolume"]
        low, high = area["ci95"]
        row = front["paired"].get(f"policy-{name}")
        rows.append(
            {
                "front": name,
                "trainings a task": str(m["trainings_per_task"]),
                "hypervolume mean": f"{area['mean']:.4f}",
                "iqm [95 %]": f"{area['iqm']:.4f} [{low:.4f}, {high:.4f}]",
                "policy's lead [95 %]": _lead(row),
                "wins": f"{row['probability_of_improvement']:.0%}" if row else "",
            }
        )
    print_rows(console, title, rows)


def _lead(row: dict[str, Any] | None) -> str:
    """Return a paired difference with its interval, or "" for the method that the others are paired with."""
    return f"{row['difference']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]" if row else ""
