import json
from pathlib import Path

import pytest
import torch

from rlkd.compression import compact, keep_top
from rlkd.cost import CostProfile, calibrate, dense_workload, load_profile, save_profile, workload
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.errors import UserError
from rlkd.models import StudentConfig, build_student, initialise

MLP = build_student(StudentConfig(), (8, 8), 10)


def macs(kept: list[int], rates: list[float], threshold: float) -> float:
    work = workload(
        MLP, torch.tensor([kept]), torch.tensor([rates]), exit_threshold=torch.tensor([threshold]), batch_size=64
    )
    return float(work.macs)


def test_macs_by_hand() -> None:
    assert float(dense_workload(MLP, 64).macs) == 64 * 48 + 48 * 48 + 48 * 10
    assert macs([32, 24, 12], [0.0, 1.0], 1.0) == 32 * 24 + 24 * 12 + 12 * 10  # no early head
    assert macs([32, 24, 12], [1.0, 0.0], 0.1) == 32 * 24 + 24 * 10  # nothing behind the first exit
    mixed = 32 * 24 + 24 * 10 + 0.75 * (24 * 12 + 12 * 10)  # a quarter leaves
    assert macs([32, 24, 12], [0.25, 0.75], 0.5) == pytest.approx(mixed)


def test_macs_of_a_convolution_by_hand() -> None:
    conv = build_student(StudentConfig("conv", (4, 6), (1,)), (8, 8), 10)
    work = workload(
        conv, torch.tensor([[1, 3, 5]]), torch.tensor([[0.0, 1.0]]), exit_threshold=torch.tensor([1.0]), batch_size=64
    )
    assert float(work.macs) == 9 * 1 * 3 * 16 + 9 * 3 * 5 * 4 + 5 * 4 * 10  # 4x4 and 2x2 positions


def test_counts_of_layers_decisions_and_weights() -> None:
    work = workload(
        MLP, torch.tensor([[32, 24, 12]]), torch.tensor([[0.5, 0.5]]), exit_threshold=torch.tensor([0.7]), batch_size=2
    )
    runs = 1 - 0.5**2  # chance that one of two samples goes on
    assert float(work.layers) == 2 + 2 * runs
    assert float(work.decisions) == 1
    assert float(work.gathers) == 1
    assert float(work.inputs) == 32
    assert float(work.weights) == 33 * 24 + 25 * 10 + runs * (25 * 12 + 13 * 10)
    never = workload(
        MLP, torch.tensor([[64, 24, 12]]), torch.tensor([[0.0, 1.0]]), exit_threshold=torch.tensor([1.0]), batch_size=2
    )
    assert (float(never.layers), float(never.decisions), float(never.gathers)) == (3, 0, 0)


def test_macs_equal_the_compacted_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    student = build_student(StudentConfig(), (8, 8), 10)
    initialise(student, generator)
    masks = tuple(keep_top(torch.rand(1, s, generator=generator), torch.tensor([0.3]))[0] for s in student.group_sizes)
    small = compact(student, masks, 1.0)
    kept = torch.tensor([[m.sum() for m in masks]])
    counted = workload(student, kept, torch.tensor([[0.0, 1.0]]), exit_threshold=torch.ones(1), batch_size=64).macs
    assert float(counted) == sum(m.weight.numel() for m in (*small.layers, *small.heads))


def test_the_dense_student_is_the_anchor(profile_file: Path) -> None:
    profile = load_profile(profile_file)
    cost = profile.cost(MLP, torch.tensor([[64, 48, 48]]), torch.tensor([[0.0, 1.0]]), torch.ones(1))
    for ratio in (cost.latency_ratio, cost.energy_ratio, cost.macs_ratio):
        assert float(ratio) == pytest.approx(1.0)


def test_latency_and_energy_by_hand() -> None:
    profile = CostProfile(64, (2e-6, 1e-5, 1e-11, 0.0, 0.0, 0.0, 0.0, 0.0), dict(ENERGY_MODEL), {})
    cost = profile.cost(MLP, torch.tensor([[64, 48, 48]]), torch.tensor([[0.0, 1.0]]), torch.ones(1))
    assert float(cost.latency_s) == pytest.approx(2e-6 + 3e-5 + 1e-11 * 64 * 5856, rel=1e-5)
    weights, activations = 5856 + 48 + 48 + 10, 48 + 48 + 10
    joules = 5856 * 4.6e-12 + activations * 20e-12 + weights * 50e-12 / 64 + 64 * 10e-12
    assert float(cost.energy_j) == pytest.approx(joules, rel=1e-5)


def test_a_profile_survives_the_disk(tmp_path: Path, profile_file: Path) -> None:
    profile = load_profile(profile_file)
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile


@pytest.mark.parametrize(
    "damage", ["negative", "nan", "missing", "format", "text", "list"], ids=lambda damage: str(damage)
)
def test_a_damaged_profile_is_refused(tmp_path: Path, profile_file: Path, damage: str) -> None:
    card = json.loads(profile_file.read_text())
    if damage == "negative":
        card["coefficients"]["mac_s"] = -1.0
    elif damage == "nan":
        card["energy"]["mac_j"] = float("nan")
    elif damage == "missing":
        del card["coefficients"]["layer_s"]
    elif damage == "format":
        card["format"] = 7
    path = tmp_path / "p.json"
    path.write_text({"text": "not json", "list": "[1]"}.get(damage, json.dumps(card)))
    with pytest.raises(UserError, match=r"p\.json"):
        load_profile(path)
    with pytest.raises(UserError, match="cannot read"):
        load_profile(tmp_path / "nowhere.json")


def test_calibration_fits_finite_costs_that_are_not_negative() -> None:
    profile = calibrate(build_student(StudentConfig(widths=(8, 8)), (8, 8), 10), batch_size=4)
    assert all(c >= 0 for c in profile.coefficients)
    assert sum(profile.coefficients) > 0
    assert {row["exit_rate"] for row in profile.provenance["grid"]} >= {0.0, 1.0, 0.5}
