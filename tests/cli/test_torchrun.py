"""`torchrun --nproc_per_node 2 -m rlkd distil` is one process's run, and goes on after a stop."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file

from rlkd.cli.main import main

V = len(tiny_models.WORDS) + 3
STOPPED = """
import sys
from rlkd.cli.main import main
from rlkd.io.journal import Journal
save = Journal.save_state
def stop(self, step, tensors, note):
    save(self, step, tensors, note)
    if step == 2:
        raise KeyboardInterrupt
Journal.save_state = stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_models.need_transformers()
    pytest.importorskip("accelerate", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
    tiny_models.save_policy(tmp_path / "policy")
    tiny_models.tiny("llama", layers=3, vocab_size=V).save_pretrained(tmp_path / "llama")
    tiny_models.save_causal_tokenizer(tmp_path / "llama")
    small = tiny_models.tiny("llama", layers=2, vocab_size=V, hidden_size=16, intermediate_size=24).config
    small.to_json_file(tmp_path / "small.json", use_diff=False)
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(tiny_models.WORDS, k=draw.randint(4, 20)))} for _ in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "stopped.py").write_text(STOPPED)
    return tmp_path


def options(place: Path) -> list[str]:
    return [
        *("--policy", str(place / "policy"), "--teacher", str(place / "llama"), "--data", str(place / "texts.jsonl")),
        *("--student", str(place / "small.json"), "--num_windows", "3", "--train.steps_per_window", "2"),
        *("--train.batch_size", "8", "--train.learning_rate", "1e-3", "--tokens.top_k", "5"),
        *("--cost.batch_size", "4", "--cost.batches", "[]"),
    ]


def torchrun(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = {"OMP_NUM_THREADS": "1", "RLKD_CACHE": str(place / "cache")}
    return subprocess.run(
        [*call, *command], env={**os.environ, **settings}, capture_output=True, text=True, timeout=500, cwd=place
    )


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_after_a_stop(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = torchrun(place, "-m", "rlkd", "distil", *options(place), "--out", "two")
    assert done.returncode == 0, done.stderr[-6000:]
    monkeypatch.setenv("RLKD_CACHE", str(place / "cache"))
    profile = ["--cost.profile", str(place / "two" / "cost_profile.json")]
    assert main(["distil", *options(place), *profile, "--out", str(place / "one")]) == 0
    one, two = (
        [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert one[0]["accuracy"] != one[-1]["accuracy"]

    stopped = torchrun(place, "stopped.py", "distil", *options(place), *profile, "--out", "again")
    assert stopped.returncode != 0
    assert "go on with: rlkd distil --resume again" in stopped.stderr
    assert len((place / "again" / "metrics.jsonl").read_text().splitlines()) == 2
    resumed = torchrun(place, "-m", "rlkd", "distil", "--resume", "again")
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert (place / "again" / "metrics.jsonl").read_bytes() == (place / "two" / "metrics.jsonl").read_bytes()
    lost = torchrun(place, "-m", "rlkd", "distil", "--resume", "gone")
    assert lost.returncode != 0
    assert "rlkd: --resume: gone holds no config.yaml" in lost.stderr


@pytest.mark.slow
def test_sharded_weights_change_nothing_and_any_number_of_processes_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher are sharded; the teacher stays beside the student, and the range test runs, too."""
    beside = ["--tokens.teacher_in_memory", "true"]
    common = [*options(place), *beside]
    common[common.index("1e-3")] = "0"
    shards = ["--train.shard", "true", "--teacher_shard", "true"]
    done = torchrun(place, "-m", "rlkd", "distil", *common, *shards, "--out", "two")
    assert done.returncode == 0, done.stderr[-6000:]
    profile = ["--cost.profile", str(place / "two" / "cost_profile.json")]
    stopped = torchrun(place, "stopped.py", "distil", *common, *shards, *profile, "--out", "again")
    assert "go on with: rlkd distil --resume again" in stopped.stderr
    shutil.copytree(place / "again", place / "alone")
    state = b"".join(path.read_bytes() for path in (place / "again" / "checkpoints").iterdir())
    assert b"students.module.model.model.layers.1." in state
    assert b"layers.2." not in state  # the teacher's third block
    resumed = torchrun(place, "-m", "rlkd", "distil", "--resume", "again")
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert (place / "again" / "metrics.jsonl").read_bytes() == (place / "two" / "metrics.jsonl").read_bytes()

    monkeypatch.setenv("RLKD_CACHE", str(place / "other"))
    monkeypatch.chdir(place)
    assert main(["distil", *common, *profile, "--out", str(place / "one")]) == 0
    assert main(["distil", "--resume", str(place / "alone")]) == 0
    rows = {
        name: [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two", "alone")
    }
    for name in ("two", "alone"):
        assert len(rows[name]) == len(rows["one"]) == 3
        for a, b in zip(rows["one"], rows[name], strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    weights = [load_file(next((place / name / "student/model").glob("*.safetensors"))) for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5
    results = [json.loads((place / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["speedup_over_teacher"] > 0
    assert results[1]["speedup_over_teacher"] is None  # a sharded teacher is not timed
