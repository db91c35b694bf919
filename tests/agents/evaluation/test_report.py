import json
import os
import re
import struct
from pathlib import Path

import pytest
from matplotlib.image import imread
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from rlkd.agents.evaluation.figures import accuracy_cost, controls_over_windows, points_of, reward_curves
from rlkd.agents.evaluation.recorded_run import Run
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.evaluation.tensorboard import new_logger, record_evaluation
from rlkd.agents.ppo.evaluation import Evaluation
from rlkd.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run & <b>"
    writer = SummaryWriter(str(run / "tensorboard"))  # type: ignore[no-untyped-call]
    for step in (1, 2, 3):
        writer.add_scalar("student/score", step / 10, step)  # type: ignore[no-untyped-call]
        writer.add_scalar("student/num_trainings", step * 8, step)  # type: ignore[no-untyped-call]
    writer.close()  # type: ignore[no-untyped-call]
    (run / "command.txt").write_text("rlkd train --out '<script>alert(1)</script>'\n")
    figure = {"mean": 0.5, "iqm": 0.51, "ci95": [0.4, 0.6]}
    entry: dict[str, object] = {}
    entry |= dict.fromkeys(("score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio"), figure)
    entry |= {"goal_met": None, "goal_met_within_1_point": 0.9375, "shortfall": 0.0123}
    pair = {"difference": 0.0421, "ci95": [0.03, 0.05], "probability_of_improvement": 0.9}
    table = {"methods": {"policy": entry, "nncf": entry}, "paired": {"policy-nncf": pair}}
    table |= {"name": "keep 0.98 <script>", "goal": {"keep": 0.98, "reference": "dense"}}
    cost = {"agent_trainings": "<script>24", "wall_s": 3.0, "trainings_per_s": 100.0}
    result = {**table, "goals": [table], "cost": cost, "num_tasks": "<script>8", "split": "<script>test"}
    (run / "result.json").write_text(json.dumps(result))
    return run


def test_what_was_written_is_read_back(folder: Path) -> None:
    steps, values = read_run(folder).scalars["student/score"]
    assert steps == [1, 2, 3]
    assert values == pytest.approx([0.1, 0.2, 0.3])


def test_report_draws_and_escapes(folder: Path, tmp_path: Path) -> None:
    paths = write_report([read_run(folder)], tmp_path / "out")
    assert [p.name for p in paths] == [
        "reward_curves.png",
        "accuracy_cost.png",
        "report.html",
    ]  # no control is recorded
    for path in paths[:2]:
        image = imread(path)
        assert image.shape[0] > 300
        assert image.std() > 0.01  # not blank
    text = paths[2].read_text()
    assert "<script>" not in text
    assert "run &amp; &lt;b&gt;" in text
    assert "+0.0421" in text
    assert "93.8%" in text
    assert "0.0123" in text
    assert "keep 0.98 &lt;script&gt;" in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched


def test_a_report_begins_with_name_date_and_verdict(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "tensorboard").iterdir():
        os.utime(file, (1262347200,) * 2)  # noon of 2010-01-01 in UTC
    result = json.loads((folder / "result.json").read_text())
    result |= {"evaluations": [{"score": -0.5}, {"score": 0.3}], "shipped_iteration": 2}
    result["cost"]["agent_trainings"] = 1234
    (folder / "result.json").write_text(json.dumps(result))
    write_report([read_run(folder)], tmp_path / "out")
    head = (tmp_path / "out" / "report.html").read_text().split("<body>")[1][:600]
    assert re.match(r'<h1>run &amp; &lt;b&gt;</h1><p class="date">2010-01-0[12]</p><p class="verdict">', head)
    assert "PPO learned a policy from 1,234 student trainings. On the validation scenarios J rose from -0.500" in head


