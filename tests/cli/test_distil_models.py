"""`rlkd distil --data`: tiny transformers distilled under a policy, from files to a shipped student."""

import csv
import json
import random
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny_models
import torch
from refusals import check_refusals

from rlkd.agents.evaluation.report import read_run
from rlkd.cli.main import main
from rlkd.compression.real.student_folder import load_module_student
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import make_examples, read_table

QUICK = [
    *("--num_windows", "2", "--train.steps_per_window", "2"),
    *("--train.batch_size", "8", "--cost.batch_size", "4", "--cost.batches", "[]"),
    *("--train.learning_rate", "5e-5"),
]
GOOD, BAD = ("good", "fine", "bright", "great"), ("bad", "dull", "slow", "poor")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, text and image teachers, and data."""
    tiny_models.need_transformers()
    t = tiny_models.need_transformers()
    folder = tmp_path_factory.mktemp("place")
    tiny_models.save_policy(folder / "policy")
    teacher = tiny_models.tiny("bert", layers=3)
    teacher.config.id2label, teacher.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    teacher.save_pretrained(folder / "bert")
    tiny_models.save_tokenizer(folder / "bert")
    tiny_models.tiny("vit", num_classes=3).save_pretrained(folder / "vit")
    t.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    draw = random.Random(0)
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "source"])
        for i in range(90):
            words = [draw.choice(GOOD if i % 2 else BAD), *draw.choices(("the", "film", "was", "plot"), k=4)]
            rows.writerow([" ".join(words), "pos" if i % 2 else "neg", f"review {i // 3}"])
    pixels = np.random.default_rng(0).random((60, 3, 16, 16), dtype=np.float32)
    np.savez(folder / "images.npz", inputs=pixels, labels=np.arange(60) % 3)
    np.savez(folder / "two.npz", inputs=pixels, labels=np.arange(60) % 2)
    return folder


def distil(place: Path, out: Path, *options: str) -> int:
    return main(["distil", "--policy", str(place / "policy"), "--out", str(out), *QUICK, *options])


def test_a_text_student_from_files_to_a_shipped_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv"), "--cut.layers", "2"]
    assert distil(place, tmp_path / "a", *options) == 0
    may_be_seen = "rlkd cut the test split itself: if the teacher was trained on these data"
    assert f"WARNING: {may_be_seen}" in " ".join(capsys.readouterr().err.split())
    assert may_be_seen in (tmp_path / "a" / "report.html").read_text()
    result = read_run(tmp_path / "a").result
    assert result is not None
    figures = result["methods"]["policy"]
    assert figures["compacted_accuracy"] == pytest.approx(figures["accuracy"])
    assert 0 < figures["macs_ratio"] < 1.5
    assert figures["macs_of_dense_student"] < figures["macs_of_teacher"]
    assert result["far_from_training"] == {} or all(v > 5 for v in result["far_from_training"].values())
    mapping = (tmp_path / "a" / "mapping.txt").read_text()
    assert "bert.encoder.layer.1" in mapping
    assert "bert.encoder.layer.2" in mapping
    assert "feature_keep" in mapping
    assert "90 rows seen, 90 used" in mapping
    assert "the teacher answers" in mapping
    (row,) = (line for line in mapping.splitlines() if line.startswith("pos "))
    assert row.split() == ["pos", "45", "1", "pos", "name"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["window"] for row in rows] == [1, 2]
    settings = [{k: v for k, v in row.items() if k.startswith("u_")} for row in rows]
    assert settings[0] != settings[1]  # the loop is closed
    for name in ("cost_profile.json", "config.yaml", "versions.json", "report.html"):
        assert (tmp_path / "a" / name).exists()
    assert "transformers" in json.loads((tmp_path / "a" / "versions.json").read_text())

    student = load_module_student(tmp_path / "a" / "student")
    t = tiny_models.need_transformers()
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "a" / "student" / "model")
    table = read_table(place / "reviews.csv", ColumnConfig())
    data = make_examples(table, tokenizer, ("neg", "pos"), ColumnConfig())
    test = data.splits["test"]
    with torch.no_grad():
        answers = student(**data.batch(test)).argmax(-1)
    assert float((answers == data.labels[test]).float().mean()) == pytest.approx(figures["accuracy"])


@pytest.mark.slow
def test_a_real_student_is_verified_from_its_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv"), "--cut.layers", "2"]
    assert distil(place, tmp_path / "a", *options) == 0
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "holds    student compacted_accuracy" in capsys.readouterr().out
    path = tmp_path / "a" / "result.json"
    result = json.loads(path.read_text())
    result["methods"]["policy"]["compacted_accuracy"] += 0.05
    result["methods"]["policy"]["score"] += 0.05
    path.write_text(json.dumps(result))
    assert main(["verify", str(tmp_path / "a")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[:1] in "hd"] == [
        "differs  student compacted_accuracy",
        "differs  student score",
    ]


@pytest.mark.slow
def test_shipped_and_trained_answers_are_compared_in_every_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv"), "--cut.layers", "2"]
    assert distil(place, tmp_path / "a", *options) == 0
    result = read_run(tmp_path / "a").result
    assert result is not None
    assert 0 <= result["methods"]["policy"]["shipped_difference"] < 1e-4
    monkeypatch.setattr(
        "rlkd.runs.distil_real.TOLERANCE", -1.0
    )  # as if the largest difference that was found were too large
    assert distil(place, tmp_path / "b", *options) == 1
    assert "the shipped student answers otherwise than the trained one" in capsys.readouterr().err
    assert (tmp_path / "b" / "result.json").exists()  # and nothing is lost


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FNetForSequenceClassification", "RobertaForSequenceClassification"])
def test_texts_are_made_for_verify_as_they_were_for_the_training(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"max_position_embeddings": 6} if "Roberta" in name else {}  # room for five tokens
    architectures.tiny_model(name, **changes).save_pretrained(tmp_path / "teacher")
    architectures.save_tokenizer(tmp_path / "teacher")
    data = architectures.write_data(tmp_path, "texts")  # of 5 to 11 tokens
    options = ["--teacher", str(tmp_path / "teacher"), "--data", str(data)]
    assert distil(place, tmp_path / "a", *options) == 0
    shown = capsys.readouterr().err
    assert ("longer texts are cut" if changes else "its answers depend on padding") in " ".join(shown.split())
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "holds    student compacted_accuracy" in capsys.readouterr().out
    card = json.loads((tmp_path / "a" / "student" / "student.json").read_text())
    assert card["inputs"] == {"max_length": 5 if changes else 11, "fixed_length": not changes}


@pytest.mark.slow
def test_the_same_seed_and_profile_give_the_same_bytes(place: Path, tmp_path: Path) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv"), "--seed", "5"]
    assert distil(place, tmp_path / "a", *options) == 0
    profile = ["--cost.profile", str(tmp_path / "a" / "cost_profile.json")]
    assert distil(place, tmp_path / "b", *options, *profile) == 0
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("a", "b"))
    assert a == b
    a, b = (next((tmp_path / name / "student" / "model").glob("*.safetensors")) for name in ("a", "b"))
    assert a.name == b.name
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_an_image_student_from_a_configuration(place: Path, tmp_path: Path) -> None:
    config = tiny_models.tiny("vit", num_classes=3, layers=2).config
    config.hidden_size, config.intermediate_size = 16, 32
    config.to_json_file(tmp_path / "small.json", use_diff=False)
    options = ["--teacher", str(place / "vit"), "--data", str(place / "images.npz")]
    assert distil(place, tmp_path / "a", *options, "--student", str(tmp_path / "small.json")) == 0
    assert "linear 16 -> 32" in (tmp_path / "a" / "mapping.txt").read_text()
    student = load_module_student(tmp_path / "a" / "student")
    assert student.model.config.hidden_size == 16
    assert student(pixel_values=torch.rand(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "shape"), [(1, (60, 16, 16)), (3, (60, 16, 16)), (3, (60, 16, 16, 3))])
def test_arrays_of_images_in_every_layout(
    channels: int, shape: tuple[int, ...], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models.tiny("vit", num_classes=3, num_channels=channels).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    np.savez(tmp_path / "images.npz", inputs=pixels, labels=np.arange(60) % 3)
    options = ["--teacher", str(tmp_path / "vit"), "--data", str(tmp_path / "images.npz"), "--cut.layers", "1"]
    assert distil(place, tmp_path / "a", *options) == 0
    assert "60 rows seen, 60 used" in (tmp_path / "a" / "mapping.txt").read_text()
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "holds    student compacted_accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_student_with_a_tokenizer_of_its_own(place: Path, tmp_path: Path) -> None:
    tiny_models.tiny("distilbert").save_pretrained(tmp_path / "student")
    tiny_models.save_tokenizer(tmp_path / "student", list(reversed(tiny_models.WORDS)))
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv")]
    assert distil(place, tmp_path / "a", *options, "--student", str(tmp_path / "student")) == 0
    first = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["accuracy"] >= 0
    t = tiny_models.need_transformers()
    shipped = t.AutoTokenizer.from_pretrained(tmp_path / "a" / "student" / "model")
    assert shipped.get_vocab()["not"] == 5  # the student's, not the teacher's
    assert load_module_student(tmp_path / "a" / "student").model.config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.slow
def test_a_student_whose_depth_is_the_control(place: Path, tmp_path: Path) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "reviews.csv"), "--cut.layers", "3"]
    assert distil(place, tmp_path / "a", *options, "--attach.units", "depth", "--goal.macs", "0.6") == 0
    assert "unit_keep         skips blocks [" in (tmp_path / "a" / "mapping.txt").read_text()
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["methods"]["policy"]["macs_ratio"] <= 0.6
    card = json.loads((tmp_path / "a" / "student" / "student.json").read_text())
    assert card["shipment"]["skipped"] or card["shipment"]["gone"]
    loaded = load_module_student(tmp_path / "a" / "student")
    assert sum(weight.numel() for weight in loaded.parameters()) == result["methods"]["policy"]["parameters"]


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, data = ["--teacher", str(place / "bert")], ["--data", str(place / "reviews.csv")]
    cases = {
        "teacher without data": (teacher, ["--data"]),
        "data without teacher": (data, ["teacher"]),
        "no such teacher": (["--teacher", "./gone", *data], ["gone", "no such folder"]),
        "no such data": ([*teacher, "--data", "gone.csv"], ["gone.csv"]),
        "wrong column": ([*teacher, *data, "--columns.text", "review"], ["'review'", "text, label, source"]),
        "images for a text model": (
            [*teacher, "--data", str(place / "two.npz"), "--columns.classes", "[neg,pos]"],
            ["does not take"],
        ),
        "texts for an image model": (["--teacher", str(place / "vit"), *data], ["got texts"]),
        "names that no label needs": (
            [*teacher, *data, "--columns.classes", "[pos,neg]"],
            ["columns.classes: got [pos, neg], which no label needs"],
        ),
        "blocks that fall": ([*teacher, *data, "--cut.blocks", "[2,1]"], ["cut.blocks: got [2, 1]", "rising"]),
        "too many layers": ([*teacher, *data, "--cut.layers", "9"], ["cut.layers: got 9", "1 to 3"]),
        "unknown key": ([*teacher, *data, "--cut.layer", "2"], ["did you mean --cut.layers"]),
        "device": ([*teacher, *data, "--train.device", "gpu"], ["train.device", "'gpu'"]),
        "exit": ([*teacher, *data, "--attach.exits", "[7]"], ["attach.exits"]),
        "units": ([*teacher, *data, "--attach.units", "height"], ["attach.units"]),
        "profile": ([*teacher, *data, "--cost.profile", "gone.json"], ["gone.json"]),
    }
    check_refusals(lambda name, options: distil(place, tmp_path / name, *options), cases, capsys)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distil", "--data", "x", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--teacher models/bert --data" in out.split("Examples:")[1]
    assert "--attach.patience" in out
