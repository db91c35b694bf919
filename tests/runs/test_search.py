"""`rlkd search`: structures within limits, their costs, the front."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlkd.cli.main import main
from rlkd.cost import CostConfig
from rlkd.data import Goal
from rlkd.errors import UserError
from rlkd.models import StudentConfig
from rlkd.runs.search import Candidate, Space, StructureConfig, build_space, check_satisfiable, search
from rlkd.teachers import TeacherConfig

Capture = pytest.CaptureFixture[str]


def config(profile_file: Path, goal: Goal) -> StructureConfig:
    return StructureConfig(
        reference=StudentConfig(widths=(48, 48), exits=(1,)),
        teacher=TeacherConfig(num_samples=(40,), num_steps=20),
        cost=CostConfig(profile=str(profile_file)),
        goal=goal,
    )


def test_costs_are_ratios_to_the_reference(profile_file: Path) -> None:
    space = build_space(config(profile_file, Goal(macs="2x", size=0.6)))
    same = space.candidate(2, 48, 1.0, True)
    assert same is not None
    assert (same.widths, same.exits) == ((48, 48), (1,))
    assert same.ratios == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert not space.fits(same)
    small = space.candidate(1, 8, 1.0, True)
    assert small is not None
    assert small.exits == ()  # one block has no place for an early exit
    dense_macs = 64 * 48 + 48 * 48 + 48 * 10
    assert small.ratios[2] == pytest.approx((64 * 8 + 8 * 10) / dense_macs)
    assert space.fits(small)
    fitting = check_satisfiable(space)
    assert all(c.ratios[2] <= 0.5 and c.ratios[3] <= 0.6 for c in fitting)
    assert [c.latency_s for c in fitting] == sorted(c.latency_s for c in fitting)


def test_limits_below_the_smallest_structure_end_before_any_training(profile_file: Path) -> None:
    space = build_space(config(profile_file, Goal(macs=0.001)))
    with pytest.raises(UserError, match=r"no structure is within the limits; the fastest one, widths \[.*macs 0\."):
        check_satisfiable(space)


def test_narrow_limits_still_have_a_candidate(profile_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly a structure fits, and one proposal is asked for: it is within the limits."""
    trained: list[Candidate] = []

    def train(space: Space, signals: object, candidate: Candidate, seed: int) -> Candidate:
        trained.append(candidate)
        return replace(candidate, accuracy=0.5, expected_latency_s=candidate.latency_s)

    monkeypatch.setattr("rlkd.runs.search.train_shortly", train)
    space = build_space(replace(config(profile_file, Goal(macs=0.1)), num_candidates=1))
    assert 0 < len(check_satisfiable(space)) < len(space.grid()) / 10
    for seed in range(3):
        (found,) = search(space, seed, lambda candidate: None)
        assert space.fits(found)
    assert len(trained) == 3


def test_what_is_possible_is_told_before_a_teacher_is_trained(
    profile_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("a teacher was asked for")

    monkeypatch.setattr("rlkd.runs.search.load_teachers", refuse)
    options = ["--cost.profile", str(profile_file), "--goal.macs", "2x", "--out", str(tmp_path / "a")]
    assert main(["search", *options]) == 2
    printed = capsys.readouterr()
    assert "what is possible" in printed.out
    assert "a teacher was asked for" in printed.err


def test_from_limits_to_a_student_that_distil_takes(
    profile_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--train.steps_per_window", "4", "--num_windows", "2", "--num_candidates", "5", "--num_seeds", "2"]
    teacher = ["--teacher.num_samples", "[200]", "--teacher.num_steps", "60", "--cost.profile", str(profile_file)]
    assert main(["search", *quick, *teacher, "--goal.macs", "2x", "--out", "found"]) == 0
    out = capsys.readouterr().out
    assert out.index("what is possible") < out.index("widths [") < out.index("the front") < out.index("winner: ")
    record = json.loads(Path("found/search.json").read_text())
    assert len(record["tried"]) == 5
    for row in record["tried"]:
        assert row["ratios"][2] <= 0.5
        assert 0 < row["accuracy"] <= 1
        assert not math.isnan(row["expected_latency_s"])
    best = max(row["accuracy"] for row in record["tried"])
    student = yaml.safe_load(Path("found/student.yaml").read_text())["student"]
    assert record["front"][-1]["accuracy"] == best
    assert student["widths"] == record["front"][-1]["widths"]
    assert main(["search", *quick, *teacher, "--goal.macs", "2x", "--out", "again"]) == 0
    assert json.loads(Path("again/search.json").read_text())["tried"] == record["tried"]
    options = ["--config", "found/student.yaml", "--num_windows", "0"]
    assert main(["distil", *options]) == 2  # the file is read; the number of windows is what is wrong
    assert "num_windows: got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--depths", "[3,2]"], "depths: got [3, 2]"),
        (["--widths", "[0,8]"], "widths: got [0, 8]"),
        (["--tapers", "[9.0]"], "tapers: got [9.0]"),
        (["--num_seeds", "1"], "num_seeds 1"),
        (["--goal.macs", "2"], "goal.macs: got"),
        (["--goal.macs", "null"], "goal: got no limit"),
        (["--teacher", "models/bert"], "--teacher: names a real model, which needs --data"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, capsys: Capture, tmp_path: Path) -> None:
    assert main(["search", *options, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
