import json
from pathlib import Path

import pytest
import torch

from rlkd.errors import UserError
from rlkd.io.checkpoints import Checkpoints, read_checkpoint

STATE = {"weights": torch.arange(6.0).view(2, 3), "random": torch.tensor([1, 255], dtype=torch.uint8)}
SCHEMA = {"weights": (torch.float32, (2, 3)), "random": (torch.uint8, (2,))}


def test_the_last_few_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 9, 10):
        checkpoints.save(step, {**STATE, "weights": STATE["weights"] + step}, {"step": step})
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["state-000009.ckpt", "state-000010.ckpt"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.note == {"step": 10}
    assert torch.equal(newest.tensors(SCHEMA)["weights"], STATE["weights"] + 10)
    checkpoints.clear()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("place", [0, 70, 90, 200, -1])
def test_one_that_was_altered_is_named_and_the_one_before_it_used(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, place: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, STATE, {"step": step})
    file = tmp_path / "state-000002.ckpt"
    blob = bytearray(file.read_bytes())
    blob[place] ^= 1
    file.write_bytes(blob)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.note == {"step": 1}
    assert caplog.messages == [f"{file}: torn or altered, its checksum differs; going back to what was saved before it"]


@pytest.mark.parametrize("length", [0, 30, 65, 80, -1])
def test_one_that_is_torn_is_not_used(caplog: pytest.LogCaptureFixture, tmp_path: Path, length: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, STATE, {"step": 1})
    file = tmp_path / "state-000001.ckpt"
    file.write_bytes(file.read_bytes()[:length])
    assert checkpoints.newest() is None
    assert len(caplog.messages) == 1
    assert "torn or altered" in caplog.messages[0]


def test_what_a_crash_leaves_half_written_has_no_checkpoints_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, STATE, {"step": 1})
    monkeypatch.setattr(
        "rlkd.io.files.Path.replace", lambda *_: (_ for _ in ()).throw(SystemExit)
    )  # dies before the rename
    monkeypatch.setattr("rlkd.io.files.Path.unlink", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        checkpoints.save(2, STATE, {"step": 2})
    assert len(list(tmp_path.iterdir())) == 2
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.note == {"step": 1}


def test_tensors_are_made_only_of_what_was_expected(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {**STATE, "weights": torch.full((2, 3), torch.inf)}, {})
    saved = read_checkpoint(tmp_path / "state-000001.ckpt")
    assert torch.isinf(saved.tensors(SCHEMA)["weights"]).all()  # an optimizer may hold it
    for schema, words in (
        (
            {**SCHEMA, "weights": (torch.float32, (2, 4))},
            r"weights is torch.float32 \[2, 3\]; expected float32 \[2, 4\]",
        ),
        ({**SCHEMA, "more": (torch.float32, (1,))}, "more is nothing; expected"),
        ({"random": SCHEMA["random"]}, "'weights' does not belong in it"),
    ):
        with pytest.raises(UserError, match=words):
            saved.tensors(schema)


def test_a_file_longer_than_its_tensors_can_be_is_not_read(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep=1).save(1, {"weights": torch.zeros(2**19)}, {})
    saved = read_checkpoint(tmp_path / "state-000001.ckpt")
    with pytest.raises(UserError, match="bytes; allowed: at most"):
        saved.tensors({"weights": (torch.float32, (1,))})


def test_foreign_files_are_refused(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the name of a checkpoint"):
        read_checkpoint(tmp_path / "policy.zip")
    Checkpoints(tmp_path, keep=1).save(1, STATE, {"step": 1})
    file = tmp_path / "state-000001.ckpt"
    import hashlib

    rest = json.dumps([1]).encode() + b"\n" + b"x"
    file.write_bytes(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
    with pytest.raises(UserError, match="not a checkpoint, or a damaged one"):
        read_checkpoint(file)
    elsewhere = tmp_path / "elsewhere" / "state-000001.ckpt"
    Checkpoints(elsewhere.parent, keep=1).save(1, STATE, {})
    file.unlink()
    file.symlink_to(elsewhere)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "state-000001.ckpt").symlink_to(elsewhere)
    assert Checkpoints(inner, keep=1).newest() is None
    assert "leads out of" in caplog.messages[0]
