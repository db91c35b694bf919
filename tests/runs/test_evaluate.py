"""`rlkd evaluate` and `rlkd inspect-teacher` on digits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rlkd.cli.main import main
from rlkd.compression import CompactStudent, compact, save_student
from rlkd.configs.knowledge import EvaluateConfig, InspectConfig
from rlkd.data import load_dataset
from rlkd.errors import UserError
from rlkd.models import ChainStudent, StudentConfig, build_student, initialise
from rlkd.runs.evaluate import evaluate_student, student_features
from rlkd.runs.inspect_teacher import TeacherReport, inspect_teacher
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig, load_teachers

TEACHER = TeacherConfig(widths=(24,), num_samples=(600,), num_steps=200)
DIGITS = load_dataset("digits")


@pytest.fixture(scope="module")
def teacher() -> ChainStudent:
    return load_teachers(TEACHER, DIGITS)[0]


def test_a_student_that_is_its_teacher_agrees_in_everything(teacher: ChainStudent) -> None:
    student = compact(teacher, teacher.full_masks(), 1.0)
    metrics = evaluate_student(student, EvaluateConfig(teacher=TEACHER, transfer="digits"))
    for name in ("agreement_top1", "agreement_top5", "knowledge_coverage", "gradient_cosine"):
        assert metrics[name] == pytest.approx(1.0, abs=1e-5), name
    assert metrics["js_divergence_nats"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["accuracy"] == metrics["teacher_accuracy"] > 0.7
    assert metrics["ece"] == pytest.approx(metrics["teacher_ece"])
    assert metrics["flops_per_sample"] == 2 * (64 * 24 + 24 * 10)
    assert metrics["flops_per_accuracy"] == pytest.approx(3552 / metrics["accuracy"])
    # attacks leave less than corruptions, and ten steps less than one
    assert metrics["pgd10_accuracy"] <= metrics["fgsm_accuracy"] < metrics["accuracy"]
    assert set(metrics["corruptions"]) == {"noise", "missing", "contrast", "shift"}
    assert metrics["corruption_shift"] > 0
    assert metrics["transfer"]["student"] == metrics["transfer"]["teacher"] > 0.7


def early_exit(inputs_kept: int) -> CompactStudent:
    student = build_student(StudentConfig(widths=(12, 8), exits=(1,)), DIGITS.input_shape, 10)
    initialise(student, torch.Generator().manual_seed(0))
    masks = list(student.full_masks())
    masks[0][inputs_kept:] = 0
    return compact(student, tuple(masks), 0.3)


def test_students_with_early_exits_and_fewer_inputs_are_evaluated(teacher: ChainStudent) -> None:
    student = early_exit(40)
    metrics = evaluate_student(student, EvaluateConfig(teacher=TEACHER))
    first, rest = 2 * (40 * 12 + 12 * 10), 2 * (12 * 8 + 8 * 10)
    assert first < metrics["flops_per_sample"] < first + rest
    assert -1 <= metrics["gradient_cosine"] < 0.9
    assert student_features(student, DIGITS.inputs[:3]).shape == (3, 8)


def test_a_student_of_other_data_is_refused(teacher: ChainStudent) -> None:
    with pytest.raises(UserError, match="data: got wine, 3 classes for inputs of 13 values"):
        evaluate_student(early_exit(64), EvaluateConfig("wine", teacher=TEACHER))
    with pytest.raises(UserError, match="transfer: got wine"):
        evaluate_student(early_exit(64), EvaluateConfig(teacher=TEACHER, transfer="wine"))


def test_the_command_writes_table_json_and_figure(
    teacher: ChainStudent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(early_exit(64), tmp_path / "student", {})
    options = ["--teacher.widths", "[24]", "--teacher.num_samples", "[600]", "--teacher.num_steps", "200"]
    assert main(["evaluate", str(tmp_path / "student"), *options, "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert all(name in printed for name in written if name not in ("data", "num_samples"))
    assert (tmp_path / "report" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_small_teacher_is_reported_with_warnings() -> None:
    config = InspectConfig(
        teacher=TEACHER, train=TrainConfig(steps_per_window=3, batch_size=16), num_windows=2, num_students=2
    )
    report = inspect_teacher(config)
    assert report.teacher_accuracy > 0.6
    # 64 * 24 + 24 + 24 * 10 + 10 over the default student of two layers of 48 and two heads
    num_student = 64 * 48 + 48 + 48 * 48 + 48 + 2 * (48 * 10 + 10)
    assert report.size_ratio == pytest.approx((64 * 24 + 24 + 24 * 10 + 10) / num_student)
    assert report.expected_low <= report.expected_accuracy <= report.expected_high
    assert any("times as large" in line for line in report.warnings())


def test_warnings_by_hand() -> None:
    fine = TeacherReport(0.95, 0.9, 0.1, 10.0, "mlp", "mlp", 0.02, 0.9, 0.88, 0.92)
    assert fine.warnings() == []
    for change, message in (
        ({"teacher_accuracy": 0.1}, "no better than the commonest class"),
        ({"teacher_accuracy": 0.89}, "weak: 0.890, below 0.9"),
        ({"size_ratio": 2.0}, "only 2.0 times"),
        ({"size_ratio": 50.0}, "assistant of middle size"),
        ({"student_kind": "conv"}, "a mlp teaches a conv"),
        ({"teacher_ece": 0.2}, "off by 0.200"),
        ({"expected_low": 0.96}, "little to learn"),
    ):
        lines = dataclasses.replace(fine, **change).warnings()
        assert any(message in line for line in lines), message


def test_the_report_never_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--teacher.widths", "[24]", "--teacher.num_samples", "[600]", "--teacher.num_steps", "200"]
    options += ["--threshold", "1.0", "--num_windows", "1", "--num_students", "2", "--train.steps_per_window", "2"]
    assert main(["inspect-teacher", *options, "--out", str(tmp_path / "report.json")]) == 0
    assert "warning: the teacher is weak" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["warnings"]
