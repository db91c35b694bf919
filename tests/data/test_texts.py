"""Texts become pieces that never cross a document; prompts are given, not learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from rlkd.data.examples import TokenExamples
from rlkd.data.rows import ColumnConfig
from rlkd.data.texts import make_token_examples, read_texts
from rlkd.errors import UserError

WORDS = tiny_models.WORDS
VOCABULARY = len(WORDS) + 3


def number(word: str) -> int:
    return WORDS.index(word) + 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tiny_models.need_transformers()
    return tiny_models.save_causal_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def examples(path: Path, tokenizer: Any, **columns: Any) -> TokenExamples:
    config = ColumnConfig(**columns)
    return make_token_examples(read_texts(path, config), tokenizer, VOCABULARY, config)


def save_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def real_tokens(data: TokenExamples, row: int) -> list[int]:
    ids, mask = data.inputs["input_ids"][row], data.inputs["attention_mask"][row]
    assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding stands on the right
    return [int(i) for i in ids[mask.bool()]]


def test_pieces_are_the_documents_and_cross_none(tmp_path: Path, tokenizer: Any) -> None:
    texts = [" ".join(WORDS[i % 14] for i in range(start, start + 3 * start + 2)) for start in range(1, 13)]
    path = save_rows(tmp_path / "a.jsonl", [{"text": text, "source": f"book {i}"} for i, text in enumerate(texts)])
    data = examples(path, tokenizer, max_length=6)
    assert data.inputs["input_ids"].shape[1] == 6
    place = 0
    for text in texts:
        left = tokenizer(text)["input_ids"]
        assert left[0] == 1  # the begin-of-text token, once a document
        while len(left) > 1:
            piece = real_tokens(data, place)
            assert piece == left[:6]
            left, place = left[6:], place + 1
    assert place == len(data.labels)
    assert data.num_classes == VOCABULARY
    sizes = {len(index) for index in data.splits.values()}
    assert 0 not in sizes
    assert sum(len(index) for index in data.splits.values()) == place
    first = torch.stack([data.inputs["input_ids"][:, 0] == 1]).cumsum(1)[0]  # document of every piece, from 1
    owners = [set(first[index].tolist()) for index in data.splits.values()]
    assert not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]


def test_a_rest_of_one_token_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "good bad fine dull", "split": s} for s in ("train", "validation", "test")]
    data = examples(save_rows(tmp_path / "a.jsonl", rows), tokenizer, max_length=4)  # <s> and four words
    assert len(data.labels) == 3
    assert real_tokens(data, 0) == [1, number("good"), number("bad"), number("fine")]
    assert data.counted.tolist() == [[True] * 3] * 3


def test_a_prompt_is_given_and_not_learned(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "the film was", "text": "good", "split": "train"},
        {"prompt": "the plot", "text": "was dull bad poor", "split": "validation"},
        {"prompt": "", "text": "slow", "split": "test"},
    ]
    data = examples(save_rows(tmp_path / "a.jsonl", rows), tokenizer, max_length=6, prompt="prompt")
    assert real_tokens(data, 0) == [1, *(number(w) for w in ("the", "film", "was", "good"))]
    assert data.counted[0].tolist() == [False, False, False, True, False]
    assert real_tokens(data, 1) == [1, *(number(w) for w in ("the", "plot", "was", "dull", "bad"))]  # cut at six
    assert data.counted[1].tolist() == [False, False, True, True, True]
    assert real_tokens(data, 2) == [1, number("slow")]
    assert data.counted[2].tolist() == [True, False, False, False, False]


def test_one_text_file_is_cut_in_order(tmp_path: Path, tokenizer: Any) -> None:
    lines = [WORDS[i % 14] for i in range(40)]
    (tmp_path / "novel.txt").write_text("\n".join(lines))
    data = examples(tmp_path / "novel.txt", tokenizer, max_length=8)
    whole = [
        [token for row in data.splits[split].tolist() for token in real_tokens(data, row) if token != 1]
        for split in ("train", "validation", "test")
    ]
    assert [len(part) for part in whole] == [28, 6, 6]
    assert [token for part in whole for token in part] == [number(w) for w in lines]


def test_a_folder_of_texts(tmp_path: Path, tokenizer: Any) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"good {WORDS[i]}")
    data = examples(tmp_path, tokenizer)
    assert len(data.labels) == 12  # a file a document
    given = tmp_path / "given"
    given.mkdir()
    for split, words in {"train": "good bad", "dev": "fine", "test": "dull"}.items():
        (given / f"{split}.txt").write_text(words)
    data = examples(given, tokenizer)
    assert real_tokens(data, int(data.splits["train"][0])) == [1, number("good"), number("bad")]
    assert real_tokens(data, int(data.splits["validation"][0])) == [1, number("fine")]


def test_mistakes_are_one_line(tmp_path: Path, tokenizer: Any) -> None:
    rows = save_rows(tmp_path / "a.jsonl", [{"text": "good bad", "split": "train"}])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    long = save_rows(tmp_path / "b.jsonl", [{"text": "good", "prompt": "bad fine dull"}])
    null = tmp_path / "c.jsonl"
    null.write_text('{"text": "good"}\n{"text": null}\n')
    (tmp_path / "one.txt").write_text("good bad fine")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "gone.txt", {}, "no such data"),
        (tmp_path / "image.png", {}, "no text was found"),
        (tmp_path / "empty", {}, "no text was found"),
        (tmp_path / "latin.txt", {}, "not UTF-8"),
        (rows, {"text": "review"}, "no column 'review'"),
        (rows, {"prompt": "question"}, "no column 'question'"),
        (tmp_path / "latin.txt", {"prompt": "question"}, "needs a table"),
        (long, {"prompt": "prompt", "max_length": 4}, "row 1: got a prompt of 4"),
        (null, {}, "row 2: has no text"),
        (rows, {}, "no sample is in the"),
        (tmp_path / "one.txt", {}, "no sample is in the"),
    ]
    for path, columns, words in cases:
        with pytest.raises(UserError, match=words) as error:
            examples(path, tokenizer, **columns)
        assert "\n" not in str(error.value)
