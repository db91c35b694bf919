"""Every row of a table is used, left out and counted, or the table is refused with the row's place."""

import datetime
import gzip
import json
import os
import random
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Table, make_splits, read_table
from rlkd.data.texts import read_texts
from rlkd.errors import UserError

ROWS: list[dict[str, Any]] = [{"text": f"film {i}", "label": ("neg", "pos")[i % 2]} for i in range(60)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    if kind.endswith(("jsonl", "json")):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "\t" if kind.lower().endswith("tsv") else ","
        text = "".join(mark.join(line) + "\n" for line in [names, *([str(row[n]) for n in names] for row in rows)])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, **columns: Any) -> Table:
    return read_table(path, ColumnConfig(**columns))


def refused(path: Path, **columns: Any) -> str:
    with pytest.raises(UserError) as error:
        make_splits(read(path, **columns))
    assert "\n" not in str(error.value)
    return str(error.value)


def sizes(path: Path, **columns: Any) -> tuple[list[int], str]:
    """Samples in train, validation and test, and what was said of the splits."""
    splits, notes = make_splits(read(path, **columns))
    return [len(index) for index in splits.values()], notes[0]


def test_a_file_that_was_replaced_gives_its_new_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ROWS)
    told = path.stat()
    assert read(path).samples[0] == "film 0"
    write(path, [{**row, "text": row["text"].replace("film", "plot")} for row in ROWS])
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert path.stat().st_size == told.st_size
    assert read(path).samples[0] == "plot 0"


@pytest.mark.parametrize(
    "names",
    [
        ("train", "validation", "test"),
        ("Train", "Dev", "TEST"),
        ("reviews_train", "reviews-val", "reviews.test"),
        ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"),
        ("data/train", "data/valid", "data/test"),
        ("train/data-00000-of-00001", "dev/data-00000-of-00001", "test/data-00000-of-00001"),
        ("trainset", "devset", "testset"),
        ("x_trn", "x_val", "x_tst"),
        ("default/train/0000", "default/validation/0000", "default/test/0000"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "CSV"])
def test_names_of_files_and_folders_tell_the_splits(tmp_path: Path, names: tuple[str, ...], ending: str) -> None:
    for name, part in zip(names, (ROWS[:30], ROWS[30:40], ROWS[40:]), strict=True):
        write(tmp_path / "d" / f"{name}.{ending}", part)
    assert sizes(tmp_path / "d")[0] == [30, 10, 20]
    assert read(tmp_path / "d").lines() == ["3 files seen, 3 used", "60 rows seen, 60 used"]


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "abc", ROWS)
    (tmp_path / "d" / "data").mkdir(parents=True)
    (tmp_path / "d" / "data" / "train.csv").symlink_to(tmp_path / "blobs" / "abc")
    assert len(read(tmp_path / "d").samples) == 60
    (tmp_path / "linked").symlink_to(tmp_path / "d" / "data")
    assert len(read(tmp_path / "linked").samples) == 60
    (tmp_path / "d" / "test.csv").symlink_to(tmp_path / "blobs" / "gone")
    assert "test.csv: is a link to nothing" in refused(tmp_path / "d")
    (tmp_path / "d" / "test.csv").unlink()
    (tmp_path / "d" / "data" / "up").symlink_to(tmp_path / "d")
    assert "is a link that leads back" in refused(tmp_path / "d")


@pytest.mark.parametrize(
    "shard", ["train-{}-of-00002", "train-{}-of-00002-6f3c0b1{}", "train_{}_of_00002", "train.{}-of-2"]
)
def test_shards_are_put_together_or_missed(tmp_path: Path, shard: str) -> None:
    names = [f"{shard.format(f'0000{i}', i)}.jsonl" for i in (0, 1)]
    for name, part in zip(names, (ROWS[:20], ROWS[20:30]), strict=True):
        write(tmp_path / name, part)
    write(tmp_path / "test-00000-of-00001.jsonl", ROWS[30:])
    assert len(read(tmp_path).samples) == 60
    (tmp_path / names[1]).unlink()
    assert "of the 2 parts of train number 1 is missing" in refused(tmp_path)


