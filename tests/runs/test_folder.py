"""What every run writes of itself: command, resolved config, versions and the state of the checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlkd.configs import DistilConfig
from rlkd.runs.folder import describe_run, git_state

NOBODY = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *NOBODY, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    nothing = {"git_commit": None, "git_changed": None}
    assert git_state(tmp_path) == nothing
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == nothing  # no commit yet
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    first = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"git_commit": first, "git_changed": False}
    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_state(tmp_path) == {"git_commit": first, "git_changed": True}
    git(tmp_path, "commit", "-qam", "second")
    assert git_state(tmp_path)["git_changed"] is False
    (tmp_path / "new.py").write_text("")
    assert git_state(tmp_path)["git_changed"] is True  # a file that git does not know yet changes what runs, too


def test_a_run_says_what_was_asked_and_of_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/rlkd", "replay", "--policy", "a b", "--seed", "3"])
    versions = describe_run(tmp_path, DistilConfig(num_windows=5), 3)
    assert (tmp_path / "command.txt").read_text() == "rlkd replay --policy 'a b' --seed 3\n"
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["seed"], config["num_windows"]) == (3, 5)
    assert config["train"]["max_rollbacks"] == 2  # resolved: what was left out stands there, too
    assert json.loads((tmp_path / "versions.json").read_text()) == versions
    assert {"rlkd", "python", "torch", "numpy", "git_commit", "git_changed"} <= set(versions)
