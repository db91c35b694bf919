"""The study of a language model with fewer blocks, on a tiny model, and the parts that it is made of."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import language_model
import pytest
import tiny_models
import torch
from depth_pruning import chosen_blocks, influences, removals, remove_block, token_parts, train_by_hand
from language_model import Study, Work, callable_of, perplexities, run
from language_model_page import ratio_interval

from rlkd.agents.policy.bundled import find_policy
from rlkd.models.real.hooks import forward
from rlkd.models.real.instrumented import Instrumented

V = len(tiny_models.WORDS) + 3


def test_blocks_are_removed_evenly_over_the_first_share_of_the_steps() -> None:
    assert removals(60, 10, 0.5) == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert removals(8, 3, 0.5) == [1, 3, 4]  # 4/3, 8/3 and 4, rounded
    assert removals(4, 4, 0.5) == [0, 1, 2, 2]  # 0.5, 1, 1.5 and 2, rounded to even numbers


def with_idle(model: Any, places: tuple[int, ...]) -> Any:
    """The model with blocks that add nothing to what enters them."""
    for place in places:
        block = model.model.layers[place]
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def test_the_blocks_that_change_nothing_go_first() -> None:
    model = with_idle(tiny_models.tiny("llama", layers=5), (1, 3))
    inputs = tiny_models.batch("llama")
    found = influences(model, inputs)
    assert [found[place] for place in (1, 3)] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert min(found[place] for place in (0, 2, 4)) > 1e-5
    assert chosen_blocks(model, inputs, 3) == [1, 3, 5]
    with torch.no_grad():
        before = forward(model, inputs).logits
        assert [remove_block(model, inputs), remove_block(model, inputs)] in ([1, 2], [3, 1])
        assert len(model.model.layers) == 3
        torch.testing.assert_close(forward(model, inputs).logits, before)


def test_the_influence_of_padding_does_not_count() -> None:
    model = tiny_models.tiny("llama", layers=2)
    inputs = tiny_models.batch("llama", size=1)
    padded = {name: torch.cat([values, torch.zeros(1, 3, dtype=torch.int64)], 1) for name, values in inputs.items()}
    assert influences(model, padded) == pytest.approx(influences(model, inputs), abs=1e-5)


def test_the_ratio_of_perplexities_is_paired() -> None:
    some = [{"test_nats": [4.0, 20.0], "test_tokens": [2, 8]}]
    others = [{"test_nats": [3.8, 19.2], "test_tokens": [2, 8]}]  # 0.1 nats a token better everywhere
    assert ratio_interval(some, others) == pytest.approx([math.exp(0.1)] * 3)
    worse = [{"test_nats": [5.0, 19.0], "test_tokens": [2, 8]}]  # 0.5 a token worse, 0.125 better
    ratio, low, high = ratio_interval(worse, some)
    assert (ratio, low, high) == pytest.approx((1.0, math.exp(-0.125), math.exp(0.5)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the study fetches, tiny: a teacher and texts."""
    folder = tmp_path_factory.mktemp("work")
    tiny_models.tiny("llama", layers=5, vocab_size=V, tie_word_embeddings=True).save_pretrained(folder / "teacher")
    tiny_models.save_causal_tokenizer(folder / "teacher")
    (folder / "teacher" / "tokenizer.json").touch()
    draw = random.Random(0)
    splits = ["train"] * 40 + ["validation"] * 8 + ["test"] * 8
    rows = [
        {"text": " ".join(draw.choices(tiny_models.WORDS[:4], k=draw.randint(4, 12))), "source": str(i), "split": split}
        for i, split in enumerate(splits)
    ]
    (folder / "brown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_the_study_of_a_tiny_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers=3, num_windows=2, steps_per_window=4, top_k=5)
    work = Work(place, tmp_path, study, find_policy(None))
    text, numbers = run(work, 1)
    rows = {name: some[0] for name, some in numbers["rows"].items()}
    assert rows["teacher"]["test_perplexity"] == pytest.approx(rows["teacher"]["by_signals"], rel=1e-4)
    assert rows["plain"]["test_perplexity"] < rows["cut"]["test_perplexity"]
    assert rows["gradual"]["removed_before"] == [2, 4]
    assert rows["gradual"]["parameters"] == rows["cut"]["parameters"] < rows["teacher"]["parameters"]
    assert rows["policy"]["validation_perplexity"] == pytest.approx(rows["policy"]["trained_perplexity"], rel=0.02)
    assert all(1.0 <= window["temperature"] <= 2.0 for window in rows["policy"]["windows"])
    asked = rows["policy"]["goal"]["accuracy"]  # the quality of the teacher's own perplexity
    _, signals = token_parts(work.scenario)
    nats = math.log(rows["teacher"]["validation_perplexity"])
    assert asked == pytest.approx(float(signals.anchors.quality(torch.tensor(nats))), abs=1e-4)
    assert "| gradual | " in text

    # by hand and through rlkd's loop, plain distillation is one training
    train = dataclasses.replace(work.scenario.config.train, precision="float32")
    model = work.scenario.student.model
    no_hints = Instrumented(model, work.scenario.student.plan, [])  # the loop gives features a weight of e^-8
    config = dataclasses.replace(work.scenario.config, train=train)
    exact = dataclasses.replace(work.scenario, config=config, student=no_hints)
    _, metrics = language_model.steered(exact, "plain", 0, study, work.bundle)
    assert metrics["best_window"] == 2
    through_loop = perplexities(callable_of(model), work.scenario.data)["test_perplexity"]  # type: ignore[arg-type]
    model.load_state_dict(exact.initial)
    train_by_hand(model, exact, 0)
    by_hand = perplexities(callable_of(model), work.scenario.data)["test_perplexity"]  # type: ignore[arg-type]
    assert by_hand == pytest.approx(through_loop, rel=1e-4)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second call trains nothing")

    monkeypatch.setattr(language_model, "build_real_scenario", refuse)
    again = run(Work(place, tmp_path, study, work.bundle), 1)[1]
    assert again["rows"] == numbers["rows"]
