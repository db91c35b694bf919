"""Cached arrays are the computed ones, and a broken file is found, named and replaced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlkd.teachers.cache import Arrays, Spec, cached_arrays, digest_tensors

SPECS: dict[str, Spec] = {"logits": ((4, 3), "float32"), "tokens": ((4,), "int32")}


class Source:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0
        self.said: list[str] = []

    def fill(self, arrays: Arrays) -> None:
        self.count += 1
        for row in range(4):
            arrays["logits"][row] = row + 0.5
        arrays["tokens"][:] = np.arange(4)

    def arrays(self, **key: str) -> dict[str, Tensor]:
        return cached_arrays("test", key, SPECS, self.fill, self.said.append)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    return Source()


def files(tmp_path: Path, name: str) -> list[Path]:
    return sorted((tmp_path / "cache").glob(f"*/{name}"))


def test_arrays_are_computed_once_and_mapped(source: Source, tmp_path: Path) -> None:
    first, second = source.arrays(teacher="a"), source.arrays(teacher="a")
    assert source.count == 1
    assert first["logits"].dtype == torch.float32
    for arrays in (first, second):
        torch.testing.assert_close(arrays["logits"], torch.arange(4.0)[:, None].expand(4, 3) + 0.5)
        assert arrays["tokens"].tolist() == [0, 1, 2, 3]
    before = files(tmp_path, "logits.npy")[0].read_bytes()
    second["logits"].zero_()
    assert files(tmp_path, "logits.npy")[0].read_bytes() == before
    assert not source.said


def test_another_teacher_is_another_entry(source: Source, tmp_path: Path) -> None:
    source.arrays(teacher="a", data="x")
    source.arrays(teacher="b", data="x")
    assert source.count == 2
    assert len(files(tmp_path, "card.json")) == 2


@pytest.mark.parametrize("damage", ["torn", "altered", "missing", "card"])
def test_a_broken_file_is_named_and_rebuilt(source: Source, tmp_path: Path, damage: str) -> None:
    source.arrays(teacher="a")
    path = files(tmp_path, "card.json" if damage == "card" else "logits.npy")[0]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[: len(content) // 2])
    arrays = source.arrays(teacher="a")
    assert source.count == 2
    assert len(source.said) == 1
    assert str(path) in source.said[0]
    assert arrays["logits"][3, 0] == 3.5
    source.arrays(teacher="a")
    assert source.count == 2


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
