"""Students of real models on disk: what loads them, and what is refused."""

import copy
import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save
from shipped_students import KINDS, quarter, trained

from rlkd.compression.real.choice import unit_masks
from rlkd.compression.real.cut import ship
from rlkd.compression.real.shipped import ShippedStudent
from rlkd.compression.real.student_folder import CUT, EXITS, PLAIN, load_module_student, save_module_student
from rlkd.compression.real.trial import largest_difference
from rlkd.errors import UserError
from rlkd.models.chain import Masks
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.blocks import group_importance
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind

WRONG: dict[str, Any] = {
    "kind": "causal",
    "blocks": [],
    "attention": "all",
    "exits": [3, 1],
    "patience": -1,
    "threshold": 10**400,
    "select_after": 99,
    "keep": None,
    "num_classes": 2**40,
    "drops_rows": 1,
    "gone": "all",
    "skipped": ["bert.encoder.layer.9"],
    "more": 0,
}
READER = "bert.encoder.layer.0.attention.output.dense.weight"
CAUSAL_WRONG: dict[str, Any] = {
    "num_classes": 41,  # the vocabulary has 40
    "select_after": 1,
    "exits": [1],  # the file has two
    "kind": "sequence_classification",
}


@pytest.mark.parametrize(
    ("family", "kinds"), [("bert", ("units",)), ("vit", ("units", "heads")), ("llama_classifier", ("units", "heads"))]
)
def test_transformers_loads_what_a_configuration_can_say(tmp_path: Path, family: str, kinds: tuple[str, ...]) -> None:
    student, kind = trained(family, AttachConfig()), KINDS.get(family, "sequence_classification")
    masks = quarter(student.plan, kinds)
    shipped = ship(student, kind, masks, 1.0, 0.55)
    save_module_student(shipped, tmp_path / "s", None, {"figures": {"accuracy": 0.5}})
    t = tiny_models.need_transformers()
    auto = t.AutoModelForImageClassification if family == "vit" else t.AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / "s" / "model", attn_implementation="eager").eval()
    assert plain.config.intermediate_size == 16
    assert "transformers" in json.loads((tmp_path / "s" / "student.json").read_text())["loads_with"]
    inputs = tiny_models.batch(family, size=12)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, student(inputs, masks, 1.0).logits[-1])
        loaded = load_module_student(tmp_path / "s")
        torch.testing.assert_close(loaded(**inputs), shipped(**inputs))


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama_classifier", "vit", *tiny_models.CONV_FAMILIES])
def test_rlkd_alone_loads_what_no_configuration_can_say(tmp_path: Path, family: str) -> None:
    student, kind = trained(family, AttachConfig()), KINDS.get(family, "sequence_classification")
    masks = tuple((torch.arange(g.size) < max(1, g.size // (2 + i))).float() for i, g in enumerate(student.plan.groups))
    shipped = ship(student, kind, masks, 1.0, 1.0)
    save_module_student(shipped, tmp_path / "s", None, {})
    assert json.loads((tmp_path / "s" / "student.json").read_text())["loads_with"] == "rlkd"
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # not a model with other weights
        type(student.model).from_pretrained(tmp_path / "s" / "model")  # type: ignore[attr-defined]
    inputs = tiny_models.batch(family, size=12)
    loaded = load_module_student(tmp_path / "s")
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in student.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs), student(inputs, masks, 1.0).logits[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit", "resnet", "llama_classifier", "llama"])
def test_parts_behind_an_exit_that_every_sample_takes_are_gone(tmp_path: Path, family: str) -> None:
    is_causal = family == "llama"
    kind: Kind = "causal_lm" if is_causal else KINDS.get(family, "sequence_classification")
    if is_causal:
        model, inputs = tiny_models.tiny("llama", layers=3), tiny_models.batch("llama")
        student = Instrumented(model, make_plan(model, inputs, AttachConfig(exits=(1, 2)), None), []).eval()
    else:
        inputs = tiny_models.batch(family, size=12)
        student = trained(family, AttachConfig(exits=(1,) if family == "resnet" else (1, 2)))
    plan = student.plan
    masks = quarter(plan, ("units", "heads", "channels"))
    shipped = ship(student, kind, masks, 1.0, 0.0)
    assert (shipped.shipment.exits, len(shipped.heads)) == ((1,), 1)
    save_module_student(shipped, tmp_path / "s", None, {})
    loaded = load_module_student(tmp_path / "s")
    for path in (*plan.blocks[1:], *plan.after):
        assert not list(loaded.model.get_submodule(path).parameters())
    assert list(loaded.model.get_submodule(plan.blocks[0]).parameters())
    with torch.no_grad():
        wanted = student(inputs, masks, 1.0).logits[0]
        real = inputs["attention_mask"].bool() if is_causal else torch.ones(len(wanted)).bool()
        torch.testing.assert_close(loaded(**inputs)[real], wanted[real], atol=1e-5, rtol=1e-5)


def without_blocks(family: str, share: float, exits: tuple[int, ...] = ()) -> tuple[Instrumented, Masks]:
    """A student of four blocks that skips some, with weights so large that every block counts, and its masks."""
    model, inputs = tiny_models.loud(tiny_models.tiny(family, layers=4)), tiny_models.batch(family)
    plan = make_plan(model, inputs, AttachConfig(units="depth", exits=exits), None)
    student = Instrumented(model, plan, []).eval()
    torch.manual_seed(0)
    for head in student.heads:
        torch.nn.init.normal_(head.weight, std=0.15)
    return student, unit_masks(plan, group_importance(model, plan.groups), torch.tensor(share))


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "llama_classifier", "llama"])
@pytest.mark.parametrize(("share", "num_skipped"), [(0.5, 2), (0.65, 1), (0.2, 3), (0.9, 0)])
def test_skipped_blocks_are_not_in_the_shipped_student(
    tmp_path: Path, family: str, share: float, num_skipped: int
) -> None:
    kind: Kind = "causal_lm" if family == "llama" else KINDS.get(family, "sequence_classification")
    student, masks = without_blocks(family, share)
    plan, inputs = student.plan, tiny_models.batch(family, size=12)
    shipped = ship(student, kind, masks, 1.0, 1.0)
    skipped = sorted(plan.order[len(plan.order) - num_skipped :])
    assert shipped.shipment.skipped == tuple(plan.blocks[number - 1] for number in skipped)
    for number, path in enumerate(plan.blocks, start=1):
        assert any(True for _ in shipped.model.get_submodule(path).parameters()) == (number not in skipped)
    save_module_student(shipped, tmp_path / "s", None, {})
    loaded = load_module_student(tmp_path / "s")
    with torch.no_grad():
        wanted = student(inputs, masks, 1.0).logits[-1]
        dense = student(inputs, tuple(torch.ones_like(mask) for mask in masks), 1.0).logits[-1]
        real = inputs["attention_mask"].bool() if family == "llama" else torch.ones(len(wanted)).bool()
        assert float((dense - wanted)[real].abs().max()) > 1e-3  # what was left out counted
        for answers in (shipped(**inputs), loaded(**inputs)):
            torch.testing.assert_close(answers[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.55])
def test_skipped_blocks_with_exits_and_left_out_tokens(tmp_path: Path, threshold: float) -> None:
    """Blocks that are both skipped and behind the exit that all samples take are gone."""
    student, masks = without_blocks("bert", 0.5, exits=(2, 3))
    inputs = tiny_models.batch("bert", size=12)
    shipped = ship(student, "sequence_classification", masks, 0.5, threshold)
    save_module_student(shipped, tmp_path / "s", None, {})
    loaded = load_module_student(tmp_path / "s")
    assert set(shipped.shipment.skipped) & set(shipped.shipment.gone) == set()
    for answers in (shipped, loaded):
        gap = largest_difference(student, answers, inputs, masks, keep=0.5, threshold=threshold)
        assert gap < 1e-5
    assert largest_difference(student, loaded, inputs, masks, keep=0.5, threshold=1.0) > 1e-4


def saved(tmp_path: Path) -> Path:
    student = trained("bert", AttachConfig())
    masks = tuple(torch.ones(g.size) for g in student.plan.groups)
    shipped: ShippedStudent = ship(copy.deepcopy(student), "sequence_classification", masks, 1.0, 0.6)
    save_module_student(shipped, tmp_path / "s", None, {})
    return tmp_path / "s"


@pytest.mark.parametrize("name", ["student.json", "exits.safetensors", "model/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    folder = saved(tmp_path)
    path = folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError) as error:
        load_module_student(folder)
    assert "\n" not in str(error.value)


def signed(folder: Path, **changes: Any) -> None:
    """Make the card's checksums right, then change entries of it."""
    card = json.loads((folder / "student.json").read_text())
    weights = CUT if (folder / CUT).exists() else PLAIN
    card["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (EXITS, weights)}
    (folder / "student.json").write_text(json.dumps(card | changes))


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.mark.parametrize("name", ["exits.safetensors", "model/model.safetensors"])
@pytest.mark.parametrize("with_torch", [False, True])
def test_a_pickle_by_another_name_runs_no_code(tmp_path: Path, name: str, with_torch: bool) -> None:
    folder, marker = saved(tmp_path), tmp_path / "ran"
    if with_torch:
        torch.save({"0.weight": Bomb(marker)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    signed(folder)
    with pytest.raises(UserError) as error:
        load_module_student(folder)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    if with_torch:
        torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=False)
    else:
        pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # the bomb was live


@pytest.mark.parametrize("name", ["student.json", "exits.safetensors", "model", "model/model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")  # sound, but elsewhere
    with pytest.raises(UserError, match="leads out of"):
        load_module_student(folder)


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**9), ("depths", [3, 10**9])])
def test_a_model_that_claims_layers_without_end_is_not_built(tmp_path: Path, name: str, value: object) -> None:
    folder = saved(tmp_path)
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=f"{name} is 100000000.*the card has 3 blocks"):
        load_module_student(folder)


def test_a_name_in_the_card_that_climbs_out_is_not_followed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for name in ("../pipe", str(tmp_path / "pipe")):
        signed(folder, sha256={"exits.safetensors": "0", name: "0"})
        with pytest.raises(UserError, match="sha256 names"):
            load_module_student(folder)
    signed(folder, sha256={})  # no checksum is no way around the check
    with pytest.raises(UserError, match="sha256 names"):
        load_module_student(folder)


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_card_is_one_line(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    load_module_student(folder)
    card = json.loads((folder / "student.json").read_text())
    signed(folder, shipment={**card["shipment"], name: WRONG[name]})
    with pytest.raises(UserError, match=r"not a (real student's card|student of a real model), or a damaged one"):
        load_module_student(folder)


def saved_cut(tmp_path: Path) -> Path:
    """Heads and units are gone, and all that lies behind the first block."""
    student = trained("bert", AttachConfig())
    masks = quarter(student.plan, ("units", "heads"))
    save_module_student(ship(student, "sequence_classification", masks, 1.0, 0.0), tmp_path / "s", None, {})
    return tmp_path / "s"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"more": torch.ones(2)}, "more of model/cut.safetensors does not fit"),
        ({READER: torch.ones(32, 12)}, "reads 1 of 4 units; no cut leaves that"),
        ({READER: torch.ones(32, 16)}, "does not fit"),  # two heads, where the queries are of one
        ({READER: torch.full((32, 8), float("inf"))}, "holds a non-finite value"),
    ],
)
def test_weights_that_no_cut_leaves_are_refused(tmp_path: Path, changes: dict[str, torch.Tensor], words: str) -> None:
    folder = saved_cut(tmp_path)
    load_module_student(folder)
    path = folder / "model" / "cut.safetensors"
    path.write_bytes(save({**load_file(path), **changes}))
    signed(folder)
    with pytest.raises(UserError, match=words):
        load_module_student(folder)


