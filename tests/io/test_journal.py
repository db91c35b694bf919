import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rlkd.errors import UserError
from rlkd.io.journal import FOLDER, NAME, Arrays, Journal, digest, recall
from rlkd.io.records import JsonLines

SHAPES = {"score": ("float64", (3,)), "diverged": ("bool", (3,))}


def reached(value: float) -> Callable[[], Arrays]:
    return lambda: {"score": np.array([value, 1 / 3, -0.0]), "diverged": np.array([True, False, value > 1])}


def never() -> Arrays:
    raise AssertionError("it is known already")


def fill(folder: Path, count: int) -> Journal:
    journal = Journal(folder)
    for i in range(count):
        journal.arrays("batch", {"seed": i}, SHAPES, reached(i))
    return journal


def test_a_resumed_run_is_answered_to_the_bit_and_then_goes_on(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    journal = Journal(tmp_path, resume=True)
    for i in range(2):
        assert journal.replaying
        known = journal.arrays("batch", {"seed": i}, SHAPES, never)
        for name, array in reached(i)().items():
            assert known[name].tobytes() == array.tobytes()
            assert known[name].dtype == array.dtype
    assert not journal.replaying
    journal.arrays("batch", {"seed": 2}, SHAPES, reached(2))
    again = Journal(tmp_path, resume=True)
    for i in range(3):
        again.arrays("batch", {"seed": i}, SHAPES, never)
    assert not again.replaying
    assert recall(None, "batch", {}, shapes=SHAPES, compute=reached(5))["score"][0] == 5


@pytest.mark.parametrize("length", [-1, -40, -200])
def test_a_torn_last_entry_is_dropped_and_made_anew(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, length: int
) -> None:
    fill(tmp_path, 3)
    file = tmp_path / FOLDER / NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:length])
    journal = Journal(tmp_path, True)
    assert caplog.messages == [f"{file}: entry 3 is torn or altered; computing it anew"]
    for i in range(2):
        journal.arrays("batch", {"seed": i}, SHAPES, never)
    journal.arrays("batch", {"seed": 2}, SHAPES, reached(2))
    mended = [json.loads(line.split(b" ", 1)[1]) for line in file.read_bytes().splitlines()]
    wanted = [json.loads(line.split(b" ", 1)[1]) for line in whole.splitlines()]
    assert [e["arrays"] for e in mended] == [e["arrays"] for e in wanted]


def test_what_follows_an_altered_entry_is_not_trusted(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    fill(tmp_path, 4).save_state(1, {"x": torch.zeros(1)}, {})
    file = tmp_path / FOLDER / NAME
    lines = file.read_bytes().splitlines(keepends=True)
    for altered in (
        [lines[0], lines[1].replace(b"batch", b"botch"), *lines[2:]],
        [lines[0], *lines[2:]],  # one is gone
        [lines[0], lines[2], lines[1], lines[3]],
    ):
        file.write_bytes(b"".join(altered))
        journal = Journal(tmp_path, True)
        assert caplog.messages[0].endswith("entry 2 is torn or altered; computing it anew")
        assert "belongs to entries of the journal that are lost" in caplog.messages[1]
        journal.arrays("batch", {"seed": 0}, SHAPES, never)
        assert not journal.replaying


@pytest.mark.parametrize(("label", "inputs"), [("batch", {"seed": 9}), ("other", {"seed": 0})])
def test_another_question_is_an_error_that_names_the_entry(tmp_path: Path, label: str, inputs: dict[str, int]) -> None:
    fill(tmp_path, 1)
    with pytest.raises(UserError, match=rf"entry 1 is 'batch', this run asks for '{label}' with other inputs"):
        Journal(tmp_path, resume=True).arrays(label, inputs, SHAPES, never)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": "float32"}, "score is 'float32'"),
        ({"shape": [2]}, r"score is 'float64' \[2\]; expected float64 \[3\]"),
        ({"base64": "AAAA"}, "score has 3 bytes"),
        ({"base64": "?"}, "start anew in another folder"),
        ({"base64": None}, "start anew in another folder"),
    ],
)
def test_an_answer_of_another_kind_is_refused(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    """Soundly written by somebody else, as far as checksums tell."""
    journal = fill(tmp_path, 1)
    file = tmp_path / FOLDER / NAME
    entry = json.loads(file.read_bytes().split(b" ", 1)[1])
    entry["arrays"]["score"].update(changed)
    journal._chain = ""
    body = json.dumps(entry).encode() + b"\n"
    file.write_bytes(journal._sum(body).encode() + b" " + body)
    with pytest.raises(UserError, match=rf"entry 1 is damaged \(.*{words}"):
        Journal(tmp_path, resume=True).arrays("batch", {"seed": 0}, SHAPES, never)


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path).arrays("batch", {}, SHAPES, reached(float("nan")))
    with pytest.raises(UserError, match="score holds a non-finite value"):
        Journal(tmp_path, resume=True).arrays("batch", {}, SHAPES, never)


