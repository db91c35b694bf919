"""A teacher that answers every sample rightly keeps its accuracy of 1.0 whatever labels, classes and files are called.

The teachers are tiny and trained here: the class of a text is its word w<i>, the class of an image its grey value.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F

from rlkd.data.rows import ColumnConfig
from rlkd.envs import ControlConfig
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError

C, ROWS = 12, 240
WORDS = [f"w{i}" for i in range(C)]
SORTED = sorted(str(i) for i in range(C))  # "0", "1", "10", "11", "2", ... as run_classification.py writes them


def fit(model: torch.nn.Module, inputs: dict[str, torch.Tensor], classes: torch.Tensor) -> None:
    """Train until every row is answered rightly."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        logits = model(**inputs).logits
        loss = F.cross_entropy(logits, classes)
        if bool((logits.argmax(-1) == classes).all()) and loss < 0.1:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError("the teacher did not learn its rows")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word w<i> has class i; the classes are called LABEL_0 to LABEL_11."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_models.save_tokenizer(folder, WORDS)
    model = tiny_models.tiny("bert", C, vocab_size=len(tokenizer), hidden_dropout_prob=0.0)
    fit(model, dict(tokenizer(WORDS, return_tensors="pt")), torch.arange(C))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


def called(teacher: Path, folder: Path, **changes: Any) -> Path:
    """The same teacher with other entries in its config.json; None takes an entry away."""
    folder.mkdir(exist_ok=True)
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def turned(teacher: Path, folder: Path, order: list[int], **changes: Any) -> Path:
    """The teacher with its outputs in another order: output j answers for word order[j]."""
    t = tiny_models.need_transformers()
    called(teacher, folder)
    model = t.BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter[order].clone())
    model.save_pretrained(folder)
    return called(folder, folder, **changes)


def names_of(names: list[str]) -> dict[str, str]:
    return {str(i): name for i, name in enumerate(names)}


