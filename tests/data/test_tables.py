"""A user's files: what is read, how labels meet the teacher's classes, and splits that no source crosses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import SPLITS, Table, make_examples, read_table, split_of
from rlkd.errors import UserError

COLUMNS = ColumnConfig()
ROWS = [{"text": f"good film {i % 30}", "label": "pos" if i % 2 else "neg", "source": f"s{i % 15}"} for i in range(60)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0]), *(mark.join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_all_formats_give_the_same_table(tmp_path: Path, ending: str) -> None:
    table = read_table(write(tmp_path / f"reviews.{ending}"), COLUMNS)
    assert table.kind == "text"
    assert list(table.samples) == [row["text"] for row in ROWS]
    assert table.labels == [row["label"] for row in ROWS]
    assert table.sources == [row["source"] for row in ROWS]
    assert table.splits is None


def examples_of(table: Table, tmp_path: Path, **changes: Any) -> Any:
    tokenizer = tiny_models.save_tokenizer(tmp_path / "tokenizer")
    return make_examples(table, tokenizer, ("neg", "pos"), ColumnConfig(**changes))


def test_no_source_stands_on_two_sides_and_every_sample_on_one(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv"), COLUMNS)
    examples = examples_of(table, tmp_path)
    sides = {name: {table.sources[i] for i in index.tolist()} for name, index in examples.splits.items()}
    assert all(not sides[a] & sides[b] for a in SPLITS for b in SPLITS if a < b)
    assert sorted(torch.cat(list(examples.splits.values())).tolist()) == list(range(60))
    again = examples_of(read_table(write(tmp_path / "b.csv", ROWS[::-1]), COLUMNS), tmp_path)
    assert sorted(59 - i for i in again.splits["test"].tolist()) == examples.splits["test"].tolist()


def test_copies_of_a_text_stay_together_where_no_source_is_given(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    table = read_table(write(tmp_path / "a.csv", rows), COLUMNS)
    examples = examples_of(table, tmp_path)
    sides = [{table.samples[i] for i in index.tolist()} for index in examples.splits.values()]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_hashed_shares_are_about_70_15_15() -> None:
    names = [split_of(f"source {i}") for i in range(20_000)]
    assert [names.count(s) / 20_000 for s in SPLITS] == pytest.approx([0.7, 0.15, 0.15], abs=0.01)


def test_given_splits_are_kept(tmp_path: Path) -> None:
    rows = [{**row, "split": ("train", "val", "test")[i % 3]} for i, row in enumerate(ROWS)]
    examples = examples_of(read_table(write(tmp_path / "a.csv", rows), COLUMNS), tmp_path)
    assert examples.splits["validation"].tolist() == list(range(1, 60, 3))
    for name, part in (("train", ROWS[:40]), ("test", ROWS[40:])):
        write(tmp_path / "folder" / f"{name}.jsonl", part)
    table = read_table(tmp_path / "folder", COLUMNS)
    examples = examples_of(table, tmp_path)
    given = {name: {table.samples[i] for i in index.tolist()} for name, index in examples.splits.items()}
    assert len(examples.splits["test"]) == 20
    assert given["validation"]  # cut from train by source
    train = {table.sources[i] for i in examples.splits["train"].tolist()}
    assert not train & {table.sources[i] for i in examples.splits["validation"].tolist()}


def test_texts_become_tokens_and_masks(tmp_path: Path) -> None:
    rows = [{"text": "good film", "label": "pos", "split": s} for s in SPLITS]
    rows += [{"text": "the plot was not good", "label": "neg", "split": "train"}]
    table = read_table(write(tmp_path / "a.jsonl", rows), COLUMNS)
    examples = examples_of(table, tmp_path)
    assert examples.inputs["attention_mask"].sum(1).tolist() == [4, 4, 4, 7]
    assert examples.labels.tolist() == [1, 1, 1, 0]
    assert examples.batch(torch.tensor([0, 1]))["input_ids"].shape == (2, 4)
    assert examples_of(table, tmp_path, max_length=5).num_positions == 5


def test_pairs_are_told_apart(tmp_path: Path) -> None:
    rows = [{"text": "good film", "other": "bad plot", "label": "pos", "split": s} for s in SPLITS]
    columns = ColumnConfig(pair="other")
    examples = examples_of(read_table(write(tmp_path / "a.jsonl", rows), columns), tmp_path)
    assert examples.inputs["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_images_and_their_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    t = tiny_models.need_transformers()
    for split, count in (("train", 8), ("validation", 2), ("test", 3)):
        for i in range(count):
            folder = tmp_path / "pictures" / split / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((10, 12, 3), 20 * i + len(split), dtype=np.uint8)
            image.fromarray(pixels).save(folder / f"{i}.png")
    table = read_table(tmp_path / "pictures", COLUMNS)
    assert table.kind == "image"
    assert sorted(table.labels) == ["cat"] * 6 + ["dog"] * 7
    processor = t.ViTImageProcessor(size={"height": 16, "width": 16})
    examples = make_examples(table, processor, ("dog", "cat"), COLUMNS)
    assert examples.inputs["pixel_values"].shape == (13, 3, 16, 16)
    assert len(examples.splits["test"]) == 3
    expected = [{"dog": 0, "cat": 1}[str(name)] for name in table.labels]
    assert examples.labels.tolist() == expected


def test_arrays(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).random((40, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=np.arange(40) % 3)
    examples = make_examples(read_table(tmp_path / "a.npz", COLUMNS), None, ("LABEL_0", "LABEL_1", "LABEL_2"), COLUMNS)
    np.testing.assert_array_equal(examples.inputs["pixel_values"].numpy(), inputs)
    assert examples.labels.tolist() == [i % 3 for i in range(40)]
    whole = (tmp_path / "a.npz").read_bytes()
    for damaged in (b"", whole[:-40], b"PK\x03\x04" + bytes(60), whole[:300] + bytes(8) + whole[308:]):
        (tmp_path / "c.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="not arrays `inputs` and `labels`"):
            read_table(tmp_path / "c.npz", COLUMNS)
    np.savez(tmp_path / "b.npz", inputs=np.array([{"a": 1}], dtype=object), labels=np.zeros(1))
    with pytest.raises(UserError, match="not arrays"):
        read_table(tmp_path / "b.npz", COLUMNS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": np.full((9, 4), np.nan)}, "row 1: got an input that is not finite"),
        ({"inputs": np.ones((0, 4)), "labels": np.zeros(0)}, "got no sample"),
        ({"inputs": np.full((9, 4), -1e300)}, "row 1: got an input that is not finite in 32 bits"),
        ({"inputs": np.full((9, 4), "a")}, "got inputs of type <U1; allowed: real numbers"),
        ({"inputs": np.ones((9, 4)) + 1j}, "got inputs of type complex128"),
        ({"labels": np.eye(3)[np.arange(9) % 3]}, "row 1: got a label of type list"),
        ({"labels": np.arange(8)}, r"got labels \[8\] for 9 inputs"),
        ({"labels": np.full(9, 2**63, np.uint64)}, "got label '9223372036854775808'"),
        ({"source": np.full(9, 0.5)}, "row 1: column 'source' holds float 0.5"),
        ({"split": np.arange(9)}, "row 1: got split 0; allowed: train, validation, test"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "a.npz", **{"inputs": np.ones((9, 4)), "labels": np.arange(9) % 3} | changes)
    with pytest.raises(UserError, match=words):
        make_examples(read_table(tmp_path / "a.npz", COLUMNS), None, ("LABEL_0", "LABEL_1", "LABEL_2"), COLUMNS)


def test_labels_of_arrays_may_be_numbers_texts_or_truth_values(tmp_path: Path) -> None:
    order = np.arange(40) % 2
    for labels in (order.astype(np.float32), order == 1, np.array(["LABEL_0", "LABEL_1"])[order]):
        np.savez(tmp_path / "a.npz", inputs=np.arange(40.0)[:, None], labels=labels)
        data = make_examples(read_table(tmp_path / "a.npz", COLUMNS), None, ("LABEL_0", "LABEL_1"), COLUMNS)
        assert data.labels.tolist() == order.tolist()
        assert data.report.startswith("40 rows seen, 40 used\nsplits: train ")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": \n')
    write(tmp_path / "named.csv", [{"review": "good", "label": 1}])
    write(tmp_path / "one.csv", ROWS[:1])
    cases = {
        tmp_path / "gone.csv": "no such data",
        tmp_path / "a.txt": "got a .txt file",
        tmp_path / "broken.jsonl": "line 1: cannot be read as JSON",
        tmp_path / "named.csv": "no column 'text'; it has review, label",
    }
    for path, words in cases.items():
        with pytest.raises(UserError) as error:
            read_table(path, COLUMNS)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no sample is in the"):
        examples_of(read_table(tmp_path / "one.csv", COLUMNS), tmp_path)
    with pytest.raises(UserError, match=r"columns\.max_length"):
        read_table(tmp_path / "one.csv", ColumnConfig(max_length=1))
