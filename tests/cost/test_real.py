"""Work of tiny transformers against formulas, costs against shipped students, and the fit of their latency."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

from rlkd.compression.real.choice import unit_masks
from rlkd.compression.real.cut import ship
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.cost.real import OUTSIDE, SHAPE, ModuleProfile, coefficient_names, load_speed, regressors
from rlkd.cost.real_timing import _points, _settings, fit, load_or_measure
from rlkd.cost.real_work import count_work, use_of
from rlkd.errors import UserError
from rlkd.export.measure import count_macs
from rlkd.models.real.attachment import AttachConfig, Plan, make_plan
from rlkd.models.real.blocks import group_importance
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind
from rlkd.models.real.shrink import Gone

L, D, F, C = 7, 32, 64, 2


def profile(family: str = "bert", layers: int = 3, **changes: int) -> ModuleProfile:
    model = tiny_models.tiny(family, layers=layers, **changes)
    inputs = {name: values[:1] for name, values in tiny_models.batch(family).items()}
    plan = make_plan(model, inputs, AttachConfig(exits=(1,)), None)
    work = count_work(model, inputs, plan)
    return ModuleProfile(
        plan, work, 8, tiny_models.even_speed(work, 1e-3 / len(plan.blocks), 1e-9), dict(ENERGY_MODEL), {}
    )


def kept(p: ModuleProfile, tokens: float = 1.0, units: float = 1.0, heads: float = 1.0) -> torch.Tensor:
    shares = [tokens, *({"units": units, "channels": units, "heads": heads}[g.kind] for g in p.plan.groups)]
    return torch.tensor([[n * s for n, s in zip(p.plan.group_sizes, shares, strict=True)]])


NEVER, ALWAYS, SOME = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.8])
STAY = torch.tensor([[0.0, 1.0]])


def test_dense_macs_by_formula() -> None:
    linear = 4 * L * D * D + 2 * L * D * F
    block = linear + 2 * L * L * D
    work = profile().work
    assert [sum(b.groups[0].macs for b in work.blocks), work.before.macs] == [3 * 2 * L * D * F, 0]
    assert work.blocks[0].products_macs == 2 * L * L * D
    assert work.after.macs == D * D + D * C  # pooler and classifier
    assert work.dense_macs == 3 * block + D * D + D * C


def test_an_image_model_counts_its_patches_before_the_blocks() -> None:
    work = profile("vit").work
    assert work.before.macs == 16 * D * 3 * 4 * 4
    assert work.after.macs == D * C


def test_convolutions_are_counted() -> None:
    work = profile("resnet", layers=2).work
    assert all(b.fixed.macs > 0 and b.groups[0].macs > 0 and b.products_macs == 0 for b in work.blocks)


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


KINDS: dict[str, Kind] = {
    "bert": "sequence_classification",
    "distilbert": "sequence_classification",
    "llama_classifier": "sequence_classification",
    "llama": "causal_lm",
    **dict.fromkeys(tiny_models.IMAGE_FAMILIES, "image_classification"),
}


def balanced_masks(plan: Plan, seed: int) -> list[torch.Tensor]:
    """Random masks; of heads that share keys and values, equally many stay for each, as in any trained student."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for group in plan.groups:
        rows = torch.rand(group.size // group.sharing, group.sharing, generator=generator)
        if group.sharing == 1:
            count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
            masks.append((torch.arange(group.size) < count).float()[rows.flatten().argsort()])
        else:
            count = int(torch.randint(1, group.sharing + 1, (1,), generator=generator))
            masks.append((rows.argsort(1) < count).float().flatten())
    return masks


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("when", ["never", "always", "some"])
def test_reported_size_and_macs_are_those_of_the_shipped_student(family: str, when: str) -> None:
    model = tiny_models.tiny(family, layers=3)
    one = {name: values[:1] for name, values in tiny_models.batch(family).items()}
    plan = make_plan(model, one, AttachConfig(), None)
    work = count_work(model, one, plan)
    p = ModuleProfile(plan, work, 8, tiny_models.even_speed(work, 1e-3, 1e-9), dict(ENERGY_MODEL), {})
    masks = balanced_masks(plan, 1)
    threshold = {"never": 1.0, "always": 0.0, "some": 0.9}[when]
    shipped = ship(Instrumented(model, plan, []).eval(), KINDS[family], masks, 1.0, threshold)
    rates = torch.zeros(1, len(plan.exits) + 1)
    rates[0, 0 if when == "always" else -1] = 1.0
    now = torch.tensor([[float(plan.num_positions), *(float(mask.sum()) for mask in masks)]])
    reported = p.cost(now, rates, torch.tensor([threshold]))
    assert float(reported.parameters) == sum(parameter.numel() for parameter in shipped.parameters())
    assert float(reported.size_ratio) < 1.0
    if when == "never":
        assert float(reported.macs) == pytest.approx(count_work(shipped.model, one, plan).dense_macs)
    elif when == "always":  # of the shipped model, count the layers that run
        depth = plan.exits[0]
        left = [path for path in plan.blocks if not isinstance(shipped.model.get_submodule(path), Gone)]
        assert left == list(plan.blocks[:depth])
        small = ship(Instrumented(model, plan, []).eval(), KINDS[family], masks, 1.0, 1.0)
        whole = count_work(small.model, one, plan)
        behind = whole.after.macs + sum(
            b.fixed.macs + sum(g.macs for g in b.groups) + b.products_macs for b in whole.blocks[depth:]
        )
        assert float(reported.macs) == pytest.approx(whole.dense_macs - behind + work.exits[0].macs)


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "llama"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.2])
@pytest.mark.parametrize("when", ["never", "always"])
def test_a_skipped_block_costs_nothing(family: str, share: float, when: str) -> None:
    model = tiny_models.tiny(family, layers=4)
    one = {name: values[:1] for name, values in tiny_models.batch(family).items()}
    plan = make_plan(model, one, AttachConfig(exits=(2,), units="depth"), None)
    work = count_work(model, one, plan)
    p = ModuleProfile(plan, work, 8, tiny_models.even_speed(work, 1e-3, 1e-9), dict(ENERGY_MODEL), {})
    masks = unit_masks(plan, group_importance(model, plan.groups), torch.tensor(share))
    rates, threshold = (STAY, 1.0) if when == "never" else (1 - STAY, 0.0)
    shipped = ship(Instrumented(model, plan, []).eval(), KINDS[family], masks, 1.0, threshold)
    assert shipped.shipment.skipped or when == "always"
    now = torch.tensor([[float(plan.num_positions), *(float(mask.sum()) for mask in masks)]])
    reported = p.cost(now, rates, torch.tensor([threshold]))
    assert float(reported.parameters) == sum(parameter.numel() for parameter in shipped.parameters())
    with torch.no_grad():
        counted = count_macs(lambda given: shipped(**given), [one])
    assert float(reported.macs) == pytest.approx(counted)
    num_run = sum(any(True for _ in shipped.model.get_submodule(path).parameters()) for path in plan.blocks)
    assert float(p.cost(now, rates, torch.tensor([threshold])).latency_s) == pytest.approx(
        1e-3 * num_run + 8e-9 * float(reported.macs), rel=1e-4
    )


