"""Every record of a table file becomes a row as it stands, or the file is refused in one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkd.data.labels import NumberedName
from rlkd.data.readers import Columns, read_columns, table_format
from rlkd.errors import UserError

ROWS = [["good film", "pos"], ["bad, dull film", "neg"], ['a "fine" plot', "pos"]]
WANTED = ["text", "label"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(rows: list[list[str]], **options: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows([WANTED, *rows])
    return file.getvalue()


def rows_of(columns: Columns) -> list[list[Any]]:
    return [list(row) for row in zip(*(columns.cells[name] for name in WANTED), strict=True)]


def refused(path: Path, wanted: list[str] = WANTED) -> str:
    with pytest.raises(UserError) as error:
        read_columns(path, wanted)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "CSV"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_separators_and_line_ends(tmp_path: Path, separator: str, ending: str, newline: str) -> None:
    path = write(tmp_path / f"a.{ending}", as_csv(ROWS, delimiter=separator, lineterminator=newline))
    assert rows_of(read_columns(path, WANTED)) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    rows = [["ein schöner Film", "pos"], ["映画", "neg"]]
    assert rows_of(read_columns(write(tmp_path / "a.csv", as_csv(rows).encode(encoding)), WANTED)) == rows


def test_spaces_after_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text, label\n"good, film", "1"\nbad, 0\n')
    assert rows_of(read_columns(path, WANTED)) == [["good, film", "1"], ["bad", "0"]]


def test_excel_tells_its_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sep=;\r\n" + as_csv(ROWS, delimiter=";"))
    assert rows_of(read_columns(path, WANTED)) == ROWS


def test_texts_that_begin_with_a_quotation_mark_keep_their_rows(tmp_path: Path) -> None:
    texts = [f'"film {i} was good' if i % 20 == 3 else f"film {i} was bad" for i in range(320)]
    content = "text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    for ending in ("tsv", "csv"):
        columns = read_columns(write(tmp_path / f"a.{ending}", content), WANTED)
        assert columns.cells["text"] == texts
        assert any("quotation marks" in note for note in columns.notes)
    content = "text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts))
    assert read_columns(write(tmp_path / "b.csv", content), WANTED).cells["text"] == texts
    ends = [f'film {i} was good"' if i % 20 == 13 else text for i, text in enumerate(texts)]  # both readings are rows
    content = "text\tlabel\n" + "".join(f"{i % 2}\t{text}\n" for i, text in enumerate(ends))
    assert read_columns(write(tmp_path / "c.tsv", content), WANTED).cells["label"] == ends
    content = "text,label\n" + "".join(f"{i % 2},{text}\n" for i, text in enumerate(ends))
    assert "which is meant is unknown" in refused(write(tmp_path / "c.csv", content))


def test_quoted_texts_go_over_lines(tmp_path: Path) -> None:
    rows = [["one\ntwo, three", "a"], ["four\r\n\r\nfive\ttabs", "b"], ["x\x0by\x85z\u2028w", "c"], ["", "d"]]
    for separator, ending in ((",", "csv"), ("\t", "tsv")):
        path = write(tmp_path / f"a.{ending}", as_csv(rows, delimiter=separator))
        assert rows_of(read_columns(path, WANTED)) == rows


def test_cells_of_csv_stay_as_they_are(tmp_path: Path) -> None:
    rows = [["NA", "01"], ["null", "1.0"], ["nan", "True"], [" x ", "1e3"]]
    assert rows_of(read_columns(write(tmp_path / "a.csv", as_csv(rows)), WANTED)) == rows


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    columns = read_columns(write(tmp_path / "a.csv", "\ntext,label\na,1\n\n\nb,2\n\n"), WANTED)
    assert (columns.num_rows, columns.num_blank) == (2, 3)


def test_column_names(tmp_path: Path) -> None:
    assert read_columns(write(tmp_path / "a.csv", " Text ,LABEL,x,x\na,1,,\n"), WANTED).cells["label"] == ["1"]
    assert "2 columns are called 'text'" in refused(write(tmp_path / "b.csv", "text,label,text\na,1,b\n"))
    assert "2 columns are called 'label'" in refused(write(tmp_path / "c.csv", "text,Label,LABEL\na,1,b\n"))
    assert read_columns(write(tmp_path / "d.csv", "review,stars\na,1\n"), WANTED).names == ["review", "stars"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.csv", b"text,label\na,1\nb\n", "row 2: got 1 fields; its header has 2"),
        ("a.csv", b"text,label\na,1\nb, c,2\n", "row 2: got 3 fields; its header has 2"),
        ("a.tsv", b"text\tlabel\na\t1\nb\t2\t3\n", "row 2: got 3 fields"),
        ("a.csv", b'text,label\n"a, b,1\n', "line 2: unexpected end of data"),
        ("a.csv", b'text,label\n"a, b" c,1\n', "line 2: ',' expected after '\"'"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", "line 2: not UTF-8"),
        ("a.csv", "text,label\na,1\n".encode("utf-16-le"), "line 1: has a zero byte"),
        ("a.csv", b"text,label\na\x00,1\n", "line 2: has a zero byte"),
        ("a.csv", b'text,label\n"say \\"hi\\" to",1\n', "line 2: ',' expected after"),
        ("a.json", b"[]", "has no row"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: cannot be read as JSON"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "'text' appears twice"),
        ("a.jsonl", b'"text"\n', "allowed: JSON lines or a list of objects"),
        ("a.json", b"[1, 2]", "allowed: JSON lines or a list of objects"),
        ("a.json", b"[" * 100_000, "cannot be read as JSON"),
        ("a.json", b'{"text": ["a", "b"], "label": [1]}', "different lengths"),
        ("a.parquet", b"PAR1 and nothing else PAR1", "cannot be read as .parquet"),
        ("a.arrow", b"no such thing", "cannot be read as .arrow"),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0)[:-12], "cannot be unpacked"),
        ("a.csv.gz", gzip.compress(gzip.compress(b"text,label\na,1\n", mtime=0), mtime=0), "compressed twice"),
        ("a.csv.xz", lzma.compress(b"text,label\na,1\n")[:-20], "cannot be unpacked"),
        ("a.zip", b"PK\x03\x04 and nothing else", "cannot be unpacked"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    message = refused(write(tmp_path / name, content))
    assert words in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, lambda content: content])
@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.bz2", "a.CSV.XZ", "a.csv"])
def test_content_tells_the_compression(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    assert rows_of(read_columns(write(tmp_path / name, pack(as_csv(ROWS).encode())), WANTED)) == ROWS


def test_zstandard(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(b'{"text": "a", "label": 1}\n')
    assert rows_of(read_columns(tmp_path / "a.jsonl.zst", WANTED)) == [["a", 1]]


def test_zip_archives_hold_one_table(tmp_path: Path) -> None:
    def archive(name: str, **members: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            for member, content in members.items():
                file.writestr(member.replace("__", "/").replace("_dot_", "."), content)
        return tmp_path / name

    table = as_csv(ROWS).encode()
    one = archive("one.zip", reviews_dot_csv=table, **{"_dot_DS_Store": b"x"})
    assert rows_of(read_columns(one, WANTED)) == ROWS
    assert "holds a.csv, b.csv" in refused(archive("two.zip", a_dot_csv=table, b_dot_csv=table))
    assert "holds cat/1.png" in refused(archive("pictures.zip", cat__1_dot_png=b"x"))
    assert "one.zip" in refused(archive("nested.zip", one_dot_zip=one.read_bytes()))
    excel = archive("book.zip", **{"[Content_Types]_dot_xml": b"x", "xl__workbook_dot_xml": b"x"})
    assert "is an Excel file; save it as CSV" in refused(excel)
    assert "compressed once more" in refused(archive("twice.zip", a_dot_csv=gzip.compress(table)))


JSON_ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": None}]


@pytest.mark.parametrize(
    "content",
    [
        "".join(json.dumps(row) + "\n" for row in JSON_ROWS),
        "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in JSON_ROWS),
        json.dumps(JSON_ROWS, indent=1),
        json.dumps({"version": 1, "data": JSON_ROWS}),
        json.dumps({name: [row[name] for row in JSON_ROWS] for name in WANTED}),
        json.dumps({name: {str(i): row[name] for i, row in enumerate(JSON_ROWS)} for name in WANTED}),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_in_its_layouts(tmp_path: Path, content: str, name: str) -> None:
    assert rows_of(read_columns(write(tmp_path / name, content), WANTED)) == [["a", 1], ["b", 0], ["c", None]]


def test_json_lines_keep_line_separators_in_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85", "label": 1}\n{"text": "c", "label": 2}')
    assert rows_of(read_columns(path, WANTED)) == [["a\u2028b\x85", 1], ["c", 2]]
    assert read_columns(write(tmp_path / "b.jsonl", '{"text": "a", "label": 1}'), WANTED).num_rows == 1


def test_parquet_and_arrow_keep_types_and_names(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.ipc
    import pyarrow.parquet

    noted = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"dtype": "x"}}}}
    texts = pa.array(["a", "b", "c"]).dictionary_encode()
    table = pa.table({"text": texts, "label": [1, 0, -1]}).replace_schema_metadata({"huggingface": json.dumps(noted)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        named = [NumberedName("pos", 1), NumberedName("neg", 0), None]
        assert rows_of(read_columns(tmp_path / name, WANTED)) == [list(p) for p in zip("abc", named, strict=True)]
    odd = pa.table({"text": ["a"], "label": pa.array([Decimal("1.00")])})
    pyarrow.parquet.write_table(odd, tmp_path / "odd.parquet")
    assert read_columns(tmp_path / "odd.parquet", WANTED).cells["label"] == [Decimal("1.00")]
    wrong = pa.table({"text": ["a"], "label": [7]}).replace_schema_metadata({"huggingface": json.dumps(noted)})
    pyarrow.parquet.write_table(wrong, tmp_path / "wrong.parquet")
    assert "row 1: got class 7; the column has the classes 0 to 1" in refused(tmp_path / "wrong.parquet")


def test_formats_by_name() -> None:
    names = ["a.csv", "A.TSV.GZ", "a.b.jsonl", "a.txt", "csv", "a.csv.old", "a.gz", "train.csv.zip", "a.csv.gz.gz"]
    assert [table_format(name) for name in names] == [".csv", ".tsv", ".jsonl", "", "", "", "", ".csv", ""]


def one_line(error: UserError) -> None:
    assert "\n" not in str(error)


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8) | st.sampled_from(
    ['"', '""', 'a "b" c', '"a', 'a"', "a,b", "a\nb", "a\r\nb", "\t", ";", "", " ", "'"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=12),
    separator=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["csv", "tsv"]),
    is_plain=st.booleans(),
)
def test_rows_in_are_rows_out_or_the_file_is_refused(
    tmp_path: Path, rows: list[list[str]], separator: str, quoting: Any, ending: str, is_plain: bool
) -> None:
    """Any rows, written as CSV or with bare separators between the cells as GLUE's files are."""
    content = as_csv(rows, delimiter=separator, quoting=quoting)
    if is_plain:
        content = "".join(separator.join(row) + "\n" for row in [WANTED, *rows])
    try:
        columns = read_columns(write(tmp_path / f"a.{ending}", content), WANTED)
    except UserError as error:
        one_line(error)
        return
    lines = content.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    if any("quotation marks" in note for note in columns.notes):
        assert columns.num_rows == len(lines) - 1 - columns.num_blank
    elif is_plain:
        assert columns.num_rows <= len(lines) - 1 - columns.num_blank
    else:
        assert rows_of(columns) == rows
