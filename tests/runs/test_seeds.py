from pathlib import Path
from typing import Any

import pytest

from rlkd.errors import UserError
from rlkd.runs.seeds import mean_interval, parse_seeds, summarise


def result(score: float) -> dict[str, Any]:
    method = {"score": {"mean": score}, "accuracy": {"mean": 0.9}, "goal_met_within_1_point": None}
    return {"goals": [{"name": "keep 0.98", "methods": {"policy": method}}]}


def test_the_interval_is_that_of_students_t() -> None:
    found = mean_interval([1.0, 2.0, 3.0])  # deviation 1, standard error 1 / sqrt(3), t = 4.3027 at 2 degrees
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])


def test_a_summary_has_every_method_under_every_goal(tmp_path: Path) -> None:
    summary = summarise({0: result(0.4), 7: result(0.6)}, tmp_path)
    row = summary["goals"]["keep 0.98"]["policy"]
    assert summary["seeds"] == [0, 7]
    assert row["score"]["mean"] == pytest.approx(0.5)
    assert row["accuracy"]["ci95"] == [0.9, 0.9]
    assert "goal_met_within_1_point" not in row
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize("text", ["0", "0,0", "0,-1", "a,b", ""])
def test_seeds_are_two_or_more_whole_numbers(text: str) -> None:
    with pytest.raises(UserError, match="two or more different whole numbers"):
        parse_seeds(text)
    assert parse_seeds("0, 3") == (0, 3)