def test_files_without_splits_are_one_table(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"part{i}.csv", ROWS[20 * i : 20 * i + 20])
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "._part0.csv").write_text("x")
    table = read(tmp_path)
    assert (len(table.samples), table.splits) == (60, None)
    assert table.lines() == [
        "6 files seen, 3 used",
        "  left out: 2 files are hidden (.DS_Store, ._part0.csv)",
        "  left out: 1 files are no tables or stand elsewhere (README.md)",
        "60 rows seen, 60 used",
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train.csv", "test.csv", "extra.csv"), "extra.csv tells no split in its name while test.csv tells test"),
        (("train.csv", "train.csv.gz"), "train.csv and train.csv.gz may hold the same rows"),
        (("train_test.csv", "dev.csv"), "its name tells test and train"),
        (("train.csv", "eval.csv"), "its name tells eval"),
        (("train/test.csv", "train/a.csv"), "its name tells test and its folder train"),
        (("a/x.csv", "b/x.csv"), "has tables in several folders (a, b)"),
        (("dev.csv", "test.csv"), "no sample is in the train split; it has test, validation only"),
        ((), "holds no table"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    for name in names:
        write(tmp_path / name, ROWS)
    assert words in refused(tmp_path)


def test_missing_splits_are_cut_and_said(tmp_path: Path) -> None:
    (write(tmp_path / "train.csv", ROWS[:30]), write(tmp_path / "dev.csv", ROWS[30:]))
    found, note = sizes(tmp_path)
    assert found[0] == 30
    assert sum(found) == 60
    assert min(found) > 5
    assert "half of the sources of validation became test" in note
    (tmp_path / "dev.csv").unlink()
    write(tmp_path / "train.csv", ROWS)
    found, note = sizes(tmp_path)
    assert sum(found) == 60
    assert "train alone was given" in note


@pytest.mark.parametrize("secret", [None, -1, ""])
def test_test_rows_without_labels_are_left_out(tmp_path: Path, secret: Any) -> None:
    write(tmp_path / "train.jsonl", [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS)])
    write(tmp_path / "dev.jsonl", [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS)])
    write(tmp_path / "test.jsonl", [{"text": "film", "label": secret}] * 7)
    table = read(tmp_path)
    assert "  left out: 7 rows of the test split have no label" in table.lines()[2]
    assert table.tallies[1].seen == 127
    assert sizes(tmp_path)[0][0] == 60
    write(tmp_path / "test.jsonl", [{"text": "film", "index": 1}] * 7)  # as in GLUE
    assert read(tmp_path).tallies[1].seen == 127


def test_glue_folders(tmp_path: Path) -> None:
    for name, num_rows in (("train", 40), ("dev", 20)):
        lines = [f"film {name} {i}\t{i % 2}" if i % 3 else f'"film {name} {i}\t{i % 2}' for i in range(num_rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tfilm\n1\tplot\n")
    write(tmp_path / "original" / "train.tsv", ROWS)
    table = read(tmp_path, text="sentence")
    assert table.tallies[1].seen == 62
    assert table.tallies[1].used == 60
    assert "no column 'text'; it has sentence, label" in refused(tmp_path)
    (tmp_path / "train.tsv").write_text("gj04\t1\t\tOur friends won't buy this analysis.\n" * 3)
    assert "a file without a header line needs one" in refused(tmp_path, text="sentence")


def test_splits_in_a_column_in_any_case(tmp_path: Path) -> None:
    told = ("Train", "VAL ", "test", "train", "Dev", "TESTING")
    rows = [{**row, "split": told[i % 6]} for i, row in enumerate(ROWS)]
    assert sizes(write(tmp_path / "a.csv", rows))[0] == [20, 20, 20]
    rows[7]["split"] = "unlabelled"
    assert "row 8: got split 'unlabelled'; allowed: train, validation or test" in refused(
        write(tmp_path / "a.csv", rows)
    )
    rows[7]["split"] = None
    assert "row 8: got split None" in refused(write(tmp_path / "a.jsonl", rows))
    assert "says validation, the name of its file train" in refused(
        write(tmp_path / "f" / "train.csv", rows[:7]).parent
    )
    write(tmp_path / "g" / "part0.csv", rows[:7]), write(tmp_path / "g" / "part1.csv", ROWS[7:])
    assert "part1.csv: row 1: tells no split while other rows do" in refused(tmp_path / "g")


@pytest.mark.parametrize("cell", [None, "", "  ", float("nan")])
@pytest.mark.parametrize("name", ["text", "label"])
def test_empty_cells_are_refused_or_counted(tmp_path: Path, cell: Any, name: str) -> None:
    rows = [dict(row) for row in ROWS]
    rows[4][name] = rows[9][name] = cell
    path = write(tmp_path / "a.jsonl", rows)
    assert f"a.jsonl: row 5: has no {name} in column '{name}'" in refused(path)
    table = read(path, broken="skip")
    assert table.tallies[0].used == len(table.samples) == 58
    assert table.lines()[0] == "60 rows seen, 58 used"
    assert f"2 rows have no {name} in column '{name}' ({path}: row 5, {path}: row 10)" in table.lines()[1]
    assert table.place(4) == (str(path), 6)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"text": 3}, "row 3: column 'text' holds int 3; allowed: texts"),
        ({"text": ["a", "b"]}, "column 'text' holds list"),
        ({"text": {"en": "a"}}, "column 'text' holds dict"),
        ({"text": True}, "column 'text' holds bool True"),
        ({"source": 1.5}, "row 3: column 'source' holds float 1.5; allowed: texts or whole numbers"),
        ({"source": ["a"]}, "column 'source' holds list"),
        ({"source": True}, "column 'source' holds bool"),
    ],
)
def test_cells_of_other_types_are_refused(tmp_path: Path, cells: dict[str, Any], words: str) -> None:
    rows = [{**row, "source": i} for i, row in enumerate(ROWS)]
    rows[2] |= cells
    assert words in refused(write(tmp_path / "a.jsonl", rows))
    assert words in refused(tmp_path / "a.jsonl", broken="skip")


