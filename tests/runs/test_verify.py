"""`rlkd verify`: sound runs hold, and every kind of altered file is named."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load, save

from rlkd.agents.policy.bundle import load_bundle
from rlkd.cli.main import main
from rlkd.errors import UserError
from rlkd.runs.verify import compare_results, differences, policy_at

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(trained: Path, tiny_scenario: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run of every kind."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, folder / "train")
    policy = ["--policy", str(folder / "train" / "policy")]
    goal = ["--goal.keep", "0.9", "--goal.reference", "dense"]
    options = [*_distilled(tiny_scenario), *goal, "--seed", "4", "--out", str(folder / "distil")]
    assert main(["distil", *policy, *options]) == 0
    methods = ["--methods", "policy,constant,tpe_10", "--comparison.num_tasks", "3"]
    assert main(["compare", *policy, *tiny_scenario, *methods, "--out", str(folder / "compare")]) == 0
    return folder


def _distilled(tiny: list[str]) -> list[str]:
    """Those of the options that `rlkd distil` has, too."""
    pairs = zip(tiny[::2], tiny[1::2], strict=True)
    return [part for name, value in pairs if name.split(".")[0] in KEPT for part in (name, value)]


KEPT = ("--cost", "--num_windows", "--train")


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def verdict(folder: Path, capsys: Capture, *options: str) -> tuple[int, list[str], list[str]]:
    """Exit code, names of the rows that hold, and lines of what differs."""
    capsys.readouterr()
    code = main(["verify", str(folder), *options])
    lines = capsys.readouterr().out.splitlines()
    holds = [line.removeprefix("holds").strip() for line in lines if line.startswith("holds")]
    return code, holds, [line.strip() for line in lines if line.startswith(("differs", " "))]


def change(path: Path, *keys: str | int, value: Any) -> None:
    tree = json.loads(path.read_text())
    place = tree
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("kind", ["train", "distil", "compare"])
def test_a_sound_run_holds(runs: Path, kind: str, capsys: Capture) -> None:
    code, holds, differs = verdict(runs / kind, capsys)
    assert (code, differs) == (0, [])
    wanted = {
        "train": [
            "methods constant",
            "keep 0.98, paired policy-dense",
            "cost",
            "policy_sha256",
            "student score",
        ],
        "distil": ["student score", "student compacted_accuracy", "student macs_ratio", "student's card"],
        "compare": ["methods tpe_10", "policy_sha256", "result.csv, keep 0.98, constant"],
    }
    assert set(wanted[kind]) <= set(holds)


def test_an_altered_table_is_named_by_row_and_figure(copy: Path, capsys: Capture) -> None:
    path = copy / "train" / "result.json"
    mean = json.loads(path.read_text())["goals"][0]["methods"]["constant"]["score"]["mean"]
    change(path, "goals", 0, "methods", "constant", "score", "mean", value=mean + 1e-4)
    code, holds, differs = verdict(copy / "train", capsys)
    assert code == 1
    assert differs[0] == "differs  keep 0.98, methods constant"
    assert differs[1].startswith(f"score.mean: recorded {mean + 1e-4!r:.12}")
    assert len(differs) == 2
    assert "methods constant" in holds


def test_a_row_that_was_added_or_taken_away_is_named(copy: Path, capsys: Capture) -> None:
    path = copy / "compare" / "result.json"
    result = json.loads(path.read_text())
    result["methods"]["tpe_100"] = result["methods"].pop("tpe_10")
    path.write_text(json.dumps(result))
    rows = (copy / "compare" / "result.csv").read_text().splitlines()
    columns = rows[1].split(",")
    columns[3] = "0.999"
    (copy / "compare" / "result.csv").write_text("\n".join([rows[0], ",".join(columns), *rows[2:]]) + "\n")
    code, _, differs = verdict(copy / "compare", capsys)
    assert code == 1
    assert differs[:4] == [
        "differs  methods tpe_10",
        "is not in result.json",
        "differs  methods tpe_100",
        "does not come out again",
    ]
    assert differs[4] == "differs  result.csv, keep 0.98, policy"
    assert differs[5].startswith(f"{columns[2]}.0: recorded 0.999, computed again")


def resigned_student(folder: Path) -> None:
    """Another student of the same shape, with a checksum that is right."""
    weights, card = folder / "student.safetensors", json.loads((folder / "student.json").read_text())
    tensors = load(weights.read_bytes())
    last = max(name for name in tensors if name.endswith("bias"))
    tensors[last] = tensors[last] + 5 * torch.arange(len(tensors[last]))
    weights.write_bytes(save(tensors))
    text = json.dumps(card["architecture"], sort_keys=True, separators=(",", ":")).encode()
    card["sha256"] = hashlib.sha256(text + b"\n" + weights.read_bytes()).hexdigest()
    (folder / "student.json").write_text(json.dumps(card))


def test_another_student_in_the_folder_is_found(copy: Path, capsys: Capture) -> None:
    resigned_student(copy / "distil" / "student")
    code, holds, differs = verdict(copy / "distil", capsys)
    assert code == 1
    assert {"differs  student accuracy", "differs  student score"} <= set(differs)
    assert "student teacher_accuracy" in holds


def test_a_damaged_student_or_policy_is_a_row_that_differs(copy: Path, capsys: Capture) -> None:
    (copy / "distil" / "student" / "student.safetensors").write_bytes(b"no tensors")
    assert verdict(copy / "distil", capsys)[0] == 1
    weights = copy / "train" / "policy" / "policy.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    code, holds, differs = verdict(copy / "train", capsys)
    assert (code, holds, differs[0]) == (1, [], "differs  policy")
    assert "checksum differs" in differs[1]


@pytest.mark.slow
def test_another_policy_is_found_by_its_hash_and_by_what_it_does(copy: Path, capsys: Capture) -> None:
    folder = copy / "train" / "policy"
    tensors = load((folder / "policy.safetensors").read_bytes())
    tensors["action.bias"] = tensors["action.bias"] + 0.8
    (folder / "policy.safetensors").write_bytes(save(tensors))
    digest = hashlib.sha256((folder / "policy.safetensors").read_bytes()).hexdigest()
    change(folder / "bundle.json", "sha256", value=digest)
    code, holds, differs = verdict(copy / "train", capsys)
    assert code == 1
    assert {"differs  policy_sha256", "differs  methods policy", "differs  student's policy"} <= set(differs)
    assert {"cost", "student accuracy"} <= set(holds)  # which tasks are feasible depends on the policy


@pytest.mark.parametrize("name", ["gone", "unfinished", "other", "damaged"])
def test_what_is_no_finished_run_is_a_mistake(copy: Path, name: str, capsys: Capture) -> None:
    words = "no such run folder"
    if name == "unfinished":
        (copy / name).mkdir()
        words = "holds no result.json; give the folder of a finished"
    elif name == "other":
        shutil.copytree(copy / "distil", copy / name)
        (copy / name / "config.yaml").write_text("[1]")
        words = "not a run's config"
    elif name == "damaged":
        shutil.copytree(copy / "distil", copy / name)
        (copy / name / "result.json").write_text('{"methods": 3}')
        words = "methods.policy is missing"
    assert main(["verify", str(copy / name)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_compare_run_whose_policy_moved_is_told_where(copy: Path, capsys: Capture) -> None:
    path = copy / "compare" / "config.yaml"
    policy = copy / "train" / "policy"
    text = path.read_text()
    path.write_text("\n".join("policy: gone" if x.startswith("policy:") else x for x in text.splitlines()))
    assert main(["verify", str(copy / "compare")]) == 2
    assert verdict(copy / "compare", capsys, "--policy", str(policy))[0] == 0


def test_differences_by_hand() -> None:
    assert differences({"a": [1, 2.0]}, {"a": [1, 2.0 + 1e-9]}) == []
    assert differences({"a": [1, 2.0]}, {"a": [1, 2.001]}) == ["a.1: recorded 2.0, computed again 2.001"]
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 2}) == ["b: is unknown", "c: is missing"]
    assert differences(True, 1) == ["recorded True, computed again 1"]
    assert differences([1], [1, 2]) == ["recorded [1], computed again [1, 2]"]
    assert differences(10**400, 1.0) != []
    assert differences("0.5", 0.5) != []


def test_clocks_are_not_compared_and_all_else_is() -> None:
    def result(wall_s: float, number: int) -> dict[str, Any]:
        goals = [{"name": "keep 0.98", "methods": {"a": {"n": number}}}]
        return {"cost": {"wall_s": wall_s, "agent_trainings": 5}, "goals": goals}

    found = {row.name: row.differences for row in compare_results(result(3.0, 1), result(9.0, 2))}
    assert found == {"keep 0.98, methods a": ("n: recorded 1, computed again 2",), "cost": ()}


def test_a_recorded_policy_is_found_by_its_name_its_run_and_its_folder(tmp_path: Path) -> None:
    tiny_models.save_policy(tmp_path / "run" / "policy")
    digest = load_bundle(tmp_path / "run" / "policy").digest
    assert policy_at(tmp_path / "run").digest == policy_at(tmp_path / "run" / "policy").digest == digest
    assert policy_at(Path("default")).digest != digest
    with pytest.raises(UserError, match="gone: no such folder"):
        policy_at(tmp_path / "gone")
