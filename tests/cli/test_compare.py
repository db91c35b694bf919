"""`rlkd compare` from one end to the other, on students that train for a moment."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_policy

from rlkd.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def options(profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [
        *("--cost.profile", str(profile_file), "--teacher.num_samples", "[40, 897]", "--teacher.num_steps", "60"),
        *("--num_windows", "2", "--train.steps_per_window", "2", "--comparison.num_tasks", "4"),
        *("--search.num_settings", "2", "--search.tasks_per_setting", "2", "--search.tasks_per_finalist", "2"),
    ]


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_methods_are_compared_under_every_goal(options: list[str], tmp_path: Path, capsys: Capture) -> None:
    save_policy(tmp_path / "policy")
    argv = ["compare", *options, "--policy", "policy", "--blind", "policy", "--num_seeds", "2", "--out", "out"]
    goals = ["--comparison.keeps", "[0.9, 1.0]", "--comparison.accuracy_weights", "[0.6]"]
    assert main([*argv, *goals, "--methods", "policy,blind,constant,nncf,start"]) == 0
    result = result_of(tmp_path / "out")
    assert (result["schema"], result["num_tasks"], result["num_seeds"]) == (2, 4, 2)
    assert [entry["goal"] for entry in result["goals"]] == [
        {"keep": 0.9, "reference": "dense"},
        {"keep": 1.0, "reference": "dense"},
        {"weights": pytest.approx([0.6, 0.3, 0.1])},
    ]
    assert result["methods"] == result["goals"][0]["methods"]
    names = ["policy", "blind", "constant", "nncf", "start", "dense"]
    assert list(result["methods"]) == names
    assert list(result["paired"]) == [f"policy-{name}" for name in names[1:]]
    assert result["paired"]["policy-blind"]["difference"] == 0.0  # the same policy
    # keep 1: the floor is what the dense student itself reaches, if its last window is its best on validation
    strict = result["goals"][1]
    assert strict["num_feasible"] >= 1
    assert result["goals"][2]["methods"]["nncf"]["goal_met"] == 1.0  # no floor
    with (tmp_path / "out" / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(names) * 8
    of_policy = [float(r["score"]) for r in rows if (r["goal"], r["method"]) == ("keep 0.9", "policy")]
    assert result["methods"]["policy"]["score"]["mean"] == pytest.approx(sum(of_policy) / 8)
    out = capsys.readouterr().out
    assert "keep 0.9: 8 held-out tasks" in out
    assert "accuracy weight 0.6" in out


def test_a_folder_for_each_file(options: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("methods: annealed\ncomparison: {keeps: [0.95]}\n")
    assert main(["compare", "one.yaml", "two.yaml", *options, "--out", "all"]) == 0
    for name in ("one", "two"):
        assert list(result_of(tmp_path / "all" / name)["methods"]) == ["annealed", "dense"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--comparison.keeps", "[]"], "comparison: got no goal"),
        (["--comparison.keeps", "[0.9, 0.9]"], "comparison.keeps: got [0.9, 0.9]; allowed: each once"),
        (["--comparison.keeps", "[0]"], "comparison.keeps: got [0.0]"),
        (["--methods", "blind"], "give its folder with --blind"),
        (["--methods", "nnfc"], "did you mean nncf?"),
        (["--guard.tolerance", "-1"], "guard.tolerance: got -1"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    options: list[str], given: list[str], said: str, capsys: Capture
) -> None:
    assert main(["compare", *options, *given]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
