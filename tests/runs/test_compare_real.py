"""Real students compared: every method trains the same student, rows are kept, and J reads measured latency."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from rlkd.agents.policy.bundled import find_policy
from rlkd.cli.main import main
from rlkd.data import Goal
from rlkd.envs.guard import GuardConfig
from rlkd.envs.real_config import RealCostConfig
from rlkd.errors import UserError
from rlkd.io.records import write_json
from rlkd.models.real.cutting import StudentCut
from rlkd.runs.compare_real import compare_real, guard_of, summary
from rlkd.runs.real_methods import REAL_METHODS, RealCompareConfig
from rlkd.students.real.train_config import ModuleTrainConfig


class Counted:
    """Progress that counts windows."""

    def __init__(self) -> None:
        self.num_windows = 0

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Begin a phase."""

    def advance(self, num_students: int) -> None:
        """Count a window."""
        self.num_windows += num_students

    def figures(self, **values: float) -> None:
        """Show nothing."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    teacher = tiny_models.tiny("vit", layers=3)
    teacher.save_pretrained(folder / "vit")
    size = teacher.config.image_size
    generator = np.random.default_rng(0)
    images = generator.normal(size=(60, teacher.config.num_channels, size, size)).astype(np.float32)
    np.savez(folder / "data.npz", inputs=images, labels=np.arange(60) % len(teacher.config.id2label))
    return folder


@pytest.mark.slow
def test_methods_are_trained_paired_and_resumed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "run"
    code = main(
        [
            *("compare", "--teacher", str(files / "vit"), "--data", str(files / "data.npz"), "--cut.layers", "2"),
            *("--methods", "policy,cubic,smaller", "--shares", "[0.6]", "--num_seeds", "1", "--num_windows", "2"),
            *("--train.steps_per_window", "2", "--train.batch_size", "8", "--train.learning_rate", "1e-3"),
            *("--goal.keep", "0.5", "--cost.batch_size", "4", "--out", str(out)),
        ]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads((out / "result.json").read_text())
    assert list(result["methods"]) == ["plain", "policy", "cubic", "smaller"]
    assert set(result["paired"]) == {"policy-plain", "policy-cubic", "policy-smaller"}
    assert result["methods"]["plain"]["macs_ratio"]["mean"] == 1.0
    assert result["methods"]["smaller"]["macs_ratio"]["mean"] < 0.8  # one of two blocks
    assert result["methods"]["policy"]["speedup_over_teacher"] > 0
    row = json.loads((out / "rows" / "cubic-0.json").read_text())
    assert [window["unit_keep"] for window in row["windows"]] == pytest.approx([1.0, 0.6], abs=1e-4)


@pytest.mark.slow
def test_rows_that_are_there_are_not_trained_again(files: Path, tmp_path: Path) -> None:
    train = ModuleTrainConfig(steps_per_window=2, batch_size=8, learning_rate=1e-3)
    config = RealCompareConfig(
        teacher=str(files / "vit"),
        data=str(files / "data.npz"),
        cut=StudentCut(layers=2),
        methods="smaller",
        num_seeds=1,
        num_windows=1,
        train=train,
        cost=RealCostConfig(batch_size=4),
        goal=Goal(keep=0.5),
    )
    first = compare_real(config, find_policy(None), tmp_path, seed=3, progress=Counted())
    (tmp_path / "rows" / "smaller-3.json").unlink()  # as if the run had been stopped before its last training
    kept = json.loads((tmp_path / "rows" / "plain-3.json").read_text())
    write_json(tmp_path / "rows" / "plain-3.json", {**kept, "teacher_agreement": 0.125})
    second = compare_real(config, find_policy(None), tmp_path, seed=3, progress=(progress := Counted()))
    assert progress.num_windows == 1  # of `smaller` alone
    assert second["seeds"]["plain"][0]["teacher_agreement"] == 0.125
    assert second["seeds"]["smaller"][0]["accuracy"] == first["seeds"]["smaller"][0]["accuracy"]


@pytest.mark.slow
def test_searches_and_patient_exits_are_compared(files: Path, tmp_path: Path) -> None:
    config = RealCompareConfig(
        teacher=str(files / "vit"),
        data=str(files / "data.npz"),
        cut=StudentCut(layers=3, width=0.5),
        methods="pabee,tpe_10",
        num_seeds=1,
        num_windows=1,
        train=ModuleTrainConfig(steps_per_window=1, batch_size=8, learning_rate=1e-3),
        cost=RealCostConfig(batch_size=4),
        goal=Goal(keep=0.5),
    )
    result = compare_real(config, find_policy(None), tmp_path, seed=0, progress=(progress := Counted()))
    assert progress.num_windows == 12  # plain, pabee, ten trials
    assert result["methods"]["tpe_10"]["trainings_per_task"] == 10
    rates = result["seeds"]["pabee"][0]["exit_rates"]
    assert len(rates) == 3  # after blocks 1 and 2, and the end
    assert rates[0] < 1.0  # two in a row cannot agree at the first exit
    assert sum(rates) == pytest.approx(1.0)


def test_trials_of_a_search_learn_from_scores_before() -> None:
    config = RealCompareConfig(teacher="t", data="d")
    bundle = find_policy(None)
    one: Any = SimpleNamespace(num_students=1)

    def points(scores: list[float]) -> list[list[float]]:
        trainings = REAL_METHODS["tpe_25"].trainings(config, bundle, 0)
        controllers = [next(trainings), *(trainings.send(score) for score in scores)]
        return [controller(torch.empty(1, 0), one, 0)[0].tolist() for controller in controllers]

    rising, falling = points([i / 24 for i in range(24)]), points([-i / 24 for i in range(24)])
    assert len(rising) == 25
    assert rising[:9] == falling[:9]  # the published setting with every kind of exit, and with fewer units
    assert rising[-1] != falling[-1]


def test_the_guard_holds_units_of_the_policy_alone() -> None:
    config = RealCompareConfig(teacher="t", data="d", guard=GuardConfig(undo=True))
    assert [name for name in REAL_METHODS if guard_of(name, config).hold] == ["policy"]
    assert all(guard_of(name, config).undo for name in REAL_METHODS)
    assert not guard_of("policy", replace(config, guard=GuardConfig(hold=False))).hold


def test_an_unknown_method_is_refused(files: Path) -> None:
    config = RealCompareConfig(teacher="t", data="d", methods="policy,magic")
    with pytest.raises(UserError, match="methods: got 'magic'; allowed: policy, start, plain"):
        config.check()
    with pytest.raises(UserError, match="'smaller' and --student"):
        RealCompareConfig(teacher="t", data="d", student="s").check()
    with pytest.raises(UserError, match="shares"):
        RealCompareConfig(teacher="t", data="d", shares=()).check()


def a_row(accuracy: float, latency_s: float, energy_j: float, macs: float, **more: Any) -> dict[str, Any]:
    measured = {"latency_s": latency_s, "speedup_over_dense": 4.0 / latency_s, "speedup_over_teacher": 8.0 / latency_s}
    row = {"accuracy": accuracy, "energy_j": energy_j, "macs": macs, "measured": {"batch_8": measured}}
    shared = {"diverged": False, "num_rollbacks": 0, "floor": 0.9, "goal_met": accuracy >= 0.9}
    return {**row, **shared, **more}


def test_scores_by_hand() -> None:
    config = RealCompareConfig(teacher="t", data="d", goal=Goal(keep=0.98), methods="policy", num_seeds=1)
    rows = {"plain": [a_row(0.92, 4.0, 10.0, 100.0)], "policy": [a_row(0.88, 1.0, 2.0, 30.0)]}
    result = summary(rows, config, (0.0, 0.75, 0.25), 0)
    policy = result["methods"]["policy"]
    # three quarters of the latency and four fifths of the energy saved, two points below the floor
    assert policy["score"]["mean"] == pytest.approx(0.75 * 0.75 + 0.25 * 0.8 - 10 * 0.02)
    assert policy["macs_ratio"]["mean"] == pytest.approx(0.3)
    assert policy["goal_met"] == 0.0
    assert policy["shortfall"] == pytest.approx(0.02)
    assert policy["speedup_over_teacher"] == 8.0
    assert result["methods"]["plain"]["score"]["mean"] == 0.0
    assert result["paired"]["policy-plain"]["accuracy_difference"] == pytest.approx(-0.04)


def test_a_diverged_student_saves_nothing() -> None:
    config = RealCompareConfig(teacher="t", data="d", goal=Goal(keep=0.98), methods="policy", num_seeds=1)
    rows = {"plain": [a_row(0.92, 4.0, 10.0, 100.0)], "policy": [a_row(0.88, 1.0, 2.0, 30.0, diverged=True)]}
    policy = summary(rows, config, (0.0, 0.75, 0.25), 0)["methods"]["policy"]
    assert policy["score"]["mean"] == -2.0
    assert policy["accuracy"]["mean"] == 0.0
