import fnmatch
import importlib
import inspect
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped_students import trained
from small_students import save_trained, trained_chain
from tiny_models import batch, need_transformers, save_policy, save_tokenizer

from rlkd.agents.policy.bundle import load_bundle
from rlkd.cli.main import main
from rlkd.compression.loading import load_student
from rlkd.compression.real.cut import ship
from rlkd.compression.real.student_folder import save_module_student
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig
from rlkd.runs.hub import pull, push


class Hub:
    """A stand-in of `huggingface_hub.HfApi` whose repositories are folders of this machine."""

    root = Path()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (self.root / "private").write_text(str(private))

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        for path in Path(folder_path).rglob("*"):
            name = path.relative_to(folder_path)
            if path.is_file() and any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (self.root / repo_id / name).parent.mkdir(exist_ok=True)
                shutil.copy(path, self.root / repo_id / name)

    def snapshot_download(
        self, repo_id: str, *, local_dir: str, revision: str | None, allow_patterns: list[str]
    ) -> None:
        if not (self.root / repo_id).is_dir():
            raise RuntimeError("404 Client Error: repository not found")
        shutil.copytree(self.root / repo_id, local_dir)
        notes = Path(local_dir) / ".cache" / "huggingface" / "README.md.metadata"
        notes.parent.mkdir(parents=True)
        notes.write_text("as the real client writes it")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    Hub.root = tmp_path / "hub"
    try:
        module = importlib.import_module("huggingface_hub")  # transformers needs the rest of it
    except ImportError:
        module = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(module, "HfApi", Hub, raising=False)
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
    push(tmp_path / "back", "me/again")  # what was pulled can be pushed


def test_what_was_altered_on_the_hub_is_refused(hub: Path, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    push(tmp_path / "policy", "me/mine")
    weights = hub / "me" / "mine" / "policy.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(bytes(blob))
    with pytest.raises(UserError, match="checksum differs"):
        pull("me/mine", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_chain_student_goes_to_the_hub_and_back(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, data = trained_chain(widths=(8, 8), exits=(1,), num_steps=5)
    save_trained(tmp_path / "run" / "student", student, data)
    assert main(["push", "--folder", str(tmp_path / "run"), "--repo", "me/mine"]) == 0
    card = (hub / "me" / "mine" / "README.md").read_text()
    assert "A student that rlkd has distilled" in card
    assert "| accuracy | 0." in card
    assert main(["pull", "--repo", "me/mine", "--out", str(tmp_path / "back")]) == 0
    assert "rlkd.load_student(" in capsys.readouterr().out
    inputs = data.inputs[:20]
    assert torch.equal(load_student(tmp_path / "back")(inputs), student(inputs))
    (hub / "me" / "mine" / "student.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="the student was altered after it was saved"):
        pull("me/mine", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_student_of_transformers_goes_to_the_hub_and_back(hub: Path, tmp_path: Path) -> None:
    student = trained("bert", AttachConfig())
    masks = tuple(torch.ones(group.size) for group in student.plan.groups)
    shipped = ship(student, "sequence_classification", masks, 1.0, 0.6)
    save_module_student(shipped, tmp_path / "student", save_tokenizer(tmp_path / "words"), {"figures": {}})
    push(tmp_path / "student", "me/mine")
    assert pull("me/mine", tmp_path / "back") == "student"
    inputs = batch("bert", size=12)
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path / "back")(**inputs), shipped(**inputs))
    need_transformers().AutoTokenizer.from_pretrained(tmp_path / "back" / "model")
    (hub / "me" / "mine" / "model" / "model.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(UserError, match=r"model\.safetensors: checksum differs"):
        pull("me/mine", tmp_path / "again")


def test_the_stand_in_is_called_as_the_client_is() -> None:
    client = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed").HfApi
    for name in ("create_repo", "upload_folder", "snapshot_download"):
        own, real = (inspect.signature(getattr(api, name)).parameters for api in (Hub, client))
        assert set(own) <= set(real), name


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
