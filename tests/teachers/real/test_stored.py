"""Stored answers of a teacher: shards of several processes, imports of other tools, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlkd.data.anchors import Anchors
from rlkd.data.examples import Examples, TokenExamples, next_token_mask
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Table
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.sides import Side
from rlkd.teachers.real.answering import describe, model_answers, write_answers
from rlkd.teachers.real.imported import import_answers
from rlkd.teachers.real.module_signals import module_signals
from rlkd.teachers.real.shards import INDEX, Answers, Description, read_index
from rlkd.teachers.real.stored import stored_signals
from rlkd.teachers.real.token_signals import TokenSignals, token_signals

ANCHORS, V, K = Anchors(100.0, 1.0), 40, 5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


def texts(size: int = 12, length: int = 7) -> TokenExamples:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, V, (size, length), generator=g)
    mask = (torch.arange(length) < torch.randint(4, length + 1, (size, 1), generator=g)).long()
    mask[0] = 1
    order = torch.arange(size)
    splits: Any = {"train": order[: size // 2], "validation": order[size // 2 : -2], "test": order[-2:]}
    return TokenExamples(
        "toy", {"input_ids": ids * mask, "attention_mask": mask}, order * 0, V, splits, next_token_mask(mask)
    )


def images() -> Examples:
    order = torch.arange(12)
    splits: Any = {"train": order[:6], "validation": order[6:10], "test": order[10:]}
    pixels = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return Examples("toy", {"pixel_values": pixels}, order % 3, 3, splits)


def side_of(data: Examples, family: str, num_classes: int = 2) -> Side:
    model = tiny_models.tiny(family, num_classes)
    plan = make_plan(model, data.batch(torch.arange(2)), AttachConfig(exits=()), data.num_positions)
    return Side(model, data, plan, None, Table("toy", "text", [], [], [], None), ColumnConfig())


def written(folder: Path, side: Side, total: int, order: tuple[int, ...] | None = None, k: int = K) -> Description:
    kind: Any = "causal_lm" if isinstance(side.data, TokenExamples) else "image_classification"
    described = describe(side, kind, "toy-teacher", k, "teacher")
    for number in order or range(total):
        write_answers(folder, described, number, total, lambda rows: model_answers(side, rows, described.k, 3))
    return described


def read(folder: Path, described: Description, data: Examples) -> Any:
    return stored_signals(folder, data, described.kind, described.names_sha256, ANCHORS)


def test_shards_hold_the_signals_that_the_teacher_s_pass_gives(tmp_path: Path) -> None:
    data = texts()
    side = side_of(data, "llama")
    described = written(tmp_path / "a", side, 3, (2, 0, 1))  # in any order, as of several processes
    stored = read(tmp_path / "a", described, data)
    own = token_signals(side.model, side.plan, [], data, K, ANCHORS, 5)
    assert isinstance(stored, TokenSignals)
    real = data.inputs["attention_mask"].bool()
    assert torch.equal(stored.tokens.indices[real], own.tokens.indices[real])

    def shares(signals: TokenSignals) -> Tensor:
        whole = torch.cat([signals.tokens.values, signals.tokens.rest[..., None]], -1)
        return whole.softmax(-1)[real]

    torch.testing.assert_close(shares(stored), shares(own), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stored.losses[data.counted], own.losses[data.counted], atol=1e-5, rtol=1e-4)
    assert torch.equal(stored.hits[data.counted], own.hits[data.counted])
    torch.testing.assert_close(stored.accuracy, own.accuracy, atol=1e-5, rtol=1e-4)
    assert float(stored.entropy[0]) >= float(own.entropy[0]) - 1e-5  # what is not stored is spread evenly
    whole = read(tmp_path / "b", written(tmp_path / "b", side, 1, k=V), data)
    torch.testing.assert_close(whole.entropy, own.entropy, atol=1e-5, rtol=1e-4)


def test_classifiers_are_stored_too(tmp_path: Path) -> None:
    data = images()
    side = side_of(data, "vit", 3)
    side.model.config.id2label = {0: "a", 1: "b", 2: "c"}  # type: ignore[union-attr]
    own = module_signals(side.model, side.plan, [], data)
    whole = read(tmp_path / "a", written(tmp_path / "a", side, 2, k=9), data)  # at most all classes
    torch.testing.assert_close(whole.logits[0].softmax(-1), own.logits[0].softmax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.entropy, own.entropy, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.accuracy, own.accuracy)
    two = read(tmp_path / "b", written(tmp_path / "b", side, 2, k=2), data)  # one class has the rest
    torch.testing.assert_close(two.logits[0].softmax(-1), own.logits[0].softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    side = side_of(texts(), "llama")
    described = written(tmp_path, side, 2, (0,))
    with pytest.raises(UserError, match="shards of it are missing"):
        read_index(tmp_path)

    def refuse(rows: Tensor) -> Answers:
        raise AssertionError("asked again")

    assert not write_answers(tmp_path, described, 0, 2, refuse)
    with pytest.raises(AssertionError, match="asked again"):
        write_answers(tmp_path, described, 1, 2, refuse)
    with pytest.raises(AssertionError, match="asked again"):
        write_answers(tmp_path, replace(described, teacher="other"), 0, 2, refuse)
    (tmp_path / "answers-00001-of-00002.safetensors").write_bytes(b"torn")
    assert write_answers(tmp_path, described, 0, 2, lambda rows: model_answers(side, rows, K, 3))


def test_shards_of_two_machines_are_read_where_they_are_copied_together(tmp_path: Path) -> None:
    data = texts()
    side = side_of(data, "llama")
    for number, name in ((0, "here"), (1, "there")):
        described = written(tmp_path / name, side, 2, (number,))
        assert not (tmp_path / name / INDEX).exists()
    shutil.copytree(tmp_path / "there", tmp_path / "here", dirs_exist_ok=True)
    whole = read(tmp_path / "whole", written(tmp_path / "whole", side, 2), data)
    assert read_index(tmp_path / "here") == read_index(tmp_path / "whole")
    assert torch.equal(read(tmp_path / "here", described, data).losses, whole.losses)
    card = json.loads((tmp_path / "here" / "answers-00002-of-00002.json").read_text())
    for change, words in (
        ({"shard": {**card["shard"], "first": 0}}, "do not follow one another"),
        ({"teacher_sha256": "1" * 64}, "teacher_sha256 is 1111"),
    ):
        (tmp_path / "here" / "answers-00002-of-00002.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(UserError, match=words):
            read_index(tmp_path / "here")
    (tmp_path / "here" / "answers-00001-of-00002.json").unlink()
    with pytest.raises(UserError, match="shards of it are missing"):
        read_index(tmp_path / "here")


def test_answers_to_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    data = texts()
    described = written(tmp_path, side_of(data, "llama"), 2)
    swapped = {name: values.flip(0) for name, values in data.inputs.items()}
    cases = {
        "the samples or their order differ": (replace(data, inputs=swapped), described.names_sha256),
        "the size of the vocabulary differs: 40 stored, 41 here": (
            replace(data, num_classes=41),
            described.names_sha256,
        ),
        "the number of samples differs: 12 stored, 11 here": (texts(11), described.names_sha256),
        "the length of the texts differs": (texts(length=6), described.names_sha256),
        "the tokenizer's vocabulary or the names of the classes differ": (data, "0" * 64),
    }
    for words, (other, stored) in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            stored_signals(tmp_path, other, "causal_lm", stored, ANCHORS)
        assert "\n" not in str(caught.value)
    other_teacher = replace(described, teacher_sha256="1" * 64)
    with pytest.raises(UserError, match="give every answer set a folder of its own"):
        write_answers(tmp_path, other_teacher, 0, 2, lambda rows: model_answers(side_of(data, "llama"), rows, K, 3))


@pytest.mark.parametrize("damage", ["byte", "index", "shard"])
def test_damaged_folders_are_refused(tmp_path: Path, damage: str) -> None:
    data = texts()
    described = written(tmp_path, side_of(data, "llama"), 2)
    file = tmp_path / "answers-00002-of-00002.safetensors"
    if damage == "byte":
        blob = bytearray(file.read_bytes())
        blob[-3] ^= 1
        file.write_bytes(blob)
    elif damage == "index":
        card = json.loads((tmp_path / INDEX).read_text())
        card["shards"][0]["count"] -= 1
        (tmp_path / INDEX).write_text(json.dumps(card))
    else:
        file.unlink()
    words = {"byte": "its checksum differs", "index": "do not follow one another", "shard": "cannot read it"}
    with pytest.raises(UserError, match=words[damage]):
        read(tmp_path, described, data)


def foreign(data: TokenExamples, k: int = K) -> dict[str, Tensor]:
    """As another tool stores them: not sorted, without the last position."""
    answers = model_answers(side_of(data, "llama"), torch.arange(len(data.labels)), k, 4)
    ids, log_probs = (values[:, :-1].flip(-1).contiguous() for values in (answers.ids, answers.log_probs))
    return {"input_ids": data.inputs["input_ids"].contiguous(), "ids": ids, "log_probs": log_probs}


def test_imports_equal_the_teacher_s_own_answers(tmp_path: Path) -> None:
    data = texts()
    tensors = foreign(data)
    save_file(tensors, tmp_path / "a.safetensors")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    lengths = data.inputs["attention_mask"].sum(1).tolist()
    rows = {
        name: [values[i, : n if name == "input_ids" else n - 1].tolist() for i, n in enumerate(lengths)]
        for name, values in tensors.items()
    }
    parquet.write_table(arrow.table(rows), tmp_path / "a.parquet")
    own = model_answers(side_of(data, "llama"), torch.arange(12), K, 4)
    for name in ("a.safetensors", "a.parquet"):
        found = import_answers(tmp_path / name, data)
        assert torch.equal(found.ids[:, :-1][data.counted], own.ids[:, :-1][data.counted])
        torch.testing.assert_close(found.log_probs[:, :-1][data.counted], own.log_probs[:, :-1][data.counted])
        assert bool(found.targets.isnan().all())


def test_a_next_token_that_is_not_stored_shares_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = texts()
    save_file(foreign(data), tmp_path / "a.safetensors")
    answers = import_answers(tmp_path / "a.safetensors", data)
    described = describe(side_of(data, "llama"), "causal_lm", "toy", K, "import")
    write_answers(tmp_path / "s", described, 0, 1, lambda rows: Answers(*(t[rows] for t in answers)))
    signals = read(tmp_path / "s", described, data)
    assert "next tokens; its perplexity is an estimate" in caplog.text
    sample, position = 0, 0
    target = int(data.inputs["input_ids"][sample, position + 1])
    log_probs, ids = answers.log_probs[sample, position], answers.ids[sample, position]
    inside = log_probs[ids == target]
    rest = 1 - float(log_probs.exp().sum())
    expected = float(inside[0]) if len(inside) else math.log(rest / (V - K))
    assert float(signals.losses[sample, position]) == pytest.approx(-expected, abs=1e-5)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    data = texts()
    good = foreign(data)
    other = good["input_ids"].clone()
    other[3, 1] += 1
    far, twice, loud = good["ids"].clone(), good["ids"].clone(), good["log_probs"].clone()
    far[2, 0, 0], twice[1, 1, 0], loud[0, 0] = V, twice[1, 1, 1], math.log(0.3)
    broken = good["log_probs"].clone()
    broken[0, 1, 2] = float("nan")
    cases: dict[str, dict[str, Tensor]] = {
        "has no log_probs; it has ids, input_ids": {k: v for k, v in good.items() if k != "log_probs"},
        "one shape": {**good, "ids": good["ids"][..., 1:].contiguous()},
        "has 11 samples; the data have 12": {k: v[1:].contiguous() for k, v in good.items()},
        "text 3 has other tokens": {**good, "input_ids": other},
        r"allowed here: \[12, 7\]": {**good, "input_ids": good["input_ids"][:, :-1].contiguous()},
        "position 0 has a token id outside 0 to 39": {**good, "ids": far},
        "position 1 has a token twice": {**good, "ids": twice},
        "probabilities that add up to more than 1": {**good, "log_probs": loud},
        "a value that is not finite": {**good, "log_probs": broken},
    }
    described = describe(side_of(data, "llama"), "causal_lm", "toy", K, "import")

    def import_and_write() -> None:
        answers = import_answers(tmp_path / "a.safetensors", data)
        write_answers(tmp_path / "s", described, 0, 1, lambda rows: answers)

    for words, tensors in cases.items():
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=words) as caught:
            import_and_write()
        assert "\n" not in str(caught.value)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"got \.csv; allowed: \.safetensors, \.parquet"):
        import_answers(tmp_path / "a.csv", data)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        import_answers(tmp_path / "a.parquet", data)
