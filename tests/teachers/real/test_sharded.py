"""A teacher whose parts lie on several devices, one of them the disk, gives the signals of the whole one."""

import json
from pathlib import Path

import module_students
import pytest
import tiny_models
import torch

from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.cutting import StudentCut, student_from_teacher
from rlkd.models.real.pretrained import load_model, state_of
from rlkd.teachers.real.module_signals import module_signals

PLACES = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "cpu",
    "bert.encoder.layer.1": "disk",
    "bert.encoder.layer.2": "disk",
    "bert.pooler": "cpu",
    "classifier": "cpu",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("accelerate", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    tiny_models.tiny("bert", layers=3).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "map.json").write_text(json.dumps(PLACES))
    return tmp_path


def test_a_sharded_teacher_gives_the_same_signals_and_student(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    data, counts = module_students.texts(), []
    inputs = data.batch(data.splits["train"][:2])
    made = []
    for device_map in (None, str(folder / "map.json")):
        model = load_model(str(folder / "model"), "sequence_classification", device_map=device_map)
        plan = make_plan(model, inputs, AttachConfig(exits=()), data.num_positions)
        made.append((model, module_signals(model, plan, [plan.blocks[-1]], data)))
        counts.append(sum("one pass of the teacher" in line for line in caplog.messages))
    (whole, expected), (sharded, signals) = made
    assert sum(p.is_meta for p in sharded.parameters()) == 32  # two blocks of 16 tensors are read when needed
    assert counts == [1, 1]  # the same teacher: the cache has its signals
    assert torch.equal(signals.logits, expected.logits)
    with torch.no_grad():
        assert torch.equal(sharded(**inputs).logits, whole(**inputs).logits)
    assert all(torch.equal(state_of(sharded)[name], value) for name, value in whole.state_dict().items())
    cut = StudentCut(layers=2)
    ours, theirs = (student_from_teacher(m, "sequence_classification", cut)[0] for m in (sharded, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_a_pass_of_its_own_is_the_same_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module_students.texts()
    inputs = data.batch(data.splits["train"][:2])
    results = []
    for number, device_map in enumerate((None, str(folder / "map.json"), "auto")):
        monkeypatch.setenv("RLKD_CACHE", str(folder / f"cache-{number}"))
        model = load_model(str(folder / "model"), "sequence_classification", device_map=device_map)
        plan = make_plan(model, inputs, AttachConfig(exits=()), data.num_positions)
        results.append(module_signals(model, plan, [plan.blocks[-1]], data))
    for other in results[1:]:
        torch.testing.assert_close(other.logits, results[0].logits)
        torch.testing.assert_close(other.maps, results[0].maps)
        torch.testing.assert_close(other.features, results[0].features)


@pytest.mark.parametrize(
    ("given", "says"),
    [("everywhere", "teacher_device_map: got 'everywhere'; allowed: auto"), ("gone.json", "gone.json: cannot read it")],
)
def test_a_map_that_is_none_is_one_line(folder: Path, given: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_model(str(folder / "model"), "sequence_classification", device_map=given)