def one_student_run(folder: Path) -> Run:
    """Two windows of a student with half of the dense MACs, a quarter of the latency, and a larger teacher."""
    timed = {"batch_size": 8, "latency_s": 1e-4, "dense_latency_s": 4e-4, "teacher_latency_s": 1.2e-3, "speedup": 4.0}
    student: dict[str, object] = {"validation_accuracy": 0.9, "accuracy": 0.91, "best_window": 1}
    student |= {"macs_ratio": 0.5, "latency_ratio": 0.3}
    student |= {"macs_of_teacher": 800.0, "macs_of_dense_student": 200.0, "teacher_accuracy": 0.97}
    dense = {"accuracy": 0.95, "macs_ratio": 1.0, "latency_ratio": 1.0}
    measured = {"batch_8": timed, "profile_batch": 8}
    rows = [{"window": w, "temperature": 2.0 * w, "unit_keep": 1 / w, "accuracy": 0.9, "floor": 0.88} for w in (1, 2)]
    return Run(folder, {}, {"methods": {"policy": student, "dense": dense}, "measured": measured}, {}, (), tuple(rows))


def test_teacher_and_dense_student_stand_in_the_plane_of_accuracy_and_cost(tmp_path: Path) -> None:
    found = {label.split(": ")[1]: row for label, _, row in points_of(one_student_run(tmp_path))}
    assert found["policy"] == {"accuracy": 0.91, "macs_ratio": 0.5, "latency_ratio": 0.3}
    assert found["dense"] == {"accuracy": 0.95, "macs_ratio": 1.0, "latency_ratio": 1.0}
    assert found["teacher"] == pytest.approx({"accuracy": 0.97, "macs_ratio": 4.0, "latency_ratio": 3.0})
    for axis in accuracy_cost([one_student_run(tmp_path)]).axes:
        assert "ratio to the dense student" in axis.get_xlabel()
        assert axis.get_title(loc="left")
    assert accuracy_cost([one_student_run(tmp_path)]).axes[0].get_ylabel() == "test accuracy"


def test_controls_are_drawn_over_the_windows_in_their_own_units(tmp_path: Path) -> None:
    axes = {axis.get_title(loc="left"): axis for axis in controls_over_windows([one_student_run(tmp_path)]).axes}
    assert set(axes) == {"temperature", "units kept", "accuracy, and the floor (dashed)"}  # no panel without data
    line, shipped = axes["temperature"].lines
    assert list(line.get_xdata()) == [1.0, 2.0]
    assert list(line.get_ydata()) == [2.0, 4.0]
    assert list(shipped.get_xdata()) == [1, 1]
    assert [axis.get_xlabel() for axis in axes.values()] == ["window"] * 3
    assert axes["units kept"].get_ylabel() == "share of the units"
    assert list(axes["accuracy, and the floor (dashed)"].lines[-1].get_ydata()) == [0.88, 0.88]
    assert controls_over_windows([]).axes == []


def test_evaluations_have_panels_over_trainings_from_the_start_on(folder: Path) -> None:
    assert len(reward_curves([read_run(folder)]).axes) == 1  # what is not recorded has no panel
    logger = new_logger(folder / "tensorboard")
    for iteration, score in ((0, -0.5), (2, 0.3), (3, 0.7)):
        record_evaluation(logger, Evaluation(iteration, score, 0.25, 0.01, 0.5, 0.1), iteration)
    logger.close()
    run = read_run(folder)
    assert {"eval/score", "eval/goal_met", "eval/shortfall", "eval/latency_saving"} <= set(run.scalars)
    first, second, *rest = reward_curves([run]).axes
    assert len(rest) == 1
    (line,) = first.lines
    assert list(line.get_xdata()) == [0, 16, 24]
    assert list(line.get_ydata()) == pytest.approx([-0.5, 0.3, 0.7])
    assert list(second.lines[0].get_ydata()) == [0.25] * 3


def test_a_run_without_a_result_is_drawn_and_says_so(folder: Path, tmp_path: Path) -> None:
    (folder / "result.json").unlink()
    write_report([read_run(folder)], tmp_path / "out")
    assert "no result" in (tmp_path / "out" / "report.html").read_text()


