"""`rlkd evaluate` of a student that is a transformers model."""

import csv
import json
from pathlib import Path

import pytest
import tiny_models
import torch

from rlkd.cli.main import main
from rlkd.compression.real.cut import ship
from rlkd.compression.real.student_folder import save_module_student
from rlkd.configs.knowledge import RealEvaluateConfig
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.instrumented import Instrumented
from rlkd.runs.evaluate_real import evaluate_real


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its equal as a student, and data."""
    folder = tmp_path_factory.mktemp("reviews")
    model = tiny_models.tiny("bert")
    model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    model.save_pretrained(folder / "bert")
    tokenizer = tiny_models.save_tokenizer(folder / "bert")
    words = tiny_models.WORDS
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows(
            (f"{words[i % 8]} {words[8 + i % 6]} {words[i % 5]}", "pos" if i % 2 else "neg") for i in range(60)
        )
    inputs = tiny_models.batch("bert", size=4)
    plan = make_plan(model, inputs, AttachConfig(exits=()), None)
    masks = tuple(torch.ones(group.size) for group in plan.groups)
    with Instrumented(model, plan, []) as student:
        save_module_student(
            ship(student, "sequence_classification", masks, 1.0, 1.0), folder / "student", tokenizer, {}
        )
    return folder


def test_a_student_that_is_its_teacher_agrees(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(reviews / "reviews.csv"), "--teacher", str(reviews / "bert"), "--out", str(tmp_path)]
    assert main(["evaluate", str(reviews / "student"), *options]) == 0
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert metrics["agreement_top1"] == 1.0
    assert metrics["js_divergence_nats"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["accuracy"] == metrics["teacher_accuracy"]
    assert metrics["flops_per_sample"] > 0
    assert "fgsm_accuracy" not in metrics  # texts are not attacked
    assert "knowledge_coverage" in capsys.readouterr().out


def test_a_teacher_of_other_classes_is_refused(reviews: Path, tmp_path: Path) -> None:
    other = tiny_models.tiny("bert", seed=1)
    other.config.id2label, other.config.label2id = {0: "pos", 1: "neg"}, {"pos": 0, "neg": 1}
    other.save_pretrained(tmp_path / "other")
    tiny_models.save_tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match="the teacher that it was distilled from"):
        evaluate_real(reviews / "student", RealEvaluateConfig(str(reviews / "reviews.csv"), str(tmp_path / "other")))


def test_a_student_that_rlkd_alone_loads_is_evaluated(reviews: Path, tmp_path: Path) -> None:
    tokenizer = tiny_models.save_tokenizer(tmp_path / "tokenizer")
    model = tiny_models.tiny("bert")
    model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    plan = make_plan(model, tiny_models.batch("bert", size=4), AttachConfig(exits=()), None)
    masks = tuple((torch.arange(group.size) % 2).float() for group in plan.groups)
    with Instrumented(model, plan, []) as student:
        shipped = ship(student, "sequence_classification", masks, 1.0, 1.0)
    save_module_student(shipped, tmp_path / "student", tokenizer, {})
    assert not (tmp_path / "student" / "model" / "model.safetensors").exists()  # no configuration says its heads
    config = RealEvaluateConfig(data=str(reviews / "reviews.csv"), teacher=str(reviews / "bert"))
    assert evaluate_real(tmp_path / "student", config)["num_samples"] > 0
