"""Data sets that are read from files: hand-made ones here, the real ones where they are installed."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlkd.data import DataSet, load_dataset
from rlkd.data import files as module
from rlkd.data.files import find_file, read_idx, read_rda
from rlkd.data.samples import choose_rows
from rlkd.errors import UserError


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RLKD_DATA with a small Fashion-MNIST: an image's first pixel is its row number, its label that mod 10."""
    for part, count in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        write(tmp_path / "fashion-mnist" / f"{part}-images-idx3-ubyte.gz", idx(images))
        write(tmp_path / "fashion-mnist" / f"{part}-labels-idx1-ubyte.gz", idx(images[:, 0, 0] % 10))
    monkeypatch.setenv("RLKD_DATA", str(tmp_path))
    return tmp_path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_idx_files_are_read(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(read_idx(write(tmp_path / "a.gz", idx(array)), 3), array)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (idx(np.zeros((2, 3), np.uint8)), "beginning with 00000802; allowed: an IDX file that begins with 00000803"),
        (idx(np.zeros((1, 1, 1), np.uint8), kind=13), "beginning with 00000d03"),
        (idx(np.zeros((2, 3, 4), np.uint8))[:-1], r"got 23 bytes after the header; its sizes \[2, 3, 4\] need 24"),
        (idx(np.zeros((2, 3, 4), np.uint8)) + b"x", "got 25 bytes after the header"),
        (idx(np.zeros((2, 3, 4), np.uint8))[:9], "got 9 bytes beginning with 00000803"),
        (b"", "got 0 bytes beginning with nothing"),
    ],
    ids=["labels for images", "floats", "truncated", "too long", "header alone", "empty"],
)
def test_broken_idx_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        read_idx(write(tmp_path / "a.gz", content), 3)
    assert str(tmp_path / "a.gz") in one_line(error)