def test_logs_are_cut_back_to_what_the_last_entry_saw_and_silent_until_then(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    events = tmp_path / "tensorboard" / "events.out.tfevents.1"

    def run(journal: Journal, stop: int) -> None:
        rows = JsonLines(tmp_path / "metrics.jsonl", journal)
        for i in range(4):
            journal.arrays("batch", {"seed": i}, SHAPES, reached(i))
            if i == stop:
                return
            rows.write({"row": i})
            if not journal.replaying:
                events.write_bytes(events.read_bytes() + b"%d" % i if events.exists() else b"0")

    run(Journal(tmp_path), 2)  # row 1 stands there, row 2 is missing
    (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes() + b'{"row": 2}\n{"ro')
    (tmp_path / "tensorboard" / "events.out.tfevents.2").write_bytes(b"of after the last entry")
    (tmp_path / "other.txt").write_text("no log")
    run(Journal(tmp_path, resume=True), 9)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f'{{"row": {i}}}\n' for i in range(4))
    assert events.read_bytes() == b"0123"
    assert not (tmp_path / "tensorboard" / "events.out.tfevents.2").exists()
    assert (tmp_path / "other.txt").exists()


def test_a_log_that_is_a_link_out_of_the_run_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("of great value")
    folder = tmp_path / "run"
    folder.mkdir()
    fill(folder, 1)
    (folder / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(UserError, match="leads out of"):
        Journal(folder, resume=True)
    assert mine.read_text() == "of great value"


def test_a_state_counts_until_the_next_entry(tmp_path: Path) -> None:
    journal = fill(tmp_path, 1)
    for step in (1, 2):
        journal.save_state(step, {"x": torch.tensor([float(step)])}, {"step": step})
    resumed = Journal(tmp_path, resume=True)
    assert resumed.replaying
    resumed.arrays("batch", {"seed": 0}, SHAPES, never)
    assert resumed.replaying  # the state is still to be taken
    saved = resumed.take_state()
    assert saved is not None
    assert saved.note["state"] == {"step": 2}
    assert not resumed.replaying
    resumed.arrays("training", {}, SHAPES, reached(1))
    later = Journal(tmp_path, resume=True)
    for label, inputs in (("batch", {"seed": 0}), ("training", {})):
        later.arrays(label, inputs, SHAPES, never)
    assert not later.replaying
    assert later.take_state() is None
    assert not list((tmp_path / FOLDER).glob("*.ckpt"))  # or a new training's would look older


def test_the_end_is_known(tmp_path: Path) -> None:
    journal = fill(tmp_path, 1)
    journal.save_state(1, {"x": torch.zeros(1)}, {})
    (tmp_path / "timing.jsonl").write_text("{}\n")
    journal.finish()
    (tmp_path / "timing.jsonl").write_text("{}\n{}\n")
    assert Journal(tmp_path, resume=True).finished
    assert (tmp_path / "timing.jsonl").read_text() == "{}\n{}\n"  # nothing of a finished run is touched
    assert not list((tmp_path / FOLDER).glob("*.ckpt"))


def test_the_time_of_all_parts_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rlkd.io.journal.time.perf_counter", lambda: now)
    journal = Journal(tmp_path)
    now = 107.0
    journal.arrays("batch", {}, SHAPES, reached(0))
    now = 150.0  # lost
    monkeypatch.setattr("rlkd.io.journal.time.perf_counter", lambda: now)
    resumed = Journal(tmp_path, resume=True)
    assert resumed.elapsed_s() == pytest.approx(7.0)
    assert resumed.last_entry_s == pytest.approx(7.0)


def test_a_digest_tells_tensors_apart() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    assert digest(a) == digest(a.clone())
    assert len({digest(a), digest(b), digest(a.double()), digest(a, b), digest(b, a)}) == 5
