import fnmatch
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_policy

from rlkd.agents.policy.bundle import load_bundle
from rlkd.cli.main import main
from rlkd.errors import UserError
from rlkd.runs.hub import pull, push


class Hub:
    """A stand-in of `huggingface_hub.HfApi` whose repositories are folders of this machine."""

    root = Path()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (self.root / "private").write_text(str(private))

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        for path in Path(folder_path).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.root / repo_id / path.name)

    def snapshot_download(
        self, repo_id: str, *, local_dir: str, revision: str | None, allow_patterns: list[str]
    ) -> None:
        if not (self.root / repo_id).is_dir():
            raise RuntimeError("404 Client Error: repository not found")
        shutil.copytree(self.root / repo_id, local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    Hub.root = tmp_path / "hub"
    module = types.ModuleType("huggingface_hub")
    module.HfApi = Hub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return Hub.root


def test_a_policy_goes_to_the_hub_and_back(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(tmp_path / "run" / "policy")
    (tmp_path / "run" / "command.txt").write_text("rlkd train --out run\n")
    assert main(["push", "--folder", str(tmp_path / "run"), "--repo", "me/mine", "--private", "true"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/mine\n"
    assert (hub / "private").read_text() == "True"
    card = (hub / "me" / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: rlkd\n")
    assert "rlkd train --out run" in card
    assert main(["pull", "--repo", "me/mine", "--out", str(tmp_path / "back")]) == 0
    assert "rlkd distil --policy" in capsys.readouterr().out
    assert load_bundle(tmp_path / "back").digest == load_bundle(tmp_path / "run" / "policy").digest


def test_what_was_altered_on_the_hub_is_refused(hub: Path, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    push(tmp_path / "policy", "me/mine")
    weights = hub / "me" / "mine" / "policy.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(bytes(blob))
    with pytest.raises(UserError, match="checksum differs"):
        pull("me/mine", tmp_path / "back")


def test_pickles_stay_here_and_names_are_checked(hub: Path, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    (tmp_path / "policy" / "model.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match=r"got a \.pkl file"):
        push(tmp_path / "policy", "me/mine")
    assert not hub.exists()
    with pytest.raises(UserError, match="allowed: OWNER/NAME"):
        push(tmp_path / "policy", "../mine")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="holds no student and no policy"):
        push(tmp_path / "there", "me/mine")
    with pytest.raises(UserError, match="exists; allowed: a new folder"):
        pull("me/mine", tmp_path / "there")


def test_a_hub_that_does_not_answer_is_one_line(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the hub did not answer .*404.*hf auth login"):
        pull("me/none", tmp_path / "back")

    def offline(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("cannot resolve the name")

    monkeypatch.setattr(Hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="there is no network here"):
        pull("me/mine", tmp_path / "back")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'rlkd\[hub\]'"):
        pull("me/mine", tmp_path / "back")
