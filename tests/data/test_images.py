"""Every file of a folder of images is used or counted, and every mode of image becomes what it shows."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkd.data.images import open_image
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Table, make_splits, read_table
from rlkd.errors import UserError

image = pytest.importorskip("PIL.Image")
GREY = np.arange(0, 192, dtype=np.uint8).reshape(12, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def save(path: Path, value: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((6, 5, 3), value % 256, dtype=np.uint8)
    pixels[0, 0] = value // 256
    image.fromarray(pixels).save(path, **options)
    return path


def read(folder: Path, **columns: Any) -> Table:
    return read_table(folder, ColumnConfig(**columns))


def refused(folder: Path, **columns: Any) -> str:
    with pytest.raises(UserError) as error:
        make_splits(read(folder, **columns))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_of_images_mean_nothing(tmp_path: Path) -> None:
    for i in range(600):
        name = f"test_{i}" if i % 20 < 3 else f"train{i}" if i % 20 == 5 else f"val-{i}"
        save(tmp_path / ("cat", "dog", "bird")[i % 3] / f"{name}.png", i)
    table = read(tmp_path)
    assert len(table.samples) == 600
    assert table.splits is None
    assert table.lines() == ["600 files seen, 600 used"]
    assert sorted(table.labels) == ["bird"] * 200 + ["cat"] * 200 + ["dog"] * 200


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "Validation", "TEST"), ("training", "dev", "testing")]
)
def test_folders_of_splits(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for i in range(12):
        save(tmp_path / "d" / names[i % 3] / ("train" if i % 2 else "test") / f"{i}.png", i)  # classes called so, too
    table = read(tmp_path / "d")
    splits, _ = make_splits(table)
    assert [len(index) for index in splits.values()] == [4, 4, 4]
    assert sorted(table.labels) == ["test"] * 6 + ["train"] * 6


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for i in range(30):
        save(tmp_path / ("train", "car", "plane")[i % 3] / f"{i}.png", i)
    table = read(tmp_path)
    assert sorted(set(table.labels)) == ["car", "plane", "train"]
    assert (len(table.samples), table.splits) == (30, None)


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "store" / ("cat", "dog")[i % 2] / f"{i}.png", i)
    (tmp_path / "d").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "store" / name)
    assert read(tmp_path / "d").labels == ["cat"] * 3 + ["dog"] * 3


def test_other_files_are_counted(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.{('png', 'JPG', 'bmp', 'WebP')[i]}", i)
    for name in ("cat/notes.txt", "Thumbs.db", "labels.csv", "cat/.DS_Store", ".ipynb_checkpoints/0.png"):
        (tmp_path / "pictures" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pictures" / name).write_text("x")
    save(tmp_path / "pictures" / "cover.png")
    table = read_table(tmp_path / "pictures", ColumnConfig(), "image")
    assert table.tallies[0].lines() == [
        "10 files seen, 4 used",
        "  left out: 2 files are hidden (.ipynb_checkpoints/0.png, cat/.DS_Store)",
        "  left out: 3 files are no images (Thumbs.db, cat/notes.txt, labels.csv)",
        "  left out: 1 files stand in no class folder (cover.png)",
    ]
    (tmp_path / "pictures" / "cover.png").unlink()
    (tmp_path / "pictures" / "labels.csv").unlink()
    assert read(tmp_path).labels == ["cat", "cat", "dog", "dog"]  # an archive's own folder stands between


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train/1.png", "test/2.png"), "images stand in"),
        (("train/cat/1.png", "test/cat/2.png", "extra/cat/3.png"), "extra stands beside the split"),
        (("cat/a/1.png", "dog/2.png"), "cat/a/1.png lies deeper"),
        (("1.png", "2.png"), "stand in no class folder"),
        (("cat/1.png", "dog/2.heic"), "dog: holds no image that can be read (2.heic, ...)"),
        (("train/cat/1.png", "train/dog/2.dcm", "test/cat/3.png"), "dog: holds no image that can be read"),
    ],
)
def test_layouts_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    for i, name in enumerate(names):
        path = save(tmp_path / Path(name).with_suffix(".png"), i)
        path.rename(tmp_path / name)
    assert words in refused(tmp_path)


BROKEN = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "text": lambda whole: b"<html>404</html>",
    "header": lambda whole: whole[:20],
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tif"])
def test_broken_images_are_named_or_counted(tmp_path: Path, damage: str, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in range(9):
        save(tmp_path / ("cat", "dog", "bird")[i % 3] / f"{i}.png", i)
    path = tmp_path / "cat" / f"x.{ending}"
    image.fromarray(noise).save(path)
    path.write_bytes(BROKEN[damage](path.read_bytes()))
    assert f"{path}: cannot be read as an image" in refused(tmp_path)
    table = read(tmp_path, broken="skip")
    assert table.lines() == [
        "10 files seen, 9 used",
        f"  left out: 1 files cannot be read as images (cat/x.{ending})",
    ]


def shown(path: Path) -> np.ndarray:
    return np.asarray(open_image(path)[0])


def test_16_bit_grey_is_its_8_bit_copy(tmp_path: Path) -> None:
    wide = GREY.astype(np.uint16)
    for name, values in {"x257": wide * 257, "x256": wide * 256, "x256+9": wide * 256 + 9}.items():
        for ending in ("png", "tif"):
            image.fromarray(values).save(tmp_path / f"{name}.{ending}")
            opened, remarks = open_image(tmp_path / f"{name}.{ending}")
            assert np.array_equal(np.asarray(opened), np.repeat(GREY[..., None], 3, axis=-1)), (name, ending)
            assert remarks == ["have 16 bits a pixel: their upper 8 bits are used"]
    header = b"P5 16 12 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + (wide * 257).astype(">u2").tobytes())
    assert np.array_equal(shown(tmp_path / "a.pgm")[..., 0], GREY)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_other_modes_show_the_same(tmp_path: Path, mode: str, ending: str) -> None:
    if (mode, ending) in {("CMYK", "png"), ("YCbCr", "png")}:
        ending = "jpg" if mode == "CMYK" else "tif"
    picture = image.fromarray(COLOUR).convert(mode)
    picture.save(tmp_path / f"a.{ending}")
    expected = np.asarray(image.open(tmp_path / f"a.{ending}").convert("RGB"))
    assert np.array_equal(shown(tmp_path / f"a.{ending}"), expected)
    assert open_image(tmp_path / f"a.{ending}")[1] == []


def test_modes_without_a_range_are_refused(tmp_path: Path) -> None:
    image.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tif")
    image.fromarray(GREY.astype(np.int32)).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif"):
        with pytest.raises(UserError, match="no fixed range; convert it"):
            open_image(tmp_path / name)


def test_what_an_image_loses_is_said(tmp_path: Path) -> None:
    clear = np.concatenate([COLOUR, GREY[..., None]], axis=-1)
    image.fromarray(clear).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png")[1] == [
        "have transparent pixels: their colours are used as if they were opaque"
    ]
    frames = [image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    opened, remarks = open_image(tmp_path / "b.gif")
    assert remarks == ["have several frames: the first one is used"]
    assert np.asarray(opened).max() == 10


def test_images_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    exif = image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(shown(tmp_path / "a.png"), np.rot90(COLOUR, -1))


def one_line(error: UserError) -> None:
    assert "\n" not in str(error)


ENTRIES = st.tuples(
    st.sampled_from(["", "train/", "Test/", "val/"]),
    st.sampled_from(["cat", "dog", "train", "test"]),
    st.sampled_from(["1.png", "test_1.png", "train.JPG", "a.txt", ".hidden.png", "broken.png", "sub/2.png"]),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.sets(ENTRIES, min_size=1, max_size=8), has_splits=st.booleans(), skips=st.booleans())
def test_files_in_are_files_used_and_files_reported(
    tmp_path: Path, entries: set[tuple[str, str, str]], has_splits: bool, skips: bool
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    names = {f"{split if has_splits else ''}{label}/{name}" for split, label, name in entries}
    for i, name in enumerate(sorted(names)):
        if name.endswith("a.txt") or "broken" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        else:
            save(folder / name, i)
    try:
        table = read(folder, broken="skip" if skips else "refuse")
    except UserError as error:
        one_line(error)
        plain = all(name.count("/") == 1 and name.endswith(("1.png", "train.JPG")) for name in names)
        tops = {name.split("/")[0] for name in names}
        assert not plain or tops <= {"train", "test"}, "a plain folder of classes was refused"
        return
    tally = table.tallies[0]
    assert tally.seen == len(names)
    assert tally.used == len(table.samples) == len(table.labels)
    for (path, _), label in zip(table.places, table.labels, strict=True):
        assert Path(path).parent.name == label
