"""`rlkd signals` and `rlkd distil --teacher_signals`, `--teacher_url`: the teacher's weights are elsewhere."""

import importlib.util
import json
import random
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from refusals import check_refusals
from safetensors.torch import load_file

from rlkd.cli.main import main

V = len(tiny_models.WORDS) + 3
QUICK = [
    *(
        "--num_windows",
        "2",
        "--train.steps_per_window",
        "2",
        "--train.batch_size",
        "4",
        "--train.learning_rate",
        "1e-3",
    ),
    *("--cost.batch_size", "4", "--cost.batches", "[]", "--columns.max_length", "8"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a teacher, its folder without weights, a student's configuration and texts."""
    tiny_models.need_transformers()
    folder = tmp_path_factory.mktemp("place")
    tiny_models.save_policy(folder / "policy")
    tiny_models.tiny("llama", layers=3, vocab_size=V).save_pretrained(folder / "llama")
    tiny_models.save_causal_tokenizer(folder / "llama")
    shutil.copytree(folder / "llama", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    small = tiny_models.tiny("llama", layers=2, vocab_size=V, hidden_size=16, intermediate_size=24).config
    small.to_json_file(folder / "small.json", use_diff=False)
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(tiny_models.WORDS, k=draw.randint(4, 20)))} for _ in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def signals(place: Path, out: Path, *options: str, teacher: str = "llama") -> int:
    data = ["--data", str(place / "texts.jsonl"), "--columns.max_length", "8", "--top_k", "5"]
    return main(["signals", "--teacher", str(place / teacher), *data, "--out", str(out), *options])


def distil(place: Path, out: Path, *options: str, teacher: str = "bare") -> int:
    given = ["--policy", str(place / "policy"), "--teacher", str(place / teacher), "--data", str(place / "texts.jsonl")]
    return main(["distil", *given, "--student", str(place / "small.json"), *QUICK, "--out", str(out), *options])


def result_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text())["methods"]["policy"])


@pytest.mark.slow
def test_a_student_of_stored_answers_and_of_a_server(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers"
    assert signals(place, out, "--shard", "2/2") == 0
    assert "other shards are still missing" in capsys.readouterr().out
    assert signals(place, out, "--shard", "1/2") == 0
    assert f"5 of {V} a position" in (printed := capsys.readouterr().out)
    assert "answers: complete" in printed
    assert signals(place, out, "--shard", "1/2") == 0
    assert "there already" in capsys.readouterr().out

    assert distil(place, tmp_path / "a", "--teacher_signals", str(out)) == 0
    figures = result_of(tmp_path / "a")
    assert figures["macs_of_teacher"] > figures["macs_of_dense_student"] > 0
    mapping = (tmp_path / "a" / "mapping.txt").read_text()
    assert "forward KL over the teacher's 5 likeliest tokens" in mapping
    assert main(["verify", str(tmp_path / "a")]) == 0

    server = _server()
    server.model = tiny_models.tiny("llama", layers=3, vocab_size=V)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        same = ["--teacher_url", server.url, "--tokens.top_k", "5"]
        profile = ["--cost.profile", str(tmp_path / "a" / "cost_profile.json")]
        assert distil(place, tmp_path / "b", *same, *profile) == 0
        num_asked = len(server.requests)
        assert distil(place, tmp_path / "c", *same, *profile) == 0
        assert len(server.requests) == num_asked > 0  # the cache has them
    finally:
        server.shutdown()
        server.server_close()
    a, b = (load_file(next((tmp_path / name / "student" / "model").glob("*.safetensors"))) for name in ("a", "b"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    assert result_of(tmp_path / "b")["teacher_perplexity"] == pytest.approx(figures["teacher_perplexity"], rel=1e-4)


def _server() -> Any:
    """The local server of the tests of its client."""
    path = Path(__file__).parents[1] / "teachers" / "real" / "test_server.py"
    spec = importlib.util.spec_from_file_location("completion_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["completion_server"] = module
    spec.loader.exec_module(module)
    return module.Teacher()


def test_each_process_of_torchrun_writes_its_shard(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in (("1", "shard 2 of 2: written"), ("0", "shard 1 of 2: written")):
        monkeypatch.setenv("RANK", rank)
        assert signals(place, out) == 0
        assert words in capsys.readouterr().out
    assert len(json.loads((out / "index.json").read_text())["shards"]) == 2


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert signals(place, tmp_path / "answers") == 0
    stored = ["--teacher_signals", str(tmp_path / "answers")]
    cases: dict[str, tuple[list[str], list[str]]] = {
        "none": (["--teacher_signals", str(tmp_path / "gone")], ["has no index.json", "rlkd signals"]),
        "length": ([*stored, "--columns.max_length", "7"], ["differ"]),
        "both": ([*stored, "--teacher_url", "http://x"], ["got both"]),
        "weights": ([*stored, "--tokens.teacher_in_memory", "true"], ["which need the teacher's weights"]),
        "no student": ([*stored, "--student", ""], ["got none with a teacher without weights", "--student"]),
        "server": (["--teacher_url", "localhost"], ["teacher_url: got 'localhost'"]),
    }
    check_refusals(lambda name, options: distil(place, tmp_path / name, *options), cases, capsys)
    assert signals(place, tmp_path / "b", "--shard", "3/2") == 2
    assert "--shard: got '3/2'; allowed: I/N" in capsys.readouterr().err
    assert signals(place, tmp_path / "b", "--import_file", "gone.safetensors", teacher="bare") == 2
    assert "gone.safetensors: no such file" in capsys.readouterr().err
