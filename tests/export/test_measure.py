"""`rlkd measure`: what is counted and what is reported; no figure of a clock is checked."""

import json
from pathlib import Path

import pytest
import small_students
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")

from rlkd.cli.main import main
from rlkd.cli.measure import shown
from rlkd.export.measure import count_macs, peak_memory_bytes

Capture = pytest.CaptureFixture[str]


def test_macs_by_hand() -> None:
    student, data = small_students.trained_chain(widths=(20, 16, 12), exits=(1, 2), num_steps=1)
    kept = [43, 13, 11, 8]  # two of three of 64, 20, 16 and 12
    assert [layer.weight.shape[0] for layer in student.layers] == kept[1:]
    first = kept[0] * kept[1] + kept[1] * 10
    second = kept[1] * kept[2] + kept[2] * 10
    third = kept[2] * kept[3] + kept[3] * 10
    row = data.inputs[:1]
    never = small_students.CompactStudent(
        list(student.layers), list(student.heads), student.exits, student.input_shape, student.kept_inputs, 0.9999
    )
    always = small_students.CompactStudent(
        list(student.layers), list(student.heads), student.exits, student.input_shape, student.kept_inputs, 0.0
    )
    with torch.no_grad():
        assert count_macs(never, [row]) == first + second + third
        assert count_macs(always, [row]) == first
        assert count_macs(lambda inputs: inputs @ torch.ones(8, 3), [torch.ones(5, 8)]) == 5 * 8 * 3


def test_memory_that_a_student_takes_is_seen() -> None:
    def load() -> object:
        held = torch.ones(16 * 2**20)  # 64 MiB
        return lambda inputs: held.sum()

    peak = peak_memory_bytes(load, torch.ones(1))  # type: ignore[arg-type]
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 * 2**20 < peak < 200 * 2**20


def test_a_student_in_torch_and_onnxruntime_beside_another(tmp_path: Path, capsys: Capture) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, widths in ((small, (12, 8)), (large, (48, 48))):
        student, data = small_students.trained_chain(widths=widths, exits=(1,), threshold=0.8, num_steps=30)
        small_students.save_trained(folder, student, data)
    out = tmp_path / "measured.json"
    options = ["--data", "digits", "--batch_sizes", "[1,8]", "--out", str(out)]
    assert main(["measure", str(small), "--against", str(large), *options]) == 0
    out_text = capsys.readouterr().out
    assert "student, onnxruntime" in out_text
    assert "modelled" in out_text or "measured (RAPL" in out_text
    rows = json.loads(out.read_text())["forms"]
    assert [row["form"] for row in rows] == [
        "student, torch", "student, onnxruntime", "against, torch", "against, onnxruntime",
    ]  # fmt: skip
    assert rows[0]["accuracy"] == rows[1]["accuracy"]  # one student in two forms
    assert rows[0]["macs"] < rows[2]["macs"]
    assert rows[0]["parameters"] < rows[2]["parameters"]
    assert rows[1]["file_bytes"] < rows[3]["file_bytes"]
    for row in rows:
        assert set(row["batches"]) == {"1", "8"}
        for size, at in row["batches"].items():
            assert 0 < at["latency_s"] <= at["p95_s"]
            assert at["throughput_per_s"] == pytest.approx(int(size) / at["latency_s"])
            assert at["accuracy_per_joule"] == pytest.approx(row["accuracy"] / at["energy_j"])
            assert at["threads"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch_sizes", "[0]"], ["--batch_sizes: got [0]"]),
        pytest.param(
            ["--hardware", "gpu"],
            ["--hardware: got gpu, a gpu, and torch finds none here; allowed: a cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--against", "nothing"], ["--against: got 'nothing'", "teacher, or the folder of a student"]),
        (["--against", "teacher"], ["no config.yaml that names a teacher"]),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: list[str], tmp_path: Path, capsys: Capture) -> None:
    student, data = small_students.trained_chain(widths=(12, 8), exits=(1,), num_steps=1)
    small_students.save_trained(tmp_path / "a" / "student", student, data)
    assert main(["measure", str(tmp_path / "a" / "student"), "--data", "digits", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_numbers_have_three_digits_and_a_prefix() -> None:
    given = (1.23456e-5, 0.0999999, 1234567.0, 12.0, 0.0, 999.6)
    assert [shown(value, "s") for value in given] == ["12.3 us", "100 ms", "1.23 Ms", "12.0 s", "0 s", "1.00 ks"]
    assert shown(None) == "-"
