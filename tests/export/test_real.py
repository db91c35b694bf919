"""Real students in onnxruntime answer as in PyTorch: exits, tokens, every kind of input."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

pytest.importorskip("onnx", reason="the extra onnx is not installed: pip install 'rlkd[onnx]'")
pytest.importorskip("transformers", reason="the extra hf is not installed: pip install 'rlkd[hf]'")

from rlkd.compression.real.choice import unit_masks
from rlkd.compression.real.cut import ship
from rlkd.compression.real.shipped import ShippedStudent
from rlkd.compression.real.student_folder import save_module_student
from rlkd.errors import UserError
from rlkd.export import surgery
from rlkd.export.flat import num_early_exits
from rlkd.export.int8 import METHODS, Method, layers_of, quantise, tables_of
from rlkd.export.onnx_file import compare, export_flat, runner_of, session_of
from rlkd.export.runner import PartsRunner
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.blocks import group_importance
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind
from rlkd.runs.export import check_plain, parts_run, write_parts
from rlkd.runs.export_int8 import weight_bytes

KINDS: dict[str, Kind] = {
    **dict.fromkeys(tiny_models.IMAGE_FAMILIES, "image_classification"),
    **dict.fromkeys(("llama", "qwen2", "gpt2"), "causal_lm"),
}


def shipped(family: str, share_left: float | None, patience: int = 0) -> tuple[ShippedStudent, dict[str, Tensor]]:
    """A student whose first exit takes about `share_left` of the samples (None: no early exits), and its inputs."""
    torch.manual_seed(0)
    is_conv = family in tiny_models.CONV_FAMILIES
    model, inputs = tiny_models.tiny(family, layers=3), tiny_models.batch(family, size=51)
    exits = () if share_left is None else (1,) if is_conv else (1, 2)
    plan = make_plan(model, inputs, AttachConfig(exits=exits, patience=patience), None)
    student = Instrumented(model, plan, []).eval()
    for head in student.heads:
        torch.nn.init.normal_(head.weight, std=0.15)
    masks = tuple((torch.arange(g.size) % 2).float() for g in plan.groups)
    keep = 0.5 if plan.select_after else 1.0
    threshold = 1.0
    if share_left is not None:
        with torch.no_grad():
            confidence = student(inputs, masks, keep).logits[0].softmax(-1).amax(-1)
        threshold = float(confidence.flatten().quantile(1 - share_left)) - 1e-6
    kind = KINDS.get(family, "sequence_classification")
    return ship(student, kind, masks, keep, threshold), inputs


def exported(student: ShippedStudent, inputs: dict[str, Tensor]) -> Any:
    few = {name: values[:3] for name, values in inputs.items()}
    return export_flat(student, few, dynamic_length="input_ids" in inputs)


def real_tokens(inputs: Any) -> Tensor | None:
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None


def check(family: str, share_left: float | None, patience: int = 0) -> tuple[ShippedStudent, dict[str, Tensor], Any]:
    student, inputs = shipped(family, share_left, patience)
    graph = exported(student, inputs)
    run = runner_of(session_of(surgery.fold_exits(graph, num_early_exits(student))))
    counts = real_tokens if KINDS.get(family) == "causal_lm" else lambda inputs: None
    index = torch.arange(51)
    parity = compare(run, [student], lambda rows: {n: v[rows] for n, v in inputs.items()}, index, counts)
    assert parity.largest < 1e-4
    assert (parity.num_samples, parity.batch_sizes) == (51, (1, 17))
    if "input_ids" in inputs:  # another length than the one it was traced with
        longer = tiny_models.batch(family, size=2, length=11)
        with torch.no_grad():
            gap = (run(longer) - student(**longer)).abs()
        is_causal = KINDS.get(family) == "causal_lm"
        assert float(gap[longer["attention_mask"].bool()].max() if is_causal else gap.max()) < 1e-4
    return student, inputs, graph


@pytest.mark.slow
def test_a_text_student_with_exits_and_left_out_tokens(tmp_path: Path) -> None:
    student, inputs, graph = check("bert", 0.5)
    assert student.shipment.select_after is not None
    write_parts(surgery.split_parts(graph, 2), tmp_path)
    runner = PartsRunner(tmp_path)
    logits, exits = runner({name: values.numpy() for name, values in inputs.items()})
    assert set(exits.tolist()) == {1, 2, 3}
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), student(**inputs), atol=1e-5, rtol=1e-4)
    one = {name: values[7:8] for name, values in inputs.items()}
    torch.testing.assert_close(parts_run(runner)(one)[0], torch.from_numpy(logits[7]), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("share_left", [None, 0.5])
@pytest.mark.parametrize(
    "family",
    [
        *("bert", "roberta", "electra", "distilbert", "llama_classifier", "vit", "resnet", "resnet_basic"),
        *("convnext", "mobilenet", "llama", "qwen2", "gpt2"),
    ],
)
def test_every_family(family: str, share_left: float | None) -> None:
    if family == "mobilenet" and share_left is not None:
        pytest.skip("its blocks have no exit here")
    check(family, share_left)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "llama"])
@pytest.mark.parametrize("exits", [(), (2,)])
def test_a_student_that_skips_blocks(family: str, exits: tuple[int, ...]) -> None:
    model, inputs = tiny_models.loud(tiny_models.tiny(family, layers=4)), tiny_models.batch(family, size=51)
    plan = make_plan(model, inputs, AttachConfig(exits=exits, units="depth"), None)
    attached = Instrumented(model, plan, []).eval()
    masks = unit_masks(plan, group_importance(model, plan.groups), torch.tensor(0.6))
    keep = 0.5 if plan.select_after else 1.0
    threshold = 1.0
    if exits:
        with torch.no_grad():
            confidence = attached(inputs, masks, keep).logits[0].softmax(-1).amax(-1)
        threshold = float(confidence.flatten().median()) - 1e-6
    student = ship(attached, KINDS.get(family, "sequence_classification"), masks, keep, threshold)
    assert len(student.shipment.skipped) == 1
    run = runner_of(session_of(surgery.fold_exits(exported(student, inputs), num_early_exits(student))))
    counts = real_tokens if KINDS.get(family) == "causal_lm" else lambda inputs: None
    parity = compare(run, [student], lambda rows: {n: v[rows] for n, v in inputs.items()}, torch.arange(51), counts)
    assert parity.largest < 1e-4


class OwnNet(nn.Module):
    """A module of a user's own class, with units that tracing finds."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten()),
        )
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.convolutions(images))
        return logits


