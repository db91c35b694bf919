"""Cached arrays are the computed ones, and a broken file is found, named and replaced."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlkd.io.cache import Arrays, Spec, cached_arrays, digest_tensors

SPECS: dict[str, Spec] = {"logits": ((4, 3), "float32"), "tokens": ((4,), "int32")}


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def sign(path: Path) -> None:
    """Make the card's checksum of an array right again."""
    card = path.parent / "card.json"
    table = json.loads(card.read_text())
    table["sha256"][path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    card.write_text(json.dumps(table))


class Source:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def fill(self, arrays: Arrays) -> None:
        self.count += 1
        for row in range(4):
            arrays["logits"][row] = row + 0.5
        arrays["tokens"][:] = np.arange(4)

    def arrays(self, **key: str) -> dict[str, Tensor]:
        return cached_arrays("test", key, SPECS, self.fill)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    return Source()


def files(tmp_path: Path, name: str) -> list[Path]:
    return sorted((tmp_path / "cache").glob(f"*/{name}"))


def test_arrays_are_computed_once_and_mapped(caplog: pytest.LogCaptureFixture, source: Source, tmp_path: Path) -> None:
    first, second = source.arrays(teacher="a"), source.arrays(teacher="a")
    assert source.count == 1
    assert first["logits"].dtype == torch.float32
    for arrays in (first, second):
        torch.testing.assert_close(arrays["logits"], torch.arange(4.0)[:, None].expand(4, 3) + 0.5)
        assert arrays["tokens"].tolist() == [0, 1, 2, 3]
    before = files(tmp_path, "logits.npy")[0].read_bytes()
    second["logits"].zero_()
    assert files(tmp_path, "logits.npy")[0].read_bytes() == before
    assert not caplog.messages


def test_another_teacher_is_another_entry(source: Source, tmp_path: Path) -> None:
    source.arrays(teacher="a", data="x")
    source.arrays(teacher="b", data="x")
    assert source.count == 2
    assert len(files(tmp_path, "card.json")) == 2


@pytest.mark.parametrize("damage", ["torn", "altered", "missing", "card", "huge", "pickle", "link", "pipe", "file"])
def test_a_broken_file_is_named_and_rebuilt(
    caplog: pytest.LogCaptureFixture, source: Source, tmp_path: Path, damage: str
) -> None:
    source.arrays(teacher="a")
    path = files(tmp_path, "card.json" if damage == "card" else "logits.npy")[0]
    content = path.read_bytes()
    if damage in ("missing", "link", "pipe"):
        path.unlink()
    if damage == "link":
        (tmp_path / "outside").write_bytes(content)  # sound, but elsewhere
        path.symlink_to(tmp_path / "outside")
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "huge":  # a shape that no memory holds
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 3), }"
        path.write_bytes(content.replace(content[10 : content.index(b"\n")], header.ljust(117).encode()))
    elif damage == "pickle":
        with path.open("wb") as file:
            np.save(file, np.array([Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
        sign(path)
    elif damage == "file":
        folder = path.parent
        shutil.rmtree(folder)
        folder.write_bytes(b"")
        path = folder / "card.json"
    elif damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage in ("torn", "card"):
        path.write_bytes(content[: len(content) // 2])
    arrays = source.arrays(teacher="a")
    assert source.count == 2
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert arrays["logits"][3, 0] == 3.5
    assert not (tmp_path / "ran").exists()
    source.arrays(teacher="a")
    assert source.count == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing is left behind


def test_an_interrupted_computation_leaves_nothing(source: Source, tmp_path: Path) -> None:
    def stop(arrays: Arrays) -> None:
        arrays["logits"][0] = 1.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_arrays("test", {"teacher": "a"}, SPECS, stop)
    assert list((tmp_path / "cache").iterdir()) == []
    assert source.arrays(teacher="a")["logits"][0, 0] == 0.5


def test_the_digest_sees_names_shapes_and_values() -> None:
    base = digest_tensors([("a", torch.arange(6.0))])
    others = [
        [("b", torch.arange(6.0))],
        [("a", torch.arange(6.0).reshape(2, 3))],
        [("a", torch.arange(6))],
        [("a", torch.arange(6.0) + 1)],
    ]
    assert base == digest_tensors([("a", torch.arange(6.0))])
    assert len({base, *(digest_tensors(other) for other in others)}) == 5
    digest_tensors([("scalar", torch.tensor(3.0)), ("half", torch.ones(2, dtype=torch.bfloat16))])


def test_the_pickle_that_is_refused_is_live(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    np.load(path, allow_pickle=True)
    assert (tmp_path / "ran").exists()


BOTH = """
import sys
import numpy as np
from rlkd.io.cache import cached_arrays
mine = int(sys.argv[1])
specs = {name: ((2000, 8), "float32") for name in "abc"}
def fill(arrays):
    for array in arrays.values():
        array[:] = mine
print("ready", flush=True)
for line in sys.stdin:  # the number of the next entry, so that both begin it at the same time
    seen = cached_arrays("raced", {"entry": line.split()[0]}, specs, fill)
    values = sorted({float(v) for tensor in seen.values() for v in tensor.unique()})
    print(*values, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["empty", "broken"])
def test_two_processes_that_want_the_same_arrays_never_see_a_torn_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    runs = [
        subprocess.Popen([sys.executable, "-c", BOTH, mine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for mine in "12"
    ]
    specs: dict[str, Spec] = dict.fromkeys("abc", ((2000, 8), "float32"))
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for entry in range(25):
        if broken:
            cached_arrays("raced", {"entry": str(entry)}, specs, lambda arrays: None)
            before = set(files(tmp_path, "b.npy"))
            newest = max(before, key=lambda path: path.stat().st_mtime_ns)
            newest.write_bytes(newest.read_bytes()[:-100])
        for run in runs[:: 1 if entry % 2 else -1]:  # each is the first to be told half of the times
            assert run.stdin is not None
            run.stdin.write(f"{entry}\n")
            run.stdin.flush()
        for run in runs:
            assert run.stdout is not None
            values = run.stdout.readline().split()
            assert len(values) == 1, values  # of one writer, whole
            assert values[0] in ("1.0", "2.0")
    for run in runs:
        run.communicate()
        assert run.returncode == 0
    assert len(list((tmp_path / "cache").iterdir())) == 25
