"""`rlkd export` and `rlkd measure` on the run folder of a real student."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")
pytest.importorskip("transformers", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
import onnxruntime

from rlkd.cli.main import main
from rlkd.cli.verify import config_of_run
from rlkd.compression.real.student_folder import PLAIN
from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError
from rlkd.runs.measure import open_against
from rlkd.runs.shipped import open_shipped, teacher_answers

pytestmark = pytest.mark.slow
QUICK = ["--num_windows", "2", "--train.steps_per_window", "2", "--train.batch_size", "8", "--cost.batch_size", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on texts."""
    place = tmp_path_factory.mktemp("place")
    tiny_models.save_policy(place / "policy")
    teacher = tiny_models.tiny("bert", layers=3)
    teacher.config.id2label, teacher.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    teacher.save_pretrained(place / "bert")
    tiny_models.save_tokenizer(place / "bert")
    draw = random.Random(0)
    with (place / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "source"])
        for i in range(120):
            words = [draw.choice(tiny_models.WORDS[i % 2 :: 2]), *draw.choices(("the", "film", "was"), k=2 + i % 4)]
            rows.writerow([" ".join(words), "pos" if i % 2 else "neg", f"review {i // 3}"])
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv"), "--cut.layers", "2"]
    out = place / "run"
    assert main(["distil", "--policy", str(place / "policy"), "--out", str(out), *QUICK, *options]) == 0
    return out


def test_to_onnx_with_integers(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path), "--int8", "--most_lost", "100", "--qat", "8"]) == 0
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["parity"]["largest"] < 1e-4
    forms = {row["form"]: row for row in report["int8"]["forms"]}
    assert set(forms) == {"float32", "int8 dynamic", "int8 static", "int8 aware dynamic"}
    result = json.loads((run / "result.json").read_text())
    assert forms["float32"]["test_accuracy"] == pytest.approx(result["methods"]["policy"]["accuracy"])
    session = onnxruntime.InferenceSession(str(tmp_path / "model_int8.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.randint(5, 15, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    given = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    assert session.run(None, given)[0].shape == (3, 2)
    assert "input `input_ids`: int64 [batch, length]" in (tmp_path / "README.md").read_text()


def test_to_a_folder_of_transformers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["export", str(run), "--to", "hf", "--out", str(tmp_path)])
    if not (run / "student" / PLAIN).exists():  # the policy had heads cut, which a BERT's configuration cannot say
        assert code == 2
        assert "transformers' configuration cannot say" in capsys.readouterr().err
        return
    assert code == 0
    t = tiny_models.need_transformers()
    model = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert t.AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()["good"] == 5
    assert (tmp_path / "README.md").read_text().count("AutoModelForSequenceClassification") == 2


def test_a_teacher_with_its_classes_in_another_order_is_refused(run: Path, tmp_path: Path) -> None:
    opened = open_shipped(run, config_of_run, None)
    assert opened.open_teacher is not None
    rows = opened.splits["train"][:5]
    assert opened.open_teacher()(rows).shape == (5, 2)
    shutil.copytree(run.parent / "bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config |= {"id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    columns = config_of_run(run, RealConfig)[0].columns
    with pytest.raises(UserError, match="orders its classes in another way than its student"):
        teacher_answers(opened, str(tmp_path / "bert"), columns, run.parent / "reviews.csv")


def test_measured_beside_its_teacher(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    assert main(["measure", str(run), "--against", "teacher", "--batch_sizes", "[2]", "--out", str(out)]) == 0
    rows = {row["form"]: row for row in json.loads(out.read_text())["forms"]}
    assert set(rows) == {"student, torch", "student, onnxruntime", "against, torch", "against, onnxruntime"}
    assert rows["student, torch"]["macs"] < rows["against, torch"]["macs"]
    assert rows["student, torch"]["accuracy"] == rows["student, onnxruntime"]["accuracy"]
    assert rows["against, torch"]["accuracy"] == rows["against, onnxruntime"]["accuracy"]
    assert rows["against, torch"]["file_bytes"] is None


def test_a_teacher_answers_the_data_that_its_student_is_given(run: Path, tmp_path: Path) -> None:
    config = config_of_run(run, RealConfig)[0]
    lines = Path(config.data).read_text().splitlines(keepends=True)
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(lines[: len(lines) // 2]))
    opened = open_shipped(run, config_of_run, str(fewer))
    teacher = open_against("teacher", opened, config_of_run, str(fewer))
    assert torch.equal(teacher.labels, opened.labels)
    assert len(teacher.labels) < len(open_shipped(run, config_of_run, None).labels)