def test_copies_that_skip_blocks_are_timed_where_depth_is_the_control() -> None:
    model = tiny_models.tiny("bert", layers=4)
    inputs = {name: values[:1] for name, values in tiny_models.batch("bert").items()}
    skipped = {}
    for units in ("width", "depth"):
        plan = make_plan(model, inputs, AttachConfig(exits=(), units=units), None)  # type: ignore[arg-type]
        work = count_work(model, inputs, plan)
        settings = list(_settings(plan, torch.Generator().manual_seed(0)))
        skipped[units] = [setting.shares.count(0.0) // 2 for setting in settings if 0.0 in setting.shares]
        points = [
            p for s in settings for p in _points(model, torch.nn.ModuleList(), plan, KINDS["bert"], work, s, [inputs])
        ]
        for point in points:
            num_run = 4 - point.setting.shares.count(0.0) // 2
            assert sum(point.amounts[len(OUTSIDE) :: len(SHAPE)]) == num_run
            assert isinstance(point.call, functools.partial)
            shipped = point.call.args[0]
            held = [any(True for _ in shipped.model.get_submodule(path).parameters()) for path in plan.blocks]
            assert sum(held) == num_run
            answers = point.call()
            assert isinstance(answers, torch.Tensor)
            assert answers.shape == (1, C)
    assert skipped == {"width": [], "depth": [1, 2, 3]}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(any(True for _ in model.get_submodule(path).parameters()) for path in plan.blocks)


class OwnNet(nn.Module):
    """Convolutions and linear layers one behind the other: most layers have groups on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in ((1, 6), (6, 8), (8, 10))
        )
        self.hidden = nn.Linear(10 * 4, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            images = stage(images)
        logits: torch.Tensor = self.head(self.hidden(images.flatten(1)).relu())
        return logits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", [None, "*"])
def test_layers_between_two_groups_shrink_with_both(seed: int, blocks: str | None) -> None:
    torch.manual_seed(0)
    model, inputs = OwnNet().eval(), {"images": torch.rand(2, 1, 16, 16)}
    one = {"images": inputs["images"][:1]}
    if blocks:  # all children: the last linear layers are blocks, too
        model = nn.Sequential(*model.stages, nn.Flatten(), model.hidden, nn.ReLU(), model.head).eval()
        inputs, one = {"input": inputs["images"]}, {"input": one["images"]}
    plan = make_plan(model, inputs, AttachConfig(exits=()), None)
    assert [group.size for group in plan.groups] == [6, 8, 10, *([12] if blocks else [])]
    work = count_work(model, one, plan)
    p = ModuleProfile(plan, work, 8, tiny_models.even_speed(work, 1e-3, 1e-9), dict(ENERGY_MODEL), {})
    masks = balanced_masks(plan, seed)
    shipped = ship(Instrumented(model, plan, []).eval(), "module", masks, 1.0, 1.0)
    now = torch.tensor([[1.0, *(float(mask.sum()) for mask in masks)]])
    reported = p.cost(now, torch.ones(1, 1), torch.ones(1))
    assert float(reported.parameters) == sum(parameter.numel() for parameter in shipped.parameters())
    assert float(reported.macs) == pytest.approx(count_work(shipped.model, one, plan).dense_macs)
    dense = p.cost(torch.tensor([[1.0, *(float(g.size) for g in plan.groups)]]), torch.ones(1, 1), torch.ones(1))
    assert float(dense.macs_ratio) == float(dense.size_ratio) == 1.0
    assert float(dense.macs) == work.dense_macs == count_macs(lambda given: model(**given), [one])


def test_blocks_that_stay_count() -> None:
    model = tiny_models.tiny("bert", layers=3)
    one = {name: values[:1] for name, values in tiny_models.batch("bert").items()}
    plan = dataclasses.replace(make_plan(model, one, AttachConfig(exits=(1,)), None), cuts_depth=False)
    p = dataclasses.replace(profile(), plan=plan)
    masks = balanced_masks(plan, 1)
    shipped = ship(Instrumented(model, plan, []).eval(), "sequence_classification", masks, 1.0, 0.0)
    now = torch.tensor([[float(plan.num_positions), *(float(mask.sum()) for mask in masks)]])
    assert float(p.cost(now, 1 - STAY, ALWAYS).parameters) == sum(weight.numel() for weight in shipped.parameters())


def test_groups_that_stay_as_zeros_save_nothing() -> None:
    p = profile()
    zeros = dataclasses.replace(p, plan=dataclasses.replace(p.plan, cuts=("units",)))
    assert float(zeros.cost(kept(p, heads=0.5), STAY, NEVER).macs_ratio) == 1.0
    assert float(zeros.cost(kept(p, units=0.5), STAY, NEVER).macs_ratio) < 1.0


def test_the_fit_finds_the_coefficients_of_a_made_up_machine() -> None:
    p = profile()
    names = coefficient_names(p.work)
    truth = dict.fromkeys(names, 0.0) | {
        "call_s": 1e-4,
        "weight_s": 1e-10,
        "decision_s": 2e-5,
        "block_0_run_s": 3e-4,
        "block_0_linear_mac_s": 2e-10,
        "block_0_product_mac_s": 5e-10,
    }
    rows = []
    for size in (1, 8, 32):
        for share in (1.0, 0.5, 0.25):
            for tokens in (1.0, 0.5):
                for rates, threshold in ((STAY, NEVER), (1 - STAY, ALWAYS), (torch.tensor([[0.5, 0.5]]), SOME)):
                    now = kept(p, tokens, share, 1.0 if tokens == 1.0 else share)[0]
                    use = use_of(p.work, p.plan, now, rates[0], threshold, batch_size=size)
                    rows.append(regressors(use, size))
    amounts = np.array(rows)
    seconds = amounts @ np.array(list(truth.values()))
    found = fit(amounts, seconds)
    np.testing.assert_allclose(amounts @ found, seconds, rtol=1e-6)
    assert (found >= 0).all()


@pytest.mark.parametrize(
    "family", [pytest.param("bert", marks=pytest.mark.slow), "resnet", pytest.param("llama", marks=pytest.mark.slow)]
)
def test_a_measured_profile_is_cached_and_read_back_for_the_same_student_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    model = tiny_models.tiny(family)
    inputs = {name: values[:1] for name, values in tiny_models.batch(family).items()}
    plan = make_plan(model, inputs, AttachConfig(), None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    caplog.set_level("INFO", logger="rlkd")

    def num_timed() -> int:
        return sum(line.startswith("timing physically smaller copies") for line in caplog.messages)

    def get(**options: int) -> ModuleProfile:
        return load_or_measure(model, inputs, plan, KINDS[family], batches=(1,), **{"batch_size": 4, **options})

    measured = get()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert num_timed() == 1
    grid = measured.provenance["grid"]
    assert {point["leaves"] for point in grid} == {"never", "always", "some"}
    assert {point["batch_size"] for point in grid} == {1, 4}
    assert {point["tokens"] for point in grid} == ({1.0, 0.5, 0.25} if family == "bert" else {1.0})
    assert all(point["latency_s"] > 0 for point in grid)
    again = get()
    assert num_timed() == 1  # nothing is timed
    assert again.coefficients == measured.coefficients
    assert get(threads=2).provenance["machine"]["threads"] == 2  # another key
    assert num_timed() == 2
    (path,) = (path for path in tmp_path.iterdir() if again.provenance["read_from"] == path.name)
    sizes = torch.tensor([plan.group_sizes], dtype=torch.float32)
    rates = torch.eye(len(plan.exits) + 1)[-1:]
    assert float(measured.cost(sizes, rates, NEVER).latency_ratio) == 1.0
    assert float(measured.cost(sizes, rates, NEVER).latency_s) > 0
    if family != "bert":
        return
    with pytest.raises(UserError, match="this student's"):
        load_speed(path, plan, profile().work, 4)
    card = json.loads(path.read_text())
    speeds = card["coefficients"]
    for changes in (
        {"call_s": 10**400},
        {"call_s": -1.0},
        {"more": 1.0},
        dict.fromkeys(speeds, 0.0),
    ):
        (tmp_path / "q.json").write_text(json.dumps({**card, "coefficients": {**speeds, **changes}}))
        with pytest.raises(UserError, match="not a cost profile"):
            load_speed(tmp_path / "q.json", plan, measured.work, 4)
    for text in ("[]", "{}", "\udcff", json.dumps({**card, "provenance": 3})):
        (tmp_path / "q.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match="not a cost profile"):
            load_speed(tmp_path / "q.json", plan, measured.work, 4)
    with pytest.raises(UserError, match="cannot read"):
        load_speed(tmp_path / "gone.json", plan, measured.work, 4)