def csv_file(path: Path, spell: Callable[[int], Any], classes: range = range(C)) -> Path:
    rows = [f"{WORDS[i]},{spell(i)}" for i in classes for _ in range(ROWS // C)]
    sources = [f",s{k}" for k in range(len(rows))]
    path.write_text("text,label,source\n" + "".join(row + s + "\n" for row, s in zip(rows, sources, strict=True)))
    return path


def scenario(teacher: Path, data: Path, **columns: Any) -> RealScenario:
    config = RealConfig(
        str(teacher), str(data), columns=ColumnConfig(**columns), cost=RealCostConfig(batch_size=2, batches=())
    )
    config = dataclasses.replace(config, cut=dataclasses.replace(config.cut, layers=1))
    return build_real_scenario(config, ControlConfig())


def accuracy(teacher: Path, data: Path, **columns: Any) -> float:
    """The teacher's, over all samples."""
    built = scenario(teacher, data, **columns)
    return float((built.signals.logits[0].argmax(-1) == built.data.labels).float().mean())


def test_names_that_are_numbers_in_the_order_of_texts(teacher: Path, tmp_path: Path) -> None:
    given = turned(teacher, tmp_path / "t", [int(name) for name in SORTED], id2label=names_of(SORTED), label2id=None)
    built = scenario(given, csv_file(tmp_path / "a.csv", int))
    assert float(built.signals.accuracy[0]) == 1.0
    assert "number" not in built.report
    assert f"{ROWS} rows seen, {ROWS} used" in built.report
    assert [line.split()[:4] for line in built.report.splitlines() if line.startswith("10 ")] == [
        ["10", "20", "2", "10"]
    ]
    assert built.class_names == SORTED
    assert accuracy(given, csv_file(tmp_path / "b.csv", float)) == 1.0


@pytest.mark.parametrize("spell", [str, lambda i: f"{i}.0", lambda i: f"LABEL_{i}"])
def test_default_names(teacher: Path, tmp_path: Path, spell: Callable[[int], Any]) -> None:
    assert accuracy(teacher, csv_file(tmp_path / "a.csv", spell)) == 1.0
    assert accuracy(teacher, csv_file(tmp_path / "b.csv", spell, range(1, 4))) == 1.0  # no row of LABEL_0


def test_parquet_with_its_own_order_of_classes(teacher: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    column = [f"class {i}" for i in reversed(range(C))]
    noted = {"info": {"features": {"label": {"names": column, "_type": "ClassLabel"}}}}
    words = [i for i in range(C) for _ in range(ROWS // C)]
    table = pa.table({"text": [WORDS[i] for i in words], "label": [C - 1 - i for i in words], "source": range(ROWS)})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(noted)}), tmp_path / "a.parquet"
    )
    given = called(teacher, tmp_path / "t", id2label=names_of([f"class {i}" for i in range(C)]), label2id=None)
    assert accuracy(given, tmp_path / "a.parquet") == 1.0


@pytest.mark.parametrize("label2id", [None, {"LABEL_0": 0, "LABEL_1": 1}, {name: i for i, name in enumerate(WORDS)}])
def test_configurations_with_id2label_alone(teacher: Path, tmp_path: Path, label2id: dict[str, int] | None) -> None:
    given = called(teacher, tmp_path / "t", id2label=names_of(WORDS), label2id=label2id)
    built = scenario(given, csv_file(tmp_path / "a.csv", lambda i: WORDS[i]))
    assert float(built.signals.accuracy[0]) == 1.0
    student: Any = built.student.model.config
    assert student.id2label == dict(enumerate(WORDS))
    assert student.label2id == {name: i for i, name in enumerate(WORDS)}


def test_classes_that_differ_in_case_only(teacher: Path, tmp_path: Path) -> None:
    names = ["A", "a", "B", *WORDS[3:]]
    given = called(teacher, tmp_path / "t", id2label=names_of(names), label2id=None)
    built = scenario(given, csv_file(tmp_path / "a.csv", lambda i: names[i]))
    assert float(built.signals.accuracy[0]) == 1.0
    assert built.data.labels.bincount().tolist() == [ROWS // C] * C


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problem_type": "multi_label_classification"}, "for multi label classification; allowed: one label a sample"),
        ({"problem_type": "regression"}, "a model for regression"),
        ({"id2label": {str(i): "same" for i in range(C)}, "label2id": None}, "two classes are called 'same'"),
    ],
)
def test_other_problems_are_one_line(teacher: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        scenario(called(teacher, tmp_path / "t", **changes), csv_file(tmp_path / "a.csv", str))
    assert "\n" not in str(error.value)


def test_a_teacher_with_one_output_is_refused(tmp_path: Path) -> None:
    tiny_models.save_tokenizer(tmp_path / "t", WORDS)
    tiny_models.tiny("bert", 1).save_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match="with 1 output, as a regression has"):
        scenario(tmp_path / "t", csv_file(tmp_path / "a.csv", str))


def test_a_teacher_at_chance_is_warned_of(caplog: pytest.LogCaptureFixture, teacher: Path, tmp_path: Path) -> None:
    wrong = scenario(teacher, csv_file(tmp_path / "a.csv", lambda i: (i + 1) % C))
    assert "WARNING: the teacher is at or below chance" in wrong.report
    assert any("WARNING: the teacher is at or below chance" in line for line in caplog.messages)
    assert any(line.startswith("training: 12 windows of 100 steps of 32 samples, ") for line in caplog.messages)
    right = scenario(teacher, csv_file(tmp_path / "b.csv", str))
    assert "WARNING" not in right.report
    assert "the teacher answers 1.000 of the validation samples correctly" in right.report


def test_numbers_for_names_need_the_option(teacher: Path, tmp_path: Path) -> None:
    given = called(teacher, tmp_path / "t", id2label=names_of(WORDS), label2id=None)
    path = csv_file(tmp_path / "a.csv", lambda i: C - 1 - i)
    with pytest.raises(UserError, match=r"row 1: got label '11'; .*--columns\.classes"):
        scenario(given, path)
    assert accuracy(given, path, classes=WORDS[::-1]) == 1.0


def test_the_cache_is_of_these_rows_and_this_configuration(
    caplog: pytest.LogCaptureFixture, teacher: Path, tmp_path: Path
) -> None:
    path = csv_file(tmp_path / "a.csv", str)
    told = path.stat()
    assert float(scenario(teacher, path).signals.accuracy[0]) == 1.0
    csv_file(path, lambda i: str(i ^ 1))  # the same size
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert path.stat().st_size == told.st_size
    assert float(scenario(teacher, path).signals.accuracy[0]) == 0.0
    caplog.clear()
    other = called(teacher, tmp_path / "t", hidden_act="relu")  # the same weights
    scenario(other, path)
    passes = [line for line in caplog.messages if "one pass of the teacher" in line]
    assert len(passes) == 1


def test_grey_images_of_16_bits_and_600_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    t = tiny_models.need_transformers()
    levels, names = (40, 120, 220), ("dark", "middle", "light")
    model = tiny_models.tiny("vit", num_classes=3)
    processor = t.ViTImageProcessorPil(size={"height": 16, "width": 16})
    pictures = [image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in levels]
    fit(model, dict(processor(images=pictures, return_tensors="pt")), torch.arange(3))
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    for i in range(600):
        folder = tmp_path / "pictures" / names[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 16), levels[i % 3] * 257, np.uint16)
        pixels[0, i % 16] += 256 * (i // 16 % 16)  # no two are equal
        image.fromarray(pixels).save(folder / f"{'test_' if i % 20 < 3 else 'p'}{i}.png")
    built = scenario(tmp_path / "vit", tmp_path / "pictures")
    assert float(built.signals.accuracy[0]) == 1.0
    assert "600 files seen, 600 used" in built.report
    assert "600 images have 16 bits a pixel" in built.report
    assert sum(len(index) for index in built.data.splits.values()) == 600
