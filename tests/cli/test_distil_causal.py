"""`rlkd distil --data` on tiny language models: from text files to a shipped student."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from refusals import check_refusals

from rlkd.agents.evaluation.report import read_run
from rlkd.cli.main import main
from rlkd.compression.real.student_folder import load_module_student
from rlkd.data.rows import ColumnConfig
from rlkd.data.texts import make_token_examples, read_texts

QUICK = [
    *("--num_windows", "2", "--train.steps_per_window", "2"),
    *("--train.batch_size", "4", "--cost.batch_size", "4", "--cost.batches", "[]"),
    *("--train.learning_rate", "5e-5"),
]
FEW = ["--tokens.top_k", "5"]
V = len(tiny_models.WORDS) + 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a teacher, a student's configuration and texts."""
    tiny_models.need_transformers()
    folder = tmp_path_factory.mktemp("place")
    tiny_models.save_policy(folder / "policy")
    tiny_models.tiny("llama", layers=3, vocab_size=V, tie_word_embeddings=True).save_pretrained(folder / "llama")
    tiny_models.save_causal_tokenizer(folder / "llama")
    small = tiny_models.tiny("llama", layers=2, vocab_size=V, hidden_size=16, intermediate_size=24).config
    small.to_json_file(folder / "small.json", use_diff=False)
    draw = random.Random(0)
    rows = []
    for i in range(60):
        words = " ".join(draw.choice(tiny_models.WORDS) for _ in range(draw.randint(4, 20)))
        rows.append({"text": words, "question": "the film was", "source": f"book {i // 2}"})
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "novel.txt").write_text("\n".join(row["text"] for row in rows))
    return folder


def distil(place: Path, out: Path, *options: str) -> int:
    given = ["--policy", str(place / "policy"), "--teacher", str(place / "llama"), "--out", str(out)]
    return main(["distil", *given, *QUICK, *FEW, *options])


def figures_of(out: Path) -> dict[str, Any]:
    result = read_run(out).result
    assert result is not None
    return dict(result["methods"]["policy"])


def test_a_student_cut_from_its_teacher_to_a_shipped_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(place / "texts.jsonl"), "--columns.max_length", "8"]
    assert distil(place, tmp_path / "a", *data, "--cut.layers", "2") == 0
    figures = figures_of(tmp_path / "a")
    assert figures["compacted_accuracy"] == pytest.approx(figures["accuracy"], abs=1e-5)
    expected = min(1.0, max(0.0, 1 - math.log(figures["perplexity"]) / math.log(V)))
    assert figures["accuracy"] == pytest.approx(expected, abs=1e-5)
    assert len(figures["exit_perplexities"]) == 2
    assert figures["macs_of_dense_student"] < figures["macs_of_teacher"]
    mapping = (tmp_path / "a" / "mapping.txt").read_text()
    assert "model.layers.1" in mapping
    assert f"perplexity {V} counts as 0, 1 as 1" in mapping
    assert "forward KL over the teacher's 5 likeliest tokens" in mapping
    assert "perplexity" in capsys.readouterr().out

    student = load_module_student(tmp_path / "a" / "student")
    t = tiny_models.need_transformers()
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "a" / "student" / "model")
    columns = ColumnConfig(max_length=8)
    texts = make_token_examples(read_texts(place / "texts.jsonl", columns), tokenizer, V, columns)
    test = texts.splits["test"]
    batch, counted = texts.batch(test), texts.counted[test]
    with torch.no_grad():
        log_q = student(**batch)[:, :-1].log_softmax(-1)
    nats = -log_q.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][counted].mean()
    assert float(nats.exp()) == pytest.approx(figures["perplexity"], rel=1e-4)
    assert figures["num_test_tokens"] == int(counted.sum())
    assert "exits_by_class" not in figures

    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "student perplexity" in capsys.readouterr().out
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    result["methods"]["policy"]["perplexity"] *= 0.9
    (tmp_path / "a" / "result.json").write_text(json.dumps(result))
    assert main(["verify", str(tmp_path / "a")]) == 1


@pytest.mark.slow
def test_a_student_from_a_configuration_on_prompts_and_reverse(place: Path, tmp_path: Path) -> None:
    data = ["--data", str(place / "texts.jsonl"), "--student", str(place / "small.json")]
    options = ["--columns.prompt", "question", "--tokens.divergence", "reverse", "--tokens.worst_perplexity", "30"]
    assert distil(place, tmp_path / "a", *data, *options) == 0
    mapping = (tmp_path / "a" / "mapping.txt").read_text()
    assert "linear 16 -> 32" in mapping
    assert "perplexity 30 counts as 0" in mapping
    assert "reverse KL" in mapping
    assert load_module_student(tmp_path / "a" / "student").model.config.hidden_size == 16  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_teacher_beside_the_student(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(place / "texts.jsonl"), "--student", str(place / "small.json")]
    beside = [*data, "--tokens.divergence", "js", "--tokens.teacher_in_memory", "true"]
    assert distil(place, tmp_path / "a", *beside) == 0
    assert (
        "response is the Jensen-Shannon divergence over the teacher's whole vocabulary"
        in (tmp_path / "a" / "mapping.txt").read_text()
    )
    assert distil(place, tmp_path / "b", *beside, "--teacher_device_map", "auto") == 2
    assert "teacher_device_map, which answers once; leave one out" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_same_seed_and_profile_give_the_same_bytes(place: Path, tmp_path: Path) -> None:
    data = ["--data", str(place / "novel.txt"), "--columns.max_length", "8", "--student", str(place / "small.json")]
    assert distil(place, tmp_path / "a", *data, "--seed", "5") == 0
    profile = ["--cost.profile", str(tmp_path / "a" / "cost_profile.json")]
    assert distil(place, tmp_path / "b", *data, "--seed", "5", *profile) == 0
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("a", "b"))
    assert a == b


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.tiny("llama", vocab_size=V).save_pretrained(tmp_path / "other")
    tiny_models.save_causal_tokenizer(tmp_path / "other", list(reversed(tiny_models.WORDS)))
    tiny_models.tiny("llama", vocab_size=V + 1).save_pretrained(tmp_path / "larger")
    data = ["--data", str(place / "texts.jsonl")]
    cases = {
        "another tokenizer": (
            [*data, "--student", str(tmp_path / "other")],
            ["tokenizers", "'good' (3 against 16)", "give the student"],
        ),
        "another vocabulary": (
            [*data, "--student", str(tmp_path / "larger")],
            [f"has {V + 1} tokens", f"the teacher's {V},", "put the student's tokenizer into its folder"],
        ),
        "no data": (["--data", "gone.txt"], ["gone.txt", "no such data"]),
        "arrays": (["--data", str(place / "small.json"), "--columns.text", "review"], ["no column 'review'"]),
        "top_k": ([*data, "--tokens.top_k", "99"], ["tokens.top_k: got 99", f"1 to {V}"]),
        "anchor": ([*data, "--tokens.best_perplexity", "50"], ["tokens.best_perplexity: got 50"]),
        "cached js": ([*data, "--tokens.divergence", "js"], ["tokens.divergence: got js with cached answers"]),
        "exits": ([*data, "--attach.exits", "[7]"], ["attach.exits"]),
        "classes": ([*data, "--columns.classes", "[a,b]"], ["columns.classes: got it for a language model"]),
    }
    check_refusals(lambda name, options: distil(place, tmp_path / name, *options), cases, capsys)
