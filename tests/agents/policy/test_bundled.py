"""Where a command's policy is: in a run, in a folder of its own, or in the package."""

from importlib import resources
from pathlib import Path

import pytest
import tiny_models

from rlkd.agents.policy.bundle import load_bundle
from rlkd.agents.policy.bundled import bundled_policies, find_policy
from rlkd.errors import UserError


def test_a_run_and_its_policy_folder_are_the_same(tmp_path: Path) -> None:
    tiny_models.save_policy(tmp_path / "run" / "policy")
    assert find_policy(tmp_path / "run").digest == find_policy(tmp_path / "run" / "policy").digest


def test_the_policies_of_the_package_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "default" in bundled_policies()
    for folder in bundled_policies().values():
        load_bundle(folder)
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    assert bundled_policies() == {}
    with pytest.raises(UserError, match="holds no policy of its own; give a run folder of rlkd train"):
        find_policy(None)
    tiny_models.save_policy(tmp_path / "policies" / "default")
    assert list(bundled_policies()) == ["default"]
    assert find_policy(None).digest == load_bundle(tmp_path / "policies" / "default").digest


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such folder"):
        find_policy(tmp_path / "gone")