def test_a_configuration_far_larger_than_the_weights_is_not_built(tmp_path: Path) -> None:
    folder = saved_cut(tmp_path)
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 10**9}))
    with pytest.raises(UserError, match=r"the configuration has \d+ weights, the file"):
        load_module_student(folder)


@pytest.mark.parametrize(
    "skipped",
    [
        ["bert"],
        ["bert.encoder.layer.0"],  # tokens are selected after it
        ["bert.encoder.layer.2"],  # it is gone
        ["bert.encoder.layer.1", "bert.encoder.layer.1"],
        [3],
        "all",
    ],
)
def test_blocks_that_cannot_be_skipped_are_refused(tmp_path: Path, skipped: Any) -> None:
    folder = saved_cut(tmp_path)
    card = json.loads((folder / "student.json").read_text())
    signed(folder, shipment={**card["shipment"], "skipped": skipped, "select_after": 1})
    with pytest.raises(UserError, match=r"shipment\.skipped is .*; allowed: ") as error:
        load_module_student(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gone", [["bert.nowhere"], ["bert"], [3], "all"])
def test_parts_that_cannot_be_gone_are_refused(tmp_path: Path, gone: Any) -> None:
    folder = saved_cut(tmp_path)
    card = json.loads((folder / "student.json").read_text())
    signed(folder, shipment={**card["shipment"], "gone": gone})
    with pytest.raises(UserError) as error:
        load_module_student(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("number", "lacking"), [(2, ("gone", "skipped")), (3, ("skipped",))])
def test_a_student_of_a_format_before_is_loaded(tmp_path: Path, number: int, lacking: tuple[str, ...]) -> None:
    folder, inputs = saved(tmp_path), tiny_models.batch("bert")
    with torch.no_grad():
        wanted = load_module_student(folder)(**inputs)
        card = json.loads((folder / "student.json").read_text())
        shipment = {name: value for name, value in card["shipment"].items() if name not in lacking}
        signed(folder, format=number, shipment=shipment)
        torch.testing.assert_close(load_module_student(folder)(**inputs), wanted, rtol=0, atol=0)


def saved_causal(tmp_path: Path) -> Path:
    model, inputs = tiny_models.tiny("llama", layers=3), tiny_models.batch("llama")
    plan = make_plan(model, inputs, AttachConfig(exits=(1, 2)), None)
    masks = tuple(torch.ones(g.size) for g in plan.groups)
    shipped = ship(Instrumented(model, plan, []), "causal_lm", masks, 1.0, 0.6)
    save_module_student(shipped, tmp_path / "s", None, {})
    return tmp_path / "s"


@pytest.mark.parametrize("name", CAUSAL_WRONG)
def test_an_impossible_card_of_a_language_model_is_one_line(tmp_path: Path, name: str) -> None:
    folder = saved_causal(tmp_path)
    load_module_student(folder)
    card = json.loads((folder / "student.json").read_text())
    attention = [f"{block}.self_attn:1" for block in card["shipment"]["blocks"]]
    signed(folder, shipment={**card["shipment"], "attention": attention, name: CAUSAL_WRONG[name]})
    with pytest.raises(UserError) as error:
        load_module_student(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"1.weight": torch.ones(16)}, r"exit 2 has shape \(16,\); the model's head reads 32"),
        ({"1.weight": torch.ones(40, 32)}, r"1.weight is torch.float32 \[40, 32\]; expected float32 \[32\]"),
        ({"1.weight": torch.ones(32).half()}, r"1.weight is torch.float16"),
        ({"1.weight": torch.full((32,), float("nan"))}, "non-finite"),
        ({"1.bias": torch.ones(32)}, "does not belong in it"),
    ],
)
def test_exits_of_a_language_model_are_norms_that_its_head_reads(
    tmp_path: Path, changes: dict[str, torch.Tensor], words: str
) -> None:
    folder = saved_causal(tmp_path)
    path = folder / "exits.safetensors"
    path.write_bytes(save({**load_file(path), **changes}))
    signed(folder)
    with pytest.raises(UserError, match=words):
        load_module_student(folder)
