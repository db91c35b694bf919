"""MACs of tiny transformers against formulas, and costs against students that are physically smaller."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch

from rlkd.cost.profile import ENERGY_MODEL
from rlkd.cost.real import ModuleProfile, count_work, load_speed, profile_module
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan

L, D, F, C = 7, 32, 64, 2


def profile(family: str = "bert", layers: int = 3, **changes: int) -> ModuleProfile:
    model = tiny_models.tiny(family, layers=layers, **changes)
    inputs = {name: values[:1] for name, values in tiny_models.batch(family).items()}
    plan = make_plan(model, inputs, AttachConfig(), None)
    return ModuleProfile(plan, count_work(model, inputs, plan), 8, 1e-3, 1e-9, dict(ENERGY_MODEL), {})


def kept(p: ModuleProfile, tokens: float = 1.0, units: float = 1.0, heads: float = 1.0) -> torch.Tensor:
    shares = [tokens, *({"units": units, "heads": heads}[g.kind] for g in p.plan.groups)]
    return torch.tensor([[n * s for n, s in zip(p.plan.group_sizes, shares, strict=True)]])


NEVER, ALWAYS, SOME = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.8])
STAY = torch.tensor([[0.0, 1.0]])


def test_dense_macs_by_formula() -> None:
    linear = 4 * L * D * D + 2 * L * D * F
    block = linear + 2 * L * L * D
    work = profile().work
    assert [sum(b.units.macs for b in work.blocks), work.before.macs] == [3 * 2 * L * D * F, 0]
    assert work.blocks[0].products_macs == 2 * L * L * D
    assert work.after.macs == D * D + D * C  # pooler and classifier
    assert work.dense_macs == 3 * block + D * D + D * C


def test_an_image_model_counts_its_patches_before_the_blocks() -> None:
    work = profile("vit").work
    assert work.before.macs == 16 * D * 3 * 4 * 4
    assert work.after.macs == D * C


def test_convolutions_are_counted() -> None:
    work = profile("resnet", layers=2).work
    assert all(b.fixed.macs > 0 and b.units.macs > 0 and b.products_macs == 0 for b in work.blocks)


def test_nothing_saved_is_a_ratio_of_one() -> None:
    p = profile()
    cost = p.cost(kept(p), STAY, NEVER)
    assert [float(x) for x in (cost.macs_ratio, cost.latency_ratio, cost.energy_ratio)] == [1.0, 1.0, 1.0]
    assert float(cost.latency_s) == pytest.approx(1e-3 + 1e-9 * p.work.dense_macs * 8)


def test_masked_units_cost_what_a_smaller_model_costs() -> None:
    p, small = profile(), profile(intermediate_size=16)
    assert float(p.cost(kept(p, units=0.25), STAY, NEVER).macs) == pytest.approx(small.work.dense_macs)


def test_masked_heads_save_projections_and_products() -> None:
    p = profile()
    saved = p.work.dense_macs - float(p.cost(kept(p, heads=0.5), STAY, NEVER).macs)
    assert saved == pytest.approx(3 * 0.5 * (4 * L * D * D + 2 * L * L * D))


def test_tokens_left_out_save_in_later_blocks_alone() -> None:
    p = profile()
    half = float(p.cost(kept(p, tokens=0.5), STAY, NEVER).macs)
    linear, products = 4 * L * D * D + 2 * L * D * F, 2 * L * L * D
    assert p.work.dense_macs - half == pytest.approx(2 * (0.5 * linear + 0.75 * products))


def test_exits_save_what_lies_behind_them() -> None:
    p = profile()
    block = 4 * L * D * D + 2 * L * D * F + 2 * L * L * D
    all_leave = p.cost(kept(p), torch.tensor([[1.0, 0.0]]), ALWAYS)
    assert float(all_leave.macs) == pytest.approx(block + D * C)
    assert float(all_leave.latency_s) == pytest.approx(1e-3 / 3 + 1e-9 * 8 * (block + D * C))
    half = p.cost(kept(p), torch.tensor([[0.5, 0.5]]), SOME)
    rest = 2 * block + D * D + D * C
    assert float(half.macs) == pytest.approx(block + D * C + 0.5 * rest)
    runs = 1 + 2 * (1 - 0.5**8)
    assert float(half.latency_s) == pytest.approx(1e-3 * runs / 3 + 1e-9 * 8 * float(half.macs), rel=1e-5)


def test_a_measured_profile_is_read_back_for_the_same_student_alone(tmp_path: Path) -> None:
    model = tiny_models.tiny("bert")
    inputs = {name: values[:1] for name, values in tiny_models.batch("bert").items()}
    plan = make_plan(model, inputs, AttachConfig(), None)
    measured = profile_module(model, inputs, plan, batch_size=4)
    assert measured.mac_s >= 0
    assert measured.overhead_s + measured.mac_s > 0
    dense = measured.cost(kept(measured), STAY, NEVER)
    points = measured.provenance["points"]
    assert float(dense.latency_s) == pytest.approx(points[0]["latency_s"], rel=0.01)
    measured.save(tmp_path / "p.json")
    again = load_speed(tmp_path / "p.json", measured)
    assert (again.overhead_s, again.mac_s) == (measured.overhead_s, measured.mac_s)
    with pytest.raises(UserError, match="this student's"):
        load_speed(tmp_path / "p.json", profile())
    card = json.loads((tmp_path / "p.json").read_text())
    huge, negative = {**card, "mac_s": 10**400}, {**card, "overhead_s": -1.0}
    for text in ("[]", "{}", "\udcff", json.dumps(huge), json.dumps(negative), json.dumps({**card, "provenance": 3})):
        (tmp_path / "q.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match="not a cost profile"):
            load_speed(tmp_path / "q.json", measured)
    with pytest.raises(UserError, match="cannot read"):
        load_speed(tmp_path / "gone.json", measured)
