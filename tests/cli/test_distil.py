"""`rlkd distil` on chains: goals, the table before, the outcome, and a run that was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from rlkd.agents.evaluation.report import read_run
from rlkd.cli.distil import _parser
from rlkd.cli.main import main
from rlkd.cli.progress import Bar
from rlkd.cli.resume import parse_run
from rlkd.compression import load_student
from rlkd.configs import DistilConfig
from rlkd.data import load_dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def quick(profile_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run of a second."""
    run = tmp_path_factory.mktemp("run")
    tiny_models.save_policy(run / "policy")
    return [
        *("--policy", str(run), "--cost.profile", str(profile_file), "--num_windows", "3"),
        *("--teacher.num_steps", "60", "--train.steps_per_window", "3"),
    ]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result_of(folder: str) -> dict[str, Any]:
    result = read_run(Path(folder)).result
    assert result is not None
    return result


def rows_of(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_missed_goal_ends_with_what_brings_it_closer(quick: list[str], capsys: Capture) -> None:
    assert main(["distil", *quick, "--goal.accuracy", "0.99", "--out", "a"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[-1].startswith("goal missed by 0.")
    assert [line for line in lines if line.startswith("note: to come closer, train longer (--num_windows)")]
    assert (Path("a") / "student" / "student.json").is_file()


def test_a_floor_with_limits_from_the_table_to_the_outcome(quick: list[str], capsys: Capture) -> None:
    goal = ["--goal.keep", "0.5", "--goal.reference", "dense", "--goal.latency", "2x", "--goal.size", "0.3"]
    assert main(["distil", *quick, *goal, "--out", "a"]) == 0
    out, err = capsys.readouterr()
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert lines[0].startswith("what is possible")
    for name in ("dense", "smallest, first exit", "latency <= 0.5", "size <= 0.3", "all limits"):
        assert any(f" {name} " in line for line in lines), name
    assert "training the dense student first" in err
    assert any(line.startswith("floor: accuracy 0.") and "0.5 of the dense student's 0." in line for line in lines)
    result = result_of("a")
    assert result["schema"] == 2
    assert result["goal"]["keep"] == 0.5
    figures, dense = result["methods"]["policy"], result["methods"]["dense"]
    assert figures["floor"] == pytest.approx(0.5 * dense["accuracy"])
    assert result["goal_met"] is (figures["accuracy"] >= figures["floor"])
    assert figures["goal_met"] == float(result["goal_met"])
    assert result["shortfall"] == pytest.approx(max(0.0, figures["floor"] - figures["accuracy"]))
    assert figures["compacted_accuracy"] == pytest.approx(figures["accuracy"], abs=1e-6)
    assert figures["latency_ratio"] <= 0.5
    assert figures["size_ratio"] <= 0.3
    assert result["speedup_over_teacher"] > 0
    assert lines[-1].startswith("goal met: accuracy" if result["goal_met"] else "goal missed by 0.")
    assert any(line.startswith("note: to come closer") for line in lines) is (not result["goal_met"])
    assert f"accuracy {figures['accuracy']:.4f} on test (floor {figures['floor']:.4f})" in lines[-1]
    for row in rows_of("a"):
        assert row["margin"] == pytest.approx(row["accuracy"] - row["floor"], abs=1e-6)
        assert row["latency_ratio"] <= 0.5 + 1e-6
        assert row["size_ratio"] <= 0.3 + 1e-6
        assert row["parameters"] > 0
    tags = read_run(Path("a")).scalars
    assert {"student/margin", "student/floor", "controls/unit_keep", "action/exit_never"} <= set(tags)
    student = load_student(Path("a/student"))
    assert sum(p.numel() for p in student.parameters()) == figures["parameters"]


def test_the_best_window_ships(quick: list[str]) -> None:
    old_name = "replay"
    assert main([old_name, *quick, "--num_windows", "5", "--seed", "3", "--out", "a"]) == 0
    rows, figures = rows_of("a"), result_of("a")["methods"]["policy"]
    best = rows[figures["best_window"] - 1]
    assert best["score"] == max(row["score"] for row in rows)
    assert figures["validation_accuracy"] == pytest.approx(best["accuracy"], abs=1e-6)
    assert result_of("a")["goal_met"] is None
    assert set(result_of("a")["methods"]) == {"policy", "dense"}  # the report compares with the dense student
    assert figures["parameters_of_teacher"] > figures["parameters"]
    assert figures["energy_of_teacher_j"] > figures["energy_j"]
    data = load_dataset("digits")
    with torch.no_grad():
        answers = load_student(Path("a/student"))(data.inputs[data.splits["validation"]]).argmax(-1)
    right = (answers == data.labels[data.splits["validation"]]).float().mean()
    assert float(right) == pytest.approx(best["accuracy"], abs=1e-6)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*quick, "--goal.keep", "0.9", "--goal.reference", "dense", "--guard.undo", "true", "--num_windows", "5"]
    assert main(["distil", *options, "--out", "whole"]) == 0
    for window, argv in ((2, [*options, "--out", "cut"]), (4, ["--resume", "cut"])):
        left = [window]

        def advance(bar: Bar, num_students: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Bar, "advance", advance)
            assert main(["distil", *argv]) == 130
    assert main(["distil", "--resume", "cut"]) == 0
    for name in ("metrics.jsonl", "student/student.safetensors", "student/student.json"):
        assert (Path("cut") / name).read_bytes() == (Path("whole") / name).read_bytes(), name


def test_the_old_name_works_and_says_the_new_one(quick: list[str], capsys: Capture) -> None:
    assert main(["replay", *quick, "--out", "a"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == "rlkd: replay is now called distil"
    assert result_of("a")["preference"] == pytest.approx({"accuracy": 0.6, "latency": 0.3, "energy": 0.1})


def test_a_shipped_student_that_answers_otherwise_fails_the_run(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from rlkd.runs import distil

    def other(*arguments: Any, **named: Any) -> Any:
        small = original(*arguments, **named)
        small.heads[0].bias.data += torch.linspace(0, 100, 10)  # all samples become the last class
        return small

    original = distil.compact_now
    monkeypatch.setattr(distil, "compact_now", other)
    assert main(["distil", *quick, "--out", "a"]) == 1
    assert "do not ship it" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--goal.keep", "1.5"], "goal.keep: got 1.5 of the teacher's accuracy"),
        (["--goal.latency", "0.001"], "goal.latency: got a limit of 0.001 of the dense student's; the smallest"),
        (["--goal.latency", "1us"], "goal.latency: got a limit of"),
        (["--goal.latency", "fast"], "goal.latency: got 'fast'; allowed: a ratio"),
        (["--goal.macs", "3ms"], "goal.macs: got '3ms'; allowed: a ratio"),
        (["--goal.size", "3"], "goal.size: got 3"),
        (["--goal.keep", "0.9", "--goal.accuracy", "0.9"], "allowed: one floor"),
        (["--goal.keep", "0.9", "--goal.reference", "tacher"], "goal.reference: got 'tacher'"),
        (["--goal.keep", "much"], "goal.keep: got 'much'; allowed: float or null"),
        (["--goal.kep", "0.9"], "did you mean --goal.keep?"),
        (["--guard.tolerance", "-1"], "guard.tolerance: got -1"),
        (["--task.floor_share", "1"], "task.floor_share: got 1; allowed: 0; state a goal"),
    ],
)
def test_impossible_goals_end_in_one_line(
    quick: list[str], options: list[str], words: str, capsys: Capture, tmp_path: Path
) -> None:
    assert main(["distil", *quick, *options, "--out", "a"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rlkd: ")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_goal_in_a_file_is_the_same(quick: list[str]) -> None:
    Path("goal.yaml").write_text('goal: {keep: 0.5, reference: 0.9, latency: "2x", macs: 0.5}\n')
    assert main(["distil", *quick, "--config", "goal.yaml", "--out", "a"]) == 0
    options = ["--goal.keep", "0.5", "--goal.reference", "0.9", "--goal.latency", "2x", "--goal.macs", "0.5"]
    from_file, from_options = (
        parse_run(_parser, [*quick, *given], DistilConfig)[0] for given in (["--config", "goal.yaml"], options)
    )
    assert from_file == from_options
    assert result_of("a")["methods"]["policy"]["floor"] == pytest.approx(0.45)


def test_the_policies_of_the_package_are_listed(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rlkd.agents.policy.bundled.resources.files", lambda name: tmp_path)
    assert main(["policies"]) == 0
    assert capsys.readouterr().out == "this installation of rlkd holds no policy; rlkd train makes one\n"
    tiny_models.save_policy(tmp_path / "policies" / "default")
    assert main(["policies"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"default: {tmp_path / 'policies' / 'default'}\n")
    assert "sha256 of the tensors" in out
