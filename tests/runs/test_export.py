"""`rlkd export`: from a student's folder to what is deployed."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_students
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")
import onnxruntime

from rlkd.cli.main import main
from rlkd.compression import load_student
from rlkd.data import load_dataset
from rlkd.errors import UserError
from rlkd.export.exits import time_exits, with_threshold
from rlkd.hardware import FOLDER as PROFILES
from rlkd.runs.export_exits import calibrated_exit
from rlkd.runs.shipped import ShippedData

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_students.save_trained(tmp_path_factory.mktemp("a") / "student", *small_students.trained_chain())


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    options = ["--data", "digits", "--out", str(out), "--triton", str(out / "triton"), "--name", "tiny"]
    assert main(["export", str(folder), *options]) == 0
    return out


def test_the_exported_student_is_as_accurate_as_reported(folder: Path, exported: Path) -> None:
    data = load_dataset("digits")
    test = data.splits["test"]
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"inputs": data.inputs[test].flatten(1).numpy()})
    accuracy = float((torch.from_numpy(logits).argmax(-1) == data.labels[test]).float().mean())
    assert accuracy == json.loads((folder / "student.json").read_text())["figures"]["accuracy"]
    report = json.loads((exported / "export.json").read_text())
    assert report["opset"] == 18
    assert 0 < report["parity"]["largest"] < 1e-4
    assert report["parity"]["num_samples"] == 255
    assert report["num_early_exits"] == 2


def test_triton_is_told_what_the_graph_has(exported: Path) -> None:
    text = (exported / "triton" / "tiny" / "config.pbtxt").read_text()
    model = exported / "triton" / "tiny" / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    types = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}
    for word, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        (block,) = re.findall(rf"^{word} \[\n(.*?)\n\]", text, re.DOTALL | re.MULTILINE)
        names, kinds = re.findall(r'name: "(\w+)"', block), re.findall(r"data_type: (\w+)", block)
        dims = [[int(d) for d in row.split(",")] for row in re.findall(r"dims: \[ (.*) \]", block)]
        assert names == [value.name for value in values]
        assert [types[kind] for kind in kinds] == [value.type for value in values]
        assert dims == [[d if isinstance(d, int) else -1 for d in value.shape[1:]] for value in values]
        assert all(isinstance(value.shape[0], str) for value in values)  # the batch, which max_batch_size stands for
    assert 'name: "tiny"' in text
    assert "max_batch_size: 32" in text
    assert text.count("{") == text.count("}")


def test_the_card_says_what_was_made_and_its_python_runs(exported: Path, tmp_path: Path) -> None:
    card = (exported / "README.md").read_text()
    for words in ("accuracy on test data | 0.", "input `inputs`: float [batch, 64]", "divisor 16", "ONNX opset 18"):
        assert words in card
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    script = (
        "import numpy\ninputs = numpy.zeros((2, 64), numpy.float32)\n" + block + "print(logits.shape, exits.shape)\n"
    )
    place = shutil.copytree(exported, tmp_path / "elsewhere")
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 10) (2,)\n"


def test_the_runner_needs_no_rlkd(exported: Path) -> None:
    text = (exported / "parts" / "runner.py").read_text()
    assert "rlkd." not in text
    assert "PartsRunner" in runpy.run_path(str(exported / "parts" / "runner.py"))


def accuracy_at(folder: Path, threshold: float) -> float:
    """On validation."""
    student, data = load_student(folder), load_dataset("digits")
    changed = with_threshold(student, threshold)
    validation = data.splits["validation"]
    with torch.no_grad():
        answers = changed(inputs=data.inputs[validation]).argmax(-1)
    return float((answers == data.labels[validation]).float().mean())


def test_exit_thresholds_are_chosen_on_validation(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = (accuracy_at(folder, 0.1) + accuracy_at(folder, 0.999)) / 2
    options = ["--data", "digits", "--out", str(tmp_path), "--to", "torch", "--exit_accuracy", str(asked)]
    assert main(["export", str(folder), *options]) == 0
    chosen = json.loads((tmp_path / "export.json").read_text())["exits"]
    assert chosen["accuracy"] >= asked
    assert chosen["accuracy"] == pytest.approx(accuracy_at(folder, chosen["threshold"]))
    assert accuracy_at(folder, chosen["threshold"] - 0.02) < asked  # no lower one would do
    assert f"accuracy {chosen['accuracy']:.4f} on validation" in capsys.readouterr().out
    data = load_dataset("digits")
    validation = data.splits["validation"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    right = program(data.inputs[validation].flatten(1)).argmax(-1) == data.labels[validation]
    assert float(right.float().mean()) == pytest.approx(chosen["accuracy"])


def test_exit_thresholds_are_chosen_for_a_latency(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlkd.runs.export_exits.time_exits", lambda *_, **__: [1e-3, 2e-3, 4e-3])  # no clock
    options = ["--data", "digits", "--to", "torch"]
    reached = []
    for asked in ("1.05ms", "0.27", "1x"):
        assert main(["export", str(folder), *options, "--exit_latency", asked, "--out", str(tmp_path / asked)]) == 0
        chosen = json.loads((tmp_path / asked / "export.json").read_text())["exits"]
        took_s = sum(rate * s for rate, s in zip(chosen["exit_rates"], (1e-3, 2e-3, 4e-3), strict=True))
        assert took_s == pytest.approx(chosen["latency_s"])
        assert took_s <= {"1.05ms": 1.05e-3, "0.27": 1.08e-3, "1x": 4e-3}[asked] + 1e-9
        assert chosen["accuracy"] == pytest.approx(accuracy_at(folder, chosen["threshold"]))
        reached.append(chosen["accuracy"])
    assert reached[0] <= reached[1] < reached[2]
    assert reached[2] >= max(accuracy_at(folder, i / 20) for i in range(21))
    assert "for a sample at batch 1 in the mean" in capsys.readouterr().out
    assert main(["export", str(folder), *options, "--exit_latency", "900us", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "--exit_latency: got 900.0 us; allowed: at least 10" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("accuracy", "latency"), [(0.9, None), (None, "2x")])
def test_a_language_model_has_no_threshold_to_choose(folder: Path, accuracy: float | None, latency: str | None) -> None:
    opened = ShippedData(
        folder=folder,
        student=load_student(folder),
        kind="causal_lm",
        data_name="novels",
        batch=lambda rows: {},
        labels=torch.zeros(8, dtype=torch.int64),  # as a language model has them
        splits={"validation": torch.arange(8)},
        has_length=True,
        card={},
    )
    with pytest.raises(UserError, match="got a language model, whose tokens leave one by one"):
        calibrated_exit(opened, accuracy, latency, 1)


def test_parts_up_to_each_exit_are_timed(folder: Path) -> None:
    student, data = load_student(folder).eval(), load_dataset("digits")

    def batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs": data.inputs[rows].flatten(1)}

    validation = data.splits["validation"]
    traced = batch(validation[:3])
    seconds = time_exits(student, batch, validation, traced=traced, has_length=False, threads=1)
    assert len(seconds) == 3
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 1


def test_a_second_export_leaves_no_graph_of_the_first(folder: Path, tmp_path: Path) -> None:
    options = ["--data", "digits", "--out", str(tmp_path)]
    assert main(["export", str(folder), *options, "--int8", "--most_lost", "100"]) == 0
    assert (tmp_path / "model_int8.onnx").exists()
    (tmp_path / "parts" / "mine.txt").write_text("stays")
    assert main(["export", str(folder), *options, "--exits", "if"]) == 0
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"README.md", "export.json", "model.onnx", "parts/mine.txt"}


def test_an_int8_form_with_operators_that_the_target_lacks_is_left_out(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--data", "digits", "--hardware", "edge", "--exits", "parts", "--int8", "--most_lost", "100"]
    assert main(["export", str(folder), *options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "int8 static: edge lacks If; left out" in out
    assert "int8 was taken back: no form that runs on edge" in out
    assert not (tmp_path / "model_int8.onnx").exists()
    assert json.loads((tmp_path / "export.json").read_text())["int8"]["written"] is None


MISTAKES = {
    "no student": (["gone"], ["gone", "student.json"]),
    "no data": (["FOLDER"], ["--data"]),
    "wrong data": (["FOLDER", "--data", "wine"], ["wine has 3 of 13"]),
    "target": (["FOLDER", "--data", "digits", "--to", "tflite"], ["'tflite'", "onnx, torch, hf"]),
    "hf for a chain": (["FOLDER", "--data", "digits", "--to", "hf"], ["got hf for a chain", "onnx, torch"]),
    "exits": (["FOLDER", "--data", "digits", "--exits", "all"], ["both, if, parts"]),
    "tolerance": (["FOLDER", "--data", "digits", "--tolerance", "0"], ["--tolerance: got 0"]),
    "exits asked twice": (
        ["FOLDER", "--data", "digits", "--exit_accuracy", "0.9", "--exit_latency", "2x"],
        ["--exit_accuracy, --exit_latency: got both"],
    ),
    "exit latency": (["FOLDER", "--exit_latency", "3"], ["--exit_latency: got '3'", "or 2x"]),
    "hardware": (["FOLDER", "--data", "digits", "--hardware", "cpux"], ["'cpux'", "did you mean cpu"]),
    "triton of torch": (["FOLDER", "--to", "torch", "--triton", "x"], ["--triton: got --to torch"]),
    "triton name": (["FOLDER", "--data", "digits", "--triton", "x", "--name", "a b"], ["the name 'a b'", "letters"]),
    "int8 of torch": (["FOLDER", "--to", "torch", "--int8"], ["--int8: got --to torch"]),
    "qat alone": (["FOLDER", "--qat", "8"], ["--qat: got it without --int8"]),
    "qat steps": (["FOLDER", "--int8", "--qat", "-1"], ["--qat: got -1"]),
    "most lost": (["FOLDER", "--int8", "--most_lost", "101"], ["--most_lost: got 101; allowed: 0 to 100"]),
    "no teacher": (
        ["FOLDER", "--data", "digits", "--int8", "--qat", "8"],
        ["--qat: got a chain student without"],
    ),
    "accuracy out of reach": (["FOLDER", "--data", "digits", "--exit_accuracy", "0.999"], ["allowed: at most 0.9"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, words = MISTAKES[name]
    assert main(["export", *(str(folder) if given == "FOLDER" else given for given in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlkd: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("precisions", "words"),
    [
        ("[float32]", "--int8: mine takes float32; allowed: a target that takes int8"),
        ("[float16, int8]", "--hardware: mine takes float16, int8; allowed: a target that takes float32"),
    ],
)
def test_a_target_takes_the_precision(
    precisions: str, words: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = (PROFILES / "cpu.yaml").read_text().replace("[float32, int8]", precisions)
    (tmp_path / "mine.yaml").write_text(text)
    options = ["--data", "digits", "--out", str(tmp_path / "out"), "--hardware", str(tmp_path / "mine.yaml"), "--int8"]
    assert main(["export", str(folder), *options]) == 2
    assert words in capsys.readouterr().err


def test_what_differs_from_pytorch_is_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--data", "digits", "--out", str(tmp_path), "--tolerance", "1e-12"]
    assert main(["export", str(folder), *options]) == 2
    assert "model.onnx: differs from PyTorch by" in capsys.readouterr().err


def test_a_target_without_control_flow_takes_parts_alone(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--data", "digits", "--out", str(tmp_path / "out"), "--hardware", "edge"]
    assert main(["export", str(folder), *options]) == 2
    assert "edge lacks If, which this student's graph uses; give --exits parts" in capsys.readouterr().err
    assert main(["export", str(folder), *options, "--exits", "parts"]) == 0
    assert (tmp_path / "out" / "parts" / "part_3.onnx").exists()
    assert not (tmp_path / "out" / "model.onnx").exists()
