"""`--resume` on the command line: every verb that runs, whatever stopped it, and what contradicts the run."""

import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rlkd.cli.main import main
from rlkd.cli.progress import Bar
from rlkd.cli.resume import is_of_real_model
from rlkd.io.files import write_error, write_whole

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A folder that holds the run `whole`, which nobody stopped."""
    place = tmp_path_factory.mktemp("runs")
    assert main(["train", *tiny, "--ppo.num_iterations", "2", "--out", str(place / "whole")]) == 0
    return place


@pytest.fixture
def here(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(whole)
    return whole


def stop_at(patch: pytest.MonkeyPatch, window: int) -> None:
    """Ctrl-C at the n-th window from now on."""
    left = window

    def advance(bar: Bar, num_students: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    patch.setattr(Bar, "advance", advance)


def without_clocks(path: Path) -> Any:
    def cut(tree: Any) -> Any:
        clocks = (
            "wall_s",
            "trainings_per_s",
            "updates_per_s",
            "measured",
            "speedup_over_teacher",
            "speedup_over_dense",
        )
        return {k: cut(v) for k, v in tree.items() if k not in clocks} if isinstance(tree, dict) else tree

    return cut(json.loads(path.read_text()))


def assert_same(cut: Path, whole: Path, *exact: str) -> None:
    for name in exact:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert without_clocks(cut / "result.json") == without_clocks(whole / "result.json")


@pytest.mark.slow
def test_a_full_disk_and_sigterm_lose_nothing_and_say_how_to_go_on(
    here: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(path: Path, content: bytes | str) -> None:
        if "state-000002" in path.name:
            raise write_error(path, OSError(errno.ENOSPC, "No space left on device"))
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("rlkd.io.checkpoints.write_whole", full)
        assert main(["train", *tiny, "--ppo.num_iterations", "2", "--out", "cut"]) == 2
    assert capsys.readouterr().err.endswith("then run it again; go on with: rlkd train --resume cut\n")
    assert not (here / "cut" / "run.lock").exists()
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "figures", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        assert main(["train", "--resume", "cut"]) == 143
    assert capsys.readouterr().err.endswith("rlkd: terminated; go on with: rlkd train --resume cut\n")
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["train", "--resume", "cut", "--seed", "0"]) == 0
    assert_same(here / "cut", here / "whole", "metrics.jsonl", "policy/policy.safetensors", "policy/bundle.json")

    kept = (here / "cut" / "result.json").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", "cut"]) == 0
    assert capsys.readouterr().err == "rlkd: cut had come to its end; figures: cut/result.json\n"
    assert (here / "cut" / "result.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--ppo.num_iterations", "5"],
            "--ppo.num_iterations: got 5 with --resume, but whole began with 2; leave it out, or start a new run",
        ),
        (["--seed", "4"], "--seed: got 4 with --resume, but whole began with 0; leave it out, or start a new run"),
        (
            ["--config", "default"],
            "leave it out, or start a new run",
        ),
        (["--out", "other"], "--out: got other with --resume whole; a run goes on in its own folder"),
    ],
)
def test_what_contradicts_the_run_is_refused(here: Path, capsys: Capture, options: list[str], said: str) -> None:
    assert main(["train", "--resume", "whole", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rlkd: --")
    assert err.endswith(f"{said}\n")
    assert err.count("\n") == 1


def test_only_a_run_can_be_resumed(here: Path, capsys: Capture) -> None:
    for argv, said in {
        (
            "train",
            "--resume",
            "nowhere",
        ): "--resume: nowhere holds no config.yaml, so no run that was stopped; start it anew",
        ("train", "--resume"): "--resume: got nothing; allowed: the folder of a run that was stopped",
        ("compare", "a.yaml", "--resume", "whole"): (
            "--resume: got config files, too; a run goes on by its own config: give its folder alone"
        ),
    }.items():
        assert main(list(argv)) == 2
        assert capsys.readouterr().err == f"rlkd: {said}\n"


REPLAY = ("--num_windows", "4", "--train.steps_per_window", "3", "--student.widths", "[12, 8]")


@pytest.mark.slow
def test_a_student_goes_on_window_by_window(here: Path, monkeypatch: pytest.MonkeyPatch, profile_file: Path) -> None:
    options = [*REPLAY, "--policy", "whole/policy", "--cost.profile", str(profile_file), "--seed", "2"]
    assert main(["distil", *options, "--out", "replayed"]) == 0
    for window, argv in (
        (2, [*options, "--out", "stopped"]),
        (1, ["--resume", "stopped"]),
        (3, ["--resume", "stopped"]),
    ):
        with monkeypatch.context() as patch:
            stop_at(patch, window)  # once what is remembered has been shown, too
            assert main(["distil", *argv]) == 130
    assert main(["distil", "--resume", "stopped"]) == 0
    assert_same(
        here / "stopped", here / "replayed", "metrics.jsonl", "student/student.safetensors", "student/student.json"
    )
    shutil.copytree(here / "whole" / "policy", here / "moved")
    assert main(["distil", "--resume", "stopped", "--policy", "moved"]) == 0  # where the policy lies does not matter


COMPARISON = (
    *("--methods", "policy,constant,annealed,open_loop,random_policy,hypergradient,linear,random_10,tpe_10"),
    *("--search.num_settings", "3", "--search.tasks_per_setting", "2", "--search.tasks_per_finalist", "2"),
    *(
        "--comparison.num_tasks",
        "2",
        "--comparison.keeps",
        "[0.9]",
        "--comparison.accuracy_weights",
        "[0.6]",
        "--tune_exit",
        "true",
    ),
    *("--front_trials", "2", "--front_weights", "[0.5, 0.9]"),
)


@pytest.mark.slow
def test_a_comparison_goes_on_with_its_searches(
    here: Path, tiny_scenario: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*tiny_scenario, *COMPARISON, "--policy", "whole/policy"]
    assert main(["compare", *options, "--out", "compared"]) == 0
    trained = 0
    for window in (2, 14, 60, 110, 170):
        with monkeypatch.context() as patch:
            stop_at(patch, window)
            assert main(["compare", *(["--resume", "halted"] if trained else [*options, "--out", "halted"])]) == 130
        entries = len((here / "halted" / "checkpoints" / "journal.jsonl").read_text().splitlines())
        assert entries > trained
        trained = entries
    assert main(["compare", "--resume", "halted"]) == 0
    assert_same(here / "halted", here / "compared", "result.csv", "config.yaml")


@pytest.mark.slow
def test_another_policy_is_noticed(
    here: Path, tiny_scenario: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    options = [
        *tiny_scenario,
        "--methods",
        "policy,constant",
        "--policy",
        "mine/policy",
    ]
    shutil.copytree(here / "whole" / "policy", here / "mine" / "policy")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert main(["compare", *options, "--out", "misled"]) == 130
    card = here / "mine" / "policy" / "bundle.json"
    tree = json.loads(card.read_text())
    blob = bytearray((here / "mine" / "policy" / "policy.safetensors").read_bytes())
    blob[-1] ^= 1  # another policy, soundly written
    (here / "mine" / "policy" / "policy.safetensors").write_bytes(blob)
    import hashlib

    tree["sha256"] = hashlib.sha256(blob).hexdigest()
    card.write_text(json.dumps(tree))
    capsys.readouterr()
    assert main(["compare", "--resume", "misled"]) == 2
    err = capsys.readouterr().err
    assert "entry 1 is 'rlkd compare, its data and models'" in err
    assert "config, data or rlkd itself have changed since; start anew in another folder" in err


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_run_is_resumed_by_its_own_verb(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\nnum_windows: 2\npreference: {accuracy: 0.9}\n")
    assert main([verb, "--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"--resume: {tmp_path}/config.yaml is no config of rlkd {verb} (no key 'preference" in err
    assert err.endswith(f"go on with the verb that began the run, as in {tmp_path}/command.txt\n")
    assert err.count("\n") == 1


def test_a_config_file_of_a_real_model_is_taken_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real.yaml").write_text(f"teacher: {tmp_path}/gone\ndata: reviews.csv\ngoal: {{keep: 0.98}}\n")
    assert is_of_real_model(["--config", str(tmp_path / "real.yaml")])
    assert is_of_real_model([f"--config={tmp_path / 'real.yaml'}"])
    assert not is_of_real_model(["--config", "wide"])
    (tmp_path / "broken.yaml").write_text("data: [1")
    assert not is_of_real_model(["--config", str(tmp_path / "broken.yaml")])
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    assert main(["distil", "--config", str(tmp_path / "real.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert f"rlkd: {tmp_path}/gone: no such folder" in capsys.readouterr().err