def test_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    model, inputs = OwnNet().eval(), {"images": torch.rand(51, 1, 8, 8)}
    plan = make_plan(model, inputs, AttachConfig(exits=()), None)
    assert [group.size for group in plan.groups] == [6, 8]
    masks = tuple((torch.arange(g.size) % 2).float() for g in plan.groups)
    student = ship(Instrumented(model, plan, []).eval(), "module", masks, 1.0, 1.0)
    assert student.model.convolutions[4].weight.shape == (4, 3, 3, 3)
    run = runner_of(session_of(surgery.fold_exits(exported(student, inputs), 0)))
    parity = compare(run, [student], lambda rows: {"images": inputs["images"][rows]}, torch.arange(51))
    assert parity.largest < 1e-4
    assert (parity.num_samples, parity.batch_sizes) == (51, (1, 17))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "num_layers"), [("bert", 3 * 6 + 2), ("resnet", 8)])
@pytest.mark.parametrize("method", METHODS)
def test_int8_of_real_students(family: str, num_layers: int, method: Method) -> None:
    student, inputs = shipped(family, None)
    graph = exported(student, inputs)
    batches = [{name: values[i : i + 17] for name, values in inputs.items()} for i in (0, 17)]
    if family == "bert" or method == "static":
        assert len(layers_of(graph, method)) >= num_layers
    made = quantise(graph, method, batches)
    answer = runner_of(session_of(surgery.fold_exits(made.graph, 0)))(inputs)
    with torch.no_grad():
        wanted = student(**inputs)
    assert 0 < float((answer - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    if family == "bert":  # embeddings, too
        assert len(tables_of(graph)) == 3
        assert tables_of(made.graph) == []
        assert weight_bytes(made.graph) < 0.4 * weight_bytes(graph)
        float_tables = quantise(graph, method, batches, tables_of(graph)).graph
        assert sorted(tables_of(float_tables)) == sorted(tables_of(graph))


@pytest.mark.slow
def test_exits_that_agree_let_samples_leave() -> None:
    check("bert", 0.1, patience=2)


@pytest.mark.parametrize(("family", "is_plain"), [("bert", False), ("vit", True)])
def test_a_student_that_transformers_cannot_load_is_not_exported_for_it(
    family: str, is_plain: bool, tmp_path: Path
) -> None:
    student, _ = shipped(family, None)  # half of the heads are gone, which a BERT's configuration cannot say
    save_module_student(student, tmp_path / "student", None, {})
    if is_plain:
        check_plain(tmp_path / "student")
        return
    with pytest.raises(UserError, match="transformers' configuration cannot say"):
        check_plain(tmp_path / "student")
