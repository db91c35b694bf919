"""Signals of a tiny transformer: its answers, features and maps, and their cache."""

import dataclasses
from pathlib import Path

import pytest
import tiny_models
import torch
from module_students import texts

from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.teachers.real.module_signals import module_signals


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


def test_signals_are_the_teacher_s_and_come_from_the_cache_the_second_time(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    data, teacher = texts(), tiny_models.tiny("bert", seed=1)
    plan = make_plan(teacher, data.batch(torch.arange(2)), AttachConfig(), data.num_positions)
    first = module_signals(teacher, plan, plan.blocks, data, batch_size=7)
    again = module_signals(teacher, plan, plan.blocks, data, batch_size=50)
    assert len(caplog.messages) == 1
    with torch.no_grad():
        logits = teacher(**data.inputs).logits
    torch.testing.assert_close(first.logits[0], logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again.features, first.features)
    train = data.splits["train"]
    for k in range(2):
        part = first.features[0, train, 32 * k : 32 * (k + 1)]
        assert float(part.square().mean()) == pytest.approx(1.0, rel=1e-4)
    maps = first.maps[0]
    torch.testing.assert_close(maps.norm(dim=-1), torch.ones(96))
    assert bool((maps[data.inputs["attention_mask"] == 0] == 0).all())
    with torch.no_grad():
        teacher.classifier.weight.mul_(2.0)
    module_signals(teacher, plan, plan.blocks, data)
    assert len(caplog.messages) == 2
    ids = data.inputs["input_ids"]
    others = {**data.inputs, "input_ids": torch.where(ids > 5, ids - 1, ids)}  # other words in the same places
    module_signals(teacher, plan, plan.blocks, dataclasses.replace(data, inputs=others))
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_without_finite_answers_is_refused(value: float) -> None:
    data, teacher = texts(), tiny_models.tiny("bert", seed=1)
    plan = make_plan(teacher, data.batch(torch.arange(2)), AttachConfig(), data.num_positions)
    with torch.no_grad():
        teacher.classifier.bias[1] = value
    with pytest.raises(UserError, match="the teacher's answers are not finite") as error:
        module_signals(teacher, plan, [], data)
    assert "\n" not in str(error.value)