def test_missing_and_damaged_runs_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such run folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no TensorBoard event file"):
        read_run(tmp_path / "empty")
    for text in ("{", "[]", "{}", '{"methods": {}}'):
        (folder / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"result\.json: not a run's result, or a damaged one"):
            read_run(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("goals", 0, "methods", "policy", "score", "mean"), "high"),
        (("goals", 0, "methods", "policy", "accuracy"), 0.5),
        (("goals", 0, "methods", "nncf", "macs_ratio", "mean"), 1e300),
        (("goals", 0, "methods", "nncf", "score", "ci95"), [1.0]),
        (("goals", 0, "paired"), []),
        (("goals", 0, "paired"), {"policy": {}}),
        (("goals",), 3),
        (("goals", 0, "methods", "policy", "shortfall"), "much"),
        (("cost",), None),
        (("cost", "wall_s"), "long"),
    ],
)
def test_a_result_of_another_form_is_refused(folder: Path, keys: tuple[str | int, ...], value: object) -> None:
    card = json.loads((folder / "result.json").read_text())
    place = card
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "result.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"result\.json: not a run's result"):
        read_run(folder)


def test_event_files_that_would_take_memory_or_wait_are_refused(folder: Path) -> None:
    events = folder / "tensorboard"
    damaged = events / "events.out.tfevents.0"
    length = (2**40).to_bytes(8, "little")
    damaged.write_bytes(length + struct.pack("<I", masked_crc32c(length)))  # the checksum is right
    assert "damaged from byte 0 on" in read_run(folder).notes[0]
    assert read_run(folder).scalars["student/score"][0] == [1, 2, 3]
    damaged.unlink()
    os.mkfifo(damaged)
    with pytest.raises(UserError, match="not a file"):
        read_run(folder)
    damaged.unlink()
    damaged.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="leads out of"):
        read_run(folder)
    damaged.unlink()
    with damaged.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1099511627776 bytes; allowed"):
        read_run(folder)
    damaged.unlink()
    sound = next(events.iterdir())
    sound.write_bytes(sound.read_bytes()[:-7])  # a run that is going on: its last record is not whole yet
    run = read_run(folder)
    assert run.scalars["student/score"][0] == [1, 2, 3]
    assert "the last record is not whole" in run.notes[0]


def test_damage_is_noted_and_the_report_says_so(folder: Path, tmp_path: Path) -> None:
    (sound,) = (folder / "tensorboard").iterdir()
    blob = bytearray(sound.read_bytes())
    blob[len(blob) // 2] ^= 1
    sound.write_bytes(blob)
    write_report([read_run(folder)], tmp_path / "out")
    assert "records lost" in (tmp_path / "out" / "report.html").read_text()
    sound.write_bytes(b"not an event file, but a text that is long enough to be one")
    with pytest.raises(UserError, match="damaged from byte 0 on, 1 records lost; 0 records were read"):
        read_run(folder)


def test_a_lost_count_of_trainings_does_not_move_the_points(folder: Path) -> None:
    run = read_run(folder)
    steps, values = run.scalars["student/num_trainings"]
    del steps[1], values[1]
    (line,) = reward_curves([run]).axes[0].lines
    assert list(line.get_xdata()) == [8, 16, 24]


@pytest.mark.parametrize("name", ["日本", "a$b", "$x_{", "_hidden"])
def test_every_name_of_a_run_is_drawn(folder: Path, tmp_path: Path, name: str) -> None:
    run = read_run(folder.rename(folder.parent / name))
    assert len(write_report([run], tmp_path / "out")) == 3  # warnings are errors here
    legend = reward_curves([run]).axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 1


def test_figures_without_a_scale_are_drawn(folder: Path, tmp_path: Path) -> None:
    writer = SummaryWriter(str(folder / "tensorboard"), filename_suffix=".more")  # type: ignore[no-untyped-call]
    for tag in ("student/score", "reward/return", "student/accuracy", "student/num_trainings", "action/temperature"):
        for step, value in ((4, float("nan")), (5, float("inf")), (6, 3e38), (2**62, -3e38)):
            writer.add_scalar(tag, value, step)  # type: ignore[no-untyped-call]
    writer.close()  # type: ignore[no-untyped-call]
    assert len(write_report([read_run(folder)], tmp_path / "out")) == 4