@pytest.mark.parametrize("length", [5, -5])
def test_truncated_or_foreign_gzip_is_named(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.gz", idx(np.zeros((2, 3, 4), np.uint8)))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="cannot be unpacked"):
        read_idx(path, 3)
    path.write_bytes(b"plain")
    with pytest.raises(UserError, match="cannot be unpacked"):
        read_idx(path, 3)


def test_fashion_mnist_is_cut_and_its_test_split_is_the_official_one(folder: Path) -> None:
    data = load_dataset("fashion_mnist_28x28")
    assert {name: len(index) for name, index in data.splits.items()} == {"train": 40, "validation": 20, "test": 20}
    rows = (data.inputs[:, 0, 0] * 255).round().long()  # [S], written by the fixture
    assert torch.equal(rows % 10, data.labels)
    fit = torch.cat([data.splits["train"], data.splits["validation"]])
    assert rows[fit].sort().values.tolist() == list(range(60))
    assert rows[data.splits["test"]].sort().values.tolist() == list(range(20))
    official = np.frombuffer(
        gzip.decompress((folder / "fashion-mnist/t10k-images-idx3-ubyte.gz").read_bytes())[16:], "u1"
    )
    first = data.splits["test"][0]
    assert np.array_equal((data.inputs[first] * 255).round().numpy(), official.reshape(20, 28, 28)[rows[first]])


def test_pooling_is_a_mean_and_all_sizes_have_the_same_samples(folder: Path) -> None:
    full, half, small = (load_dataset(f"fashion_mnist{suffix}") for suffix in ("_28x28", "", "_8x8"))
    assert [d.input_shape for d in (full, half, small)] == [(28, 28), (14, 14), (8, 8)]
    assert torch.equal(full.labels, half.labels)
    assert torch.equal(full.labels, small.labels)
    assert torch.allclose(half.inputs[:, 1, 2], full.inputs[:, 2:4, 4:6].mean((1, 2)), atol=1e-6)
    assert torch.allclose(small.inputs[:, 1, 7], full.inputs[:, 3:7, 24:28].mean((1, 2)), atol=1e-6)
    assert torch.allclose(small.inputs, F.adaptive_avg_pool2d(full.inputs, 8), atol=1e-6)


def test_mismatched_counts_sizes_and_labels_are_named(folder: Path) -> None:
    labels, images = (folder / "fashion-mnist" / f"t10k-{what}-ubyte.gz" for what in ("labels-idx1", "images-idx3"))
    write(labels, idx(np.zeros(19, np.uint8)))
    with pytest.raises(UserError, match=r"got images \[20, 28, 28\] for 19 labels") as error:
        load_dataset("fashion_mnist")
    assert str(images) in one_line(error)
    write(labels, idx(np.full(20, 10, np.uint8)))
    with pytest.raises(UserError, match="got label 10; allowed: 0 to 9"):
        load_dataset("fashion_mnist")
    write(images, idx(np.zeros((20, 27, 28), np.uint8)))
    with pytest.raises(UserError, match=r"allowed: \[N, 28, 28\]"):
        load_dataset("fashion_mnist")
    write(images, idx(np.zeros((0, 28, 28), np.uint8)))
    write(labels, idx(np.zeros(0, np.uint8)))
    with pytest.raises(UserError, match="N >= 1 labels"):
        load_dataset("fashion_mnist")


def test_missing_files_name_package_path_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FASHION_FOLDER", tmp_path / "default")
    monkeypatch.setenv("RLKD_DATA", str(tmp_path / "own"))
    with pytest.raises(UserError, match="dataset-fashion-mnist") as error:
        load_dataset("fashion_mnist")
    for part in (tmp_path / "own" / "fashion-mnist" / "train-images-idx3-ubyte.gz", tmp_path / "default", "RLKD_DATA"):
        assert str(part) in one_line(error)
    monkeypatch.delenv("RLKD_DATA")
    monkeypatch.setattr(module, "MLBENCH_FOLDER", tmp_path / "default")
    with pytest.raises(UserError, match=r"Satellite\.rda \(RLKD_DATA is not set\): install Debian's r-cran-mlbench"):
        load_dataset("satellite")


def test_the_users_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default, own = write(tmp_path / "default" / "a", b""), write(tmp_path / "own" / "sub" / "a", b"")
    monkeypatch.setenv("RLKD_DATA", str(tmp_path / "own"))
    assert find_file("a", "sub", default.parent, "package") == own
    own.unlink()
    assert find_file("a", "sub", default.parent, "package") == default


def write_frame(path: Path, names: tuple[str, ...] = ("Satellite", "classes"), missing: bool = False) -> Path:
    rdata = pytest.importorskip("rdata", reason="needs the extra: pip install rlkd[data]")
    pandas = pytest.importorskip("pandas")
    rows = np.arange(4500)
    values = {
        "x.1": rows.astype(float),
        "x.2": np.where(missing & (rows == 7), np.nan, 1.0),
        "x.3": (rows >= 4435) * 1e9,
    }
    labels = pandas.Categorical(np.array(["b", "a", "c"])[rows % 3])
    path.parent.mkdir(parents=True, exist_ok=True)
    rdata.write_rda(path, {names[0]: pandas.DataFrame({**values, names[1]: labels})})
    return path


def test_an_r_data_frame_becomes_standardised_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_frame(tmp_path / "mlbench" / "Satellite.rda")
    monkeypatch.setenv("RLKD_DATA", str(tmp_path))
    data = load_dataset("satellite")
    assert {name: len(index) for name, index in data.splits.items()} == {"train": 2000, "validation": 1000, "test": 65}
    assert (data.num_classes, data.input_shape) == (3, (3,))
    first = data.inputs[data.splits["train"], 0].double()
    assert first.mean().item() == pytest.approx(0, abs=1e-5)
    assert first.std().item() == pytest.approx(1, abs=1e-5)
    assert data.inputs[:, 1].abs().max() == 0  # constant
    assert (data.inputs[data.splits["test"], 2] == 4).all()  # bounded, and not seen by the figures of the train split
    assert (data.inputs[:3000, 2] == 0).all()
    # rows are 4435 + 0..64 in the test split: their order within the first feature follows from the class
    codes = torch.tensor([1, 0, 2])[data.inputs[data.splits["test"], 0].argsort().argsort().add(4435) % 3]
    assert torch.equal(codes, data.labels[data.splits["test"]])


def test_broken_r_data_files_are_named(tmp_path: Path) -> None:
    path = write_frame(tmp_path / "a.rda")
    with pytest.raises(UserError, match="data frame Other"):
        read_rda(path, "Other", "classes")
    with pytest.raises(UserError, match="factor lettr"):
        read_rda(path, "Satellite", "lettr")
    with pytest.raises(UserError, match=r"factor x\.1"):
        read_rda(path, "Satellite", "x.1")
    whole = path.read_bytes()
    for content in (whole[:200], whole[: len(whole) // 2], b"", b"no R data"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not an R data file") as error:
            read_rda(path, "Satellite", "classes")
        assert str(path) in one_line(error)
    with pytest.raises(UserError, match="missing values"):
        read_rda(write_frame(path, missing=True), "Satellite", "classes")


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(UserError, match=r"pip install rlkd\[data\]") as error:
        read_rda(tmp_path / "a.rda", "Satellite", "classes")
    one_line(error)


def installed(name: str) -> DataSet:
    if name in ("letter", "satellite"):
        pytest.importorskip("rdata", reason="needs the extra: pip install rlkd[data]")
    try:
        return load_dataset(name)
    except UserError as error:
        if "no file" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("fashion_mnist", (14, 14), 10),
        ("fashion_mnist_8x8", (8, 8), 10),
        ("fashion_mnist_28x28", (28, 28), 10),
        ("letter", (16,), 26),
        ("satellite", (36,), 6),
    ],
)
def test_the_real_files(name: str, shape: tuple[int, ...], classes: int) -> None:
    data, again = installed(name), installed(name)
    assert (data.name, data.input_shape, data.num_classes) == (name, shape, classes)
    assert {n: len(index) for n, index in data.splits.items()} == {"train": 2000, "validation": 1000, "test": 2000}
    assert torch.cat(list(data.splits.values())).sort().values.tolist() == list(range(5000))
    assert torch.equal(data.inputs, again.inputs)
    assert torch.equal(data.labels, again.labels)
    assert data.inputs.dtype == torch.float32
    low, high = (0, 1) if len(shape) == 2 else (-4, 4)
    assert low <= data.inputs.min() < data.inputs.max() <= high
    for index in data.splits.values():
        assert data.labels[index].unique().tolist() == list(range(classes))


def test_the_chosen_rows_never_move() -> None:
    fit, test = choose_rows(60_000, 10_000)
    assert (len(fit), len(test)) == (3000, 2000)
    assert (len(fit.unique()), len(test.unique())) == (3000, 2000)
    # Written down when the split was made: published figures hold for these rows alone.
    assert (fit[0].item(), fit[2000].item(), test[0].item()) == (17722, 43060, 9116)
