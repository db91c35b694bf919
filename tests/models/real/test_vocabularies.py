"""Pretrained language models of one tokenizer whose vocabularies are padded to different sizes."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from rlkd.cli.main import main
from rlkd.compression.real.student_folder import load_module_student
from rlkd.data.anchors import Anchors
from rlkd.data.examples import PADDING_MASK, TokenExamples
from rlkd.data.rows import ColumnConfig
from rlkd.errors import UserError
from rlkd.io.files import read_json
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.sides import Side, Sources, load_student, load_teacher
from rlkd.teachers.real.token_signals import token_signals

tiny_models.need_transformers()
LETTERS = ["<|endoftext|>", "\u0120", *sorted(set("".join(tiny_models.WORDS)))]  # the second stands for a space
V = len(LETTERS)
SIZES = [(V + 9, V + 4), (V + 4, V + 9), (V + 9, V), (V, V + 1)]  # of the teacher and of the student


def save(folder: Path, vocabulary: int, layers: int, has_tokenizer: bool = True, **changes: Any) -> Any:
    model = tiny_models.tiny("qwen2", seed=layers, layers=layers, vocab_size=vocabulary, **changes)
    model.save_pretrained(folder)
    if has_tokenizer:
        save_tokenizer(folder, LETTERS)
    return model


def save_tokenizer(folder: Path, letters: list[str]) -> None:
    """Qwen's own class, one token a letter."""
    made = tiny_models.need_transformers().Qwen2Tokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    made.save_pretrained(folder)


def write_texts(folder: Path) -> Path:
    words = tiny_models.WORDS
    lines = (" ".join(words[(i + j * j) % len(words)] for j in range(4 + i % 7)) for i in range(60))
    (folder / "novel.txt").write_text("\n".join(lines))
    return folder / "novel.txt"


def both(folder: Path, student: str = "small") -> tuple[Side, Side]:
    given = Sources(
        teacher=str(folder / "large"),
        student=str(folder / student),
        data=str(write_texts(folder)),
        columns=ColumnConfig(max_length=8),
        cut=StudentCut(),
        attach=AttachConfig(),
        device_map=None,
        allow_pickle=False,
    )
    teacher = load_teacher(given, "causal_lm")
    return load_student(given, "causal_lm", teacher, 0)


@pytest.mark.parametrize(("large", "small"), SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_common_part_is_distilled(
    caplog: pytest.LogCaptureFixture, large: int, small: int, tied: bool, tmp_path: Path
) -> None:
    teacher = save(tmp_path / "large", large, 3)
    original = save(tmp_path / "small", small, 2, tie_word_embeddings=tied)
    student, side = both(tmp_path)
    common = min(large, small)
    (line,) = (line for line in caplog.messages if "are distilled" in line)
    assert f"has {small} tokens, the teacher's {large}, their tokenizer {V}; the first {common} are distilled" in line
    assert line in student.data.report
    assert student.data is side.data
    assert (student.data.num_classes, student.plan.num_classes, side.plan.num_classes) == (common, common, large)

    inputs = student.data.batch(student.data.few())
    with torch.no_grad():
        answers = student.model(**inputs).logits  # [B, L, V]
        torch.testing.assert_close(answers, original(**inputs).logits[..., :common])
        log_p = teacher(**inputs).logits[:, :-1, :common].log_softmax(-1)
    assert isinstance(student.data, TokenExamples)
    signals = token_signals(side.model, side.plan, [], student.data, common, Anchors(float(common), 1.0))
    ids, real = inputs["input_ids"], inputs[PADDING_MASK].bool()
    nats = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    kept = signals.losses[student.data.few()][:, : nats.shape[1]]
    torch.testing.assert_close(kept[real[:, 1:]], nats[real[:, 1:]])
    assert int(signals.tokens.indices.max()) == common - 1


@pytest.mark.slow
def test_a_pair_becomes_a_shipped_student(tmp_path: Path) -> None:
    save(tmp_path / "large", V + 4, 3)
    save(tmp_path / "small", V + 9, 2)
    tiny_models.save_policy(tmp_path / "policy")
    models = ["--teacher", str(tmp_path / "large"), "--student", str(tmp_path / "small")]
    quick = ["--num_windows", "1", "--train.steps_per_window", "2", "--train.batch_size", "4", "--tokens.top_k", "5"]
    files = ["--policy", str(tmp_path / "policy"), "--data", str(write_texts(tmp_path)), "--out", str(tmp_path / "run")]
    assert main(["distil", *files, *models, *quick, "--columns.max_length", "8"]) == 0
    assert read_json(tmp_path / "run" / "result.json", "")["methods"]["policy"]["shipped_difference"] < 1e-4
    assert f"the first {V + 4} are distilled" in (tmp_path / "run" / "mapping.txt").read_text()
    assert load_module_student(tmp_path / "run" / "student").shipment.num_classes == V + 4
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_pairs_that_may_differ_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "large", V + 4, 3)
    save(tmp_path / "small", V + 9, 2, has_tokenizer=False)
    with pytest.raises(UserError, match="put the student's tokenizer into its folder") as error:
        both(tmp_path)
    assert "\n" not in str(error.value)
    save_tokenizer(tmp_path / "small", [*LETTERS, "z"])
    with pytest.raises(UserError, match="teacher and student differ"):
        both(tmp_path)
    save(tmp_path / "short", V - 1, 2)
    with pytest.raises(UserError, match=rf"has {V - 1} tokens, the teacher's {V + 4}, the tokenizer {V}; give"):
        both(tmp_path, "short")


def test_a_configuration_of_another_vocabulary_is_taken(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    save(tmp_path / "large", V + 4, 3)
    save(tmp_path / "fresh", V, 2).config.to_json_file(tmp_path / "small.json", use_diff=False)
    student, _ = both(tmp_path, "small.json")
    assert student.data.num_classes == student.plan.num_classes == V
    assert any("are distilled" in line for line in caplog.messages)