def test_parquet_cells_of_other_types(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [{"text": "a", "label": "x", "source": Decimal(i)} for i in range(3)]
    assert read(write(tmp_path / "a.parquet", rows)).sources == ["0", "1", "2"]
    rows = [{"text": "a", "label": "x", "source": datetime.date(2026, 1, 1)}]
    assert "column 'source' holds date" in refused(write(tmp_path / "b.parquet", rows))
    assert "column 'text' holds bytes" in refused(write(tmp_path / "c.parquet", [{"text": b"a", "label": "x"}]))


def test_sources_are_the_same_in_every_type(tmp_path: Path) -> None:
    for name, cells in (("a", [1, 2, 1]), ("b", [1.0, 2.0, 1.0]), ("c", ["1", "2", "1"])):
        rows = [{"text": f"t{i}", "label": 0, "source": cell} for i, cell in enumerate(cells)]
        assert read(write(tmp_path / f"{name}.jsonl", rows)).sources == ["1", "2", "1"]
    rows = [{"text": "t", "label": 0, "source": None}, {"text": "u", "label": 0, "source": "1"}]
    assert read(write(tmp_path / "d.jsonl", rows)).sources == ["t", "1"]


def test_documents_are_counted_too(tmp_path: Path) -> None:
    rows = [{"text": "a b"}, {"text": ""}, {"text": "c"}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="row 2: has no text"):
        read_texts(path, ColumnConfig())
    assert read_texts(path, ColumnConfig(broken="skip")).lines()[0] == "3 rows seen, 2 used"
    for name in ("Train.txt", "VALID.TXT", "test.txt"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes("\ufeffgood film".encode())
    table = read_texts(tmp_path / "d", ColumnConfig())
    assert sorted(table.splits or []) == ["test", "train", "validation"]
    assert [text for _, text in table.samples] == ["good film"] * 3
    assert table.lines() == ["3 files seen, 3 used"]
    (tmp_path / "d" / "more.txt").write_text("x")
    with pytest.raises(UserError, match=r"more\.txt tells no split in its name"):
        read_texts(tmp_path / "d", ColumnConfig())
    (tmp_path / "d" / "more.txt").write_text(" \n")
    (tmp_path / "d" / "more.txt").rename(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="is empty"):
        read_texts(tmp_path / "empty.txt", ColumnConfig())


def one_line(error: UserError) -> None:
    assert "\n" not in str(error)


CELLS: dict[str, st.SearchStrategy[Any]] = {
    "text": st.sampled_from(["good film", "bad film", '"so so', "", " ", None, 3, ["a"]]),
    "label": st.sampled_from(["pos", "neg", 0, 1, 1.5, None, "", float("nan")]),
    "source": st.sampled_from(["a", "b", 1, 2.0, None, 0.5]),
    "split": st.sampled_from(["train", "Test", "val", "test"]),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_in_are_rows_used_and_rows_reported(tmp_path: Path, data: st.DataObject) -> None:
    """Random cells in one file or several; mostly good ones, so that many tables are read."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    names = ["text", "label", *data.draw(st.sets(st.sampled_from(["source", "split"])))]
    share = data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    bad = [name for name in names if draw.random() < share]
    rows = []
    for i in range(data.draw(st.integers(1, 40))):
        row = {"text": f"film {i}", "label": "pos", "source": i % 5, "split": "train"}
        rows.append({n: data.draw(CELLS[n]) if n in bad and draw.random() < 0.3 else row[n] for n in names})
    ending = data.draw(st.sampled_from(["jsonl", "json"]))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    num_files = data.draw(st.integers(1, 3))
    for i in range(num_files):
        if rows[i::num_files]:
            write(folder / f"part{i}.{ending}", rows[i::num_files])
    try:
        table = read(folder, broken=data.draw(st.sampled_from(["refuse", "skip"])))
    except UserError as error:
        one_line(error)
        assert bad, "good rows were refused"
        return
    tally = table.tallies[1]
    assert tally.seen == len(rows)
    assert tally.used == len(table.samples) == len(table.labels) == len(table.sources)
    assert tally.used + tally.left_out.total() == len(rows)
    assert all(isinstance(text, str) and text.strip() for text in table.samples)
    if not bad:
        assert sorted(table.samples) == sorted(row["text"] for row in rows)
