"""A causal teacher's signals are its own, come from the cache the second time, and lose no probability."""

import json
import math
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from rlkd.data.anchors import Anchors
from rlkd.data.examples import TokenExamples, next_token_mask
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.pretrained import load_model
from rlkd.teachers.real.token_signals import TokenSignals, token_signals

ANCHORS = Anchors(100.0, 1.0)  # an untrained teacher is worse than a guess over its 40 tokens


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


def texts(size: int = 12, length: int = 7) -> TokenExamples:
    """Ragged, the first two tokens of every third text being a prompt."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 40, (size, length), generator=g)
    mask = (torch.arange(length) < torch.randint(4, length + 1, (size, 1), generator=g)).long()
    prompts = torch.zeros_like(ids)
    prompts[::3, :2] = 1
    order = torch.arange(size)
    splits = {"train": order[: size // 2], "validation": order[size // 2 : -2], "test": order[-2:]}
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return TokenExamples("toy", inputs, order * 0, 40, splits, next_token_mask(mask, prompts))  # type: ignore[arg-type]


def signals_of(data: TokenExamples, k: int, batch_size: int = 5) -> TokenSignals:
    teacher = tiny_models.tiny("llama", layers=3)
    plan = make_plan(teacher, data.batch(torch.arange(2)), AttachConfig(exits=()), data.num_positions)
    return token_signals(teacher, plan, plan.blocks[-1:], data, k, ANCHORS, batch_size)


def test_signals_are_the_teacher_s_and_come_from_the_cache_the_second_time(caplog: pytest.LogCaptureFixture) -> None:
    data = texts()
    first, again = signals_of(data, 3), signals_of(data, 3, batch_size=12)
    assert len(caplog.messages) == 1
    assert torch.equal(first.tokens.values, again.tokens.values)
    with torch.no_grad():
        logits = tiny_models.tiny("llama", layers=3)(**data.inputs).logits  # [12, 7, 40]
    real = data.inputs["attention_mask"].bool()
    torch.testing.assert_close(first.tokens.values[real], logits.topk(3).values[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(first.tokens.indices[real], logits.topk(3).indices[real])
    total = torch.cat([first.tokens.values, first.tokens.rest[..., None]], -1).logsumexp(-1)
    torch.testing.assert_close(total[real], logits.logsumexp(-1)[real], atol=1e-5, rtol=1e-4)
    signals_of(data, 4)
    assert len(caplog.messages) == 2  # another k is another entry


def test_figures_count_neither_padding_nor_prompts() -> None:
    data = texts()
    signals = signals_of(data, 3)
    with torch.no_grad():
        logits = tiny_models.tiny("llama", layers=3)(**data.inputs).logits[:, :-1]  # [12, 6, 40]
    target = data.inputs["input_ids"][:, 1:]

    def nats(split: str) -> torch.Tensor:
        rows = data.splits[split]  # type: ignore[index]
        where = data.counted[rows]
        return F.cross_entropy(logits[rows][where], target[rows][where])

    torch.testing.assert_close(signals.accuracy[0], 1 - nats("validation") / math.log(100), atol=1e-5, rtol=1e-4)
    train = data.splits["train"]
    torch.testing.assert_close(
        signals.agreement(0, train, data.labels[train]), 1 - nats("train") / math.log(100), atol=1e-5, rtol=1e-4
    )
    p = torch.distributions.Categorical(logits=logits[train][data.counted[train]])
    torch.testing.assert_close(signals.entropy[0], p.entropy().mean() / math.log(40), atol=1e-5, rtol=1e-4)
    rows, where = data.splits["test"], data.counted[data.splits["test"]]
    hits = (logits[rows].argmax(-1) == target[rows])[where].float().mean()
    assert float(signals.mean(signals.hits, rows)) == pytest.approx(float(hits))


def test_features_and_maps_are_as_of_any_teacher() -> None:
    data = texts()
    signals = signals_of(data, 2)
    train = data.splits["train"]
    assert float(signals.features[0, train].square().mean()) == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(signals.maps[0].norm(dim=-1), torch.ones(12))
    assert bool((signals.maps[0][data.inputs["attention_mask"] == 0] == 0).all())


@pytest.mark.parametrize("k", [0, 41])
def test_k_is_at_most_the_vocabulary(k: int) -> None:
    with pytest.raises(UserError, match="1 to 40, the teacher's vocabulary"):
        signals_of(texts(), k)


def test_a_teacher_over_several_devices_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is the disk."""
    pytest.importorskip("accelerate", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
    tiny_models.tiny("llama", layers=3).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    parts = ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2")
    places = {f"model.{part}": "disk" if part in ("layers.1", "layers.2") else "cpu" for part in parts}
    (tmp_path / "map.json").write_text(json.dumps({**places, "lm_head": "cpu"}))
    data, made = texts(), []
    for number, device_map in enumerate((None, str(tmp_path / "map.json"))):
        monkeypatch.setenv("RLKD_CACHE", str(tmp_path / f"cache-{number}"))
        teacher = load_model(str(tmp_path / "model"), "causal_lm", device_map=device_map)
        assert any(p.is_meta for p in teacher.parameters()) == bool(number)
        plan = make_plan(teacher, data.batch(torch.arange(2)), AttachConfig(exits=()), data.num_positions)
        made.append(token_signals(teacher, plan, plan.blocks[-1:], data, 3, ANCHORS, 5))
    whole, sharded = made
    for ours, theirs in zip(whole.tokens, sharded.tokens, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(whole.losses, sharded.losses)
    torch.testing.assert_close(whole.features, sharded.features)
    torch.testing.assert_close(whole.maps, sharded.maps)


def test_a_teacher_without_finite_answers_is_refused() -> None:
    data = texts()
    teacher = tiny_models.tiny("llama", layers=3)
    plan = make_plan(teacher, data.batch(torch.arange(2)), AttachConfig(exits=()), data.num_positions)
    with torch.no_grad():
        teacher.lm_head.weight[3] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="the teacher's answers are not finite") as error:
        token_signals(teacher, plan, [], data, 3, ANCHORS)
    assert "\n" not in str(error.value)
