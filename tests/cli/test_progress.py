"""What the terminal shows: nothing is cut off, and a file gets lines while the work goes on."""

import io
from typing import Any

import pytest
from rich.console import Console

from rlkd.cli.output import shown_messages
from rlkd.cli.progress import Bar, print_comparison, print_front

NAMES = ("policy", "static", "published", "annealed", "a_method_with_a_long_name")


def comparison() -> dict[str, Any]:
    """Figures that all differ, so that a missing one is seen."""
    numbers = iter(f"0.{number}" for number in range(1001, 9999, 7))

    def figure() -> dict[str, Any]:
        mean, iqm, low, high = (float(next(numbers)) for _ in range(4))
        return {"mean": mean, "iqm": iqm, "ci95": [low, high]}

    more = {"trainings_per_task": 1, "goal_met_within_1_point": 0.875, "shortfall": 0.0123}
    names = ("score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio", "hypervolume")
    methods = {name: {figure_name: figure() for figure_name in names} | more for name in NAMES}
    pair = {"difference": 0.0123, "ci95": [-0.0456, 0.0789], "probability_of_improvement": 0.61}
    return {"methods": methods, "paired": {f"policy-{name}": pair for name in NAMES[1:]}}


def wanted(entry: dict[str, Any], name: str) -> set[str]:
    """Every number that a table must show, as it is printed."""
    numbers = {"+0.0123", "-0.0456", "+0.0789", "61%"}
    for row in entry["methods"].values():
        low, high = row[name]["ci95"]
        numbers |= {f"{number:.4f}" for number in (row[name]["mean"], row[name]["iqm"], low, high)}
    return numbers


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_a_narrow_terminal_gets_every_figure(width: int) -> None:
    entry = comparison()
    for name in ("score", "hypervolume"):
        console = Console(file=io.StringIO(), width=width)
        if name == "score":
            print_comparison(console, "a title", entry)
        else:
            print_front(console, "a title", entry)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= width
        assert "\u2026" not in text
        missing = {number for number in wanted(entry, name) if number not in text}
        assert not missing


def test_a_wide_terminal_gets_one_table() -> None:
    console = Console(file=io.StringIO(), width=190)
    print_comparison(console, "a title", comparison())
    assert console.file.getvalue().count("a title") == 1  # type: ignore[attr-defined]


def test_a_file_gets_a_line_an_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_messages(), Bar(5) as bar:
        bar.phase("PPO", 6, 2)
        for _ in range(3):
            for _ in range(2):
                bar.advance(2)
            bar.figures(score=0.5, updates_per_s=3.0)
        bar.phase("comparison", 40, 1)
        for _ in range(40):
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    iterations = [line for line in lines if ", score 0.500, " in line]
    assert [line.split(" student")[0] for line in iterations] == [f"PPO: {n} of 6" for n in (2, 4, 6)]
    tenths = [line for line in lines if line.startswith("comparison: ") and " of " in line]
    assert [line.split(" student")[0] for line in tenths] == [f"comparison: {n} of 40" for n in range(4, 41, 4)]
