"""`rlkd train --mode online` from the command line to the student that ships."""

from pathlib import Path

import pytest
import torch
import yaml

from rlkd.cli.main import main
from rlkd.cli.train import take_mode
from rlkd.compression import load_student
from rlkd.data import Split, load_dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def quick(profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [
        *("train", "--mode", "online", "--cost.profile", str(profile_file), "--teacher.num_steps", "60"),
        *("--num_windows", "8", "--train.steps_per_window", "3", "--agent.windows_per_update", "4"),
        *("--keep_every", "3", "--student.widths", "[16, 16]"),
    ]


def test_the_product_is_the_best_validated_student(quick: list[str], tmp_path: Path, capsys: Capture) -> None:
    for seed in range(6):  # until the best window is not the last one, which would ship anyhow
        folder = tmp_path / f"seed-{seed}"
        assert main([*quick, "--seed", str(seed), "--out", str(folder)]) == 0
        rows = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if max(rows[:-1], key=lambda row: float(row["score"]))["score"] > rows[-1]["score"]:
            break
    assert [row["window"] for row in rows] == list(range(1, 9))
    result = yaml.safe_load((folder / "result.json").read_text())
    figures = result["methods"]["policy"]
    best = max(rows, key=lambda row: float(row["score"]))
    assert figures["best_window"] == best["window"] < 8
    assert figures["agent_updates"] == 2
    data = load_dataset("digits")

    def accuracy(student: str, split: Split) -> float:
        index = data.splits[split]
        with torch.no_grad():
            right = load_student(folder / student)(data.inputs[index]).argmax(-1) == data.labels[index]
        return float(right.float().mean())

    assert accuracy("student", "test") == pytest.approx(figures["accuracy"], abs=1e-6)
    assert accuracy("student", "validation") == pytest.approx(best["accuracy"], abs=1e-6)
    assert best["accuracy"] != rows[-1]["accuracy"]
    assert sorted(p.name for p in (folder / "students").iterdir()) == ["window-0003", "window-0006"]
    assert accuracy("students/window-0006", "validation") == pytest.approx(rows[5]["accuracy"], abs=1e-6)
    assert "not to choose by: J" in capsys.readouterr().out


@pytest.mark.slow
def test_an_online_run_repeats_to_the_byte(quick: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main([*quick, "--seed", "5", "--out", name]) == 0
    for name in ("metrics.jsonl", "student/student.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_mode_is_taken_wherever_it_stands() -> None:
    assert take_mode(["--seed", "3"]) == ("across", ["--seed", "3"])
    assert take_mode(["--seed", "3", "--mode", "online", "--out", "x"]) == ("online", ["--seed", "3", "--out", "x"])
    assert take_mode(["--mode=across"]) == ("across", [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "onlin"], ["--mode: got 'onlin'", "across, online", "did you mean online?"]),
        (["--mode"], ["--mode: got ''"]),
        (["--mode", "online", "--agent.windows_per_update", "5"], ["agent.windows_per_update: got 5", "divisors"]),
        (["--mode", "online", "--ppo.hidden", "5"], ["--ppo.hidden"]),
        (["--mode", "online", "--policy", "gone"], ["policy: got 'gone'", "allowed: default"]),
    ],
)
def test_mistakes_are_one_line(options: list[str], words: list[str], capsys: Capture) -> None:
    assert main(["train", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_the_online_mode_has_help_of_its_own(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--mode", "online", "--help"])
    assert "--agent.windows_per_update" in capsys.readouterr().out
