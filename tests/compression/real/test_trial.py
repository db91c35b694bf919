"""The dry run before a training: what a model does not bear is switched off or refused, the rest answers the same."""

import copy
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import Tensor, nn

from rlkd.compression.real.cut import ship
from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.compression.real.trial import TOLERANCE, _half_masks, largest_difference, try_out
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, Plan, make_plan
from rlkd.models.real.cutting import StudentCut, student_from_teacher
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind

tiny_models.need_transformers()
LENGTHS = (11, 7, 9, 8, 10)


def inputs_of(model: Any, name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if "Image" in name:
        size = model.config.image_size
        return {"pixel_values": torch.rand(5, 3, size, size, generator=generator)}
    ids = torch.randint(5, architectures.VOCABULARY, (5, max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids[torch.arange(5), torch.tensor(LENGTHS) - 1] = 3  # the end token, which some classifiers read
    return {"input_ids": ids * mask, "attention_mask": mask}


def rows_of(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """All, then two of them alone without their padding."""
    parts = [inputs]
    for i in (0, 1):
        one = {name: values[i : i + 1] for name, values in inputs.items()}
        length = LENGTHS[i] if "attention_mask" in inputs else None
        parts.append({name: values[:, :length] if length else values for name, values in one.items()})
    return parts


def kind_of(name: str) -> Kind:
    if "Image" in name:
        return "image_classification"
    return "sequence_classification" if "Sequence" in name else "causal_lm"


def tried(name: str, attach: AttachConfig | None = None, **changes: Any) -> tuple[nn.Module, Plan]:
    """The default student of a tiny teacher and its plan after the dry run."""
    teacher = architectures.tiny_model(name, **changes)
    student, _ = student_from_teacher(teacher, kind_of(name), StudentCut())
    inputs = inputs_of(student, name)
    plan = make_plan(student, inputs, attach or AttachConfig(), None)
    return student, try_out(student, plan, [], kind_of(name), rows_of(inputs))


@pytest.mark.parametrize(
    "name",
    [
        "FlaubertForSequenceClassification",
        "XLMForSequenceClassification",
        "DebertaV2ForSequenceClassification",
        "BartForSequenceClassification",
        "MobileBertForSequenceClassification",
        "Qwen3MoeForSequenceClassification",
        "GPT2LMHeadModel",
        "Swinv2ForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "ConvNextForImageClassification",
    ],
)
def test_a_shipped_student_answers_as_in_training(name: str, tmp_path: Any) -> None:
    student, plan = tried(name)
    inputs = inputs_of(student, name)
    with Instrumented(student, plan, []).eval() as attached:
        for number, head in enumerate(attached.heads):
            generator = torch.Generator().manual_seed(number)
            for parameter in head.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        masks = tuple((torch.arange(group.size) % 2 == 1).float() for group in plan.groups)
        keep = 0.5 if plan.select_after else 1.0
        with torch.no_grad():
            confidence = attached(inputs, masks, keep).logits[0].softmax(-1).amax(-1).flatten()
        threshold = float(confidence.median()) + 2e-5
        shipped = ship(attached, kind_of(name), masks, keep, threshold)
        save_module_student(shipped, tmp_path / "student", None, {})
        for model in (shipped, load_module_student(tmp_path / "student")):
            for part in rows_of(inputs):
                gap = largest_difference(attached, model, part, masks, keep=keep, threshold=threshold)
                assert gap < TOLERANCE
        if plan.exits:  # the comparison is worth its name: another threshold is seen
            other = largest_difference(attached, shipped, inputs, masks, keep=keep, threshold=1.0)
            assert other > TOLERANCE


@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("RoFormerForSequenceClassification", "feature_keep"),
        ("NomicBertForSequenceClassification", "feature_keep"),
        ("ConvBertForSequenceClassification", "feature_keep"),
        ("EsmForSequenceClassification", "feature_keep"),  # with rotary positions
        ("ConvBertForSequenceClassification", "exit_threshold"),
    ],
)
def test_a_control_that_a_model_does_not_bear_is_switched_off_with_a_warning(
    caplog: pytest.LogCaptureFixture, name: str, control: str
) -> None:
    _, plan = tried(name)
    assert plan.controls[control].startswith("not available: ")
    assert [line.partition(":")[0] for line in caplog.messages].count(control) == 1
    assert all("\n" not in line for line in caplog.messages)
    assert (plan.select_after is None) if control == "feature_keep" else not plan.exits


def test_tokens_that_later_blocks_do_not_place_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    _, plan = tried("EsmForSequenceClassification", position_embedding_type="absolute")
    assert plan.select_after == 1
    assert caplog.messages == []
    _, plan = tried("BertForSequenceClassification")
    assert plan.select_after == 1


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("BertForSequenceClassification", ("units", "heads")),
        ("MobileBertForSequenceClassification", ("units", "heads")),
        ("Olmo2ForCausalLM", ("units",)),  # its norm of queries runs over all heads
        ("ConvNextV2ForImageClassification", ()),  # its norm of a layer runs over all channels
    ],
)
def test_units_that_cannot_be_cut_stay_as_zeros(name: str, cuts: tuple[str, ...]) -> None:
    _, plan = tried(name)
    assert plan.groups
    assert plan.cuts == cuts
    stay = "masked heads stay" if cuts == ("units",) else "masked ones stay"
    assert (stay in plan.controls["unit_keep"]) is (cuts != ("units", "heads"))


def test_blocks_that_are_asked_before_they_run_stay() -> None:
    _, plan = tried("BigBirdForSequenceClassification")  # it tells every block how long the text is
    assert plan.exits
    assert not plan.cuts_depth
    _, plan = tried("BertForSequenceClassification")
    assert plan.cuts_depth


def test_an_efficientnet_loads_its_own_export(tmp_path: Any) -> None:
    model = architectures.tiny_model("EfficientNetForImageClassification")
    config: Any = model.config
    inputs = inputs_of(model, "Image")
    plan = make_plan(model, inputs, AttachConfig(exits=()), None)
    assert config.num_hidden_layers > len(plan.blocks) + 16  # it counts layers inside blocks, too
    with Instrumented(model, plan, []).eval() as attached:
        shipped = ship(attached, "image_classification", (), 1.0, 1.0)
    save_module_student(shipped, tmp_path / "s", None, {})
    with torch.no_grad():
        torch.testing.assert_close(load_module_student(tmp_path / "s")(**inputs), model(**inputs).logits)


class NotANumber(nn.Module):
    """A head without an answer."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., :3] * float("nan")


class Dice(nn.Module):
    """A head that answers at random."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.rand(*hidden.shape[:-1], 3)


@pytest.mark.parametrize(("head", "words"), [(NotANumber, "are not finite"), (Dice, "differ from call to call")])
def test_a_model_without_steady_answers_is_refused(head: type[nn.Module], words: str) -> None:
    model: Any = tiny_models.tiny("bert")
    inputs = inputs_of(model, "Sequence")
    plan = make_plan(model, inputs, AttachConfig(), None)
    model.classifier = head()
    with pytest.raises(UserError, match=words) as error:
        try_out(model, plan, [], "sequence_classification", rows_of(inputs))
    assert "\n" not in str(error.value)


def test_a_language_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="depend on later tokens"):
        tried("BertLMHeadModel")
    _, plan = tried("BertLMHeadModel", is_decoder=True)
    assert plan.exits


def test_a_model_that_cannot_be_exported_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_models.tiny("bert")
    inputs = inputs_of(model, "Sequence")
    plan = make_plan(model, inputs, AttachConfig(), None)
    model.config.hidden_act = "an activation of nobody's"
    with pytest.raises(UserError, match="the dry run before the training failed") as error:
        try_out(model, plan, [], "sequence_classification", rows_of(inputs))
    assert "\n" not in str(error.value)


def test_a_change_that_an_export_loses_is_noticed() -> None:
    model: Any = tiny_models.tiny("bert")
    inputs = inputs_of(model, "Sequence")
    plan = make_plan(model, inputs, AttachConfig(), None)
    model.classifier.register_forward_hook(lambda module, args, output: 2 * output)  # no folder keeps a hook
    with pytest.raises(UserError, match="the shipped model answers otherwise") as error:
        try_out(model, plan, [], "sequence_classification", rows_of(inputs))
    assert "\n" not in str(error.value)


def test_a_training_step_without_finite_gradients_is_refused() -> None:
    model: Any = tiny_models.tiny("bert")
    inputs = inputs_of(model, "Sequence")
    plan = make_plan(model, inputs, AttachConfig(), None)
    model.classifier.register_forward_hook(lambda module, args, output: output + (0 * output).square().sqrt())
    with pytest.raises(UserError, match="gradients that are not finite"):
        try_out(model, plan, [], "sequence_classification", rows_of(inputs))


class Unwritable:
    """A tokenizer that cannot be saved, as some of a class of their own cannot."""

    def save_pretrained(self, folder: object) -> None:
        raise NotImplementedError("this tokenizer cannot be saved")


def test_a_processor_that_cannot_be_exported_is_refused_before_training() -> None:
    model: Any = tiny_models.tiny("bert")
    inputs = inputs_of(model, "Sequence")
    plan = make_plan(model, inputs, AttachConfig(), None)
    with pytest.raises(
        UserError, match=r"dry run before the training failed .*this tokenizer cannot be saved"
    ) as error:
        try_out(model, plan, [], "sequence_classification", rows_of(inputs), processor=Unwritable())
    assert "\n" not in str(error.value)


def test_the_dry_run_changes_nothing() -> None:
    model = tiny_models.tiny("resnet")
    inputs = tiny_models.batch("resnet", size=5)
    before = copy.deepcopy(model.state_dict())
    hooks = num_hooks(model)
    state = torch.random.get_rng_state()
    plan = make_plan(model, inputs, AttachConfig(), None)
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in (0, 1)]
    try_out(model, plan, [], "image_classification", [inputs, *rows])
    torch.testing.assert_close(model.state_dict(), before)  # running means of batch norms, too
    assert num_hooks(model) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ViTForImageClassification", "LlamaForCausalLM"])
def test_the_dry_run_skips_blocks_where_depth_is_the_control(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _, plan = tried(name, AttachConfig(units="depth"))
    assert plan.order
    assert plan.controls["unit_keep"].startswith("skips blocks")
    assert not caplog.messages
    halves = [float(mask.sum()) for mask in _half_masks(plan)]
    assert plan.skipped(halves) == tuple(sorted(plan.order[(len(plan.order) + 1) // 2 :]))
    assert plan.skipped(halves)


def test_depth_that_a_model_does_not_bear_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A block that is skipped in the shipped model alone answers otherwise."""
    monkeypatch.setattr(Instrumented, "_skipper", lambda self, number: lambda *given: given[-1])
    _, plan = tried("BertForSequenceClassification", AttachConfig(units="depth"))
    assert plan.controls["unit_keep"].startswith("not available: the shipped model answers otherwise")
    assert (plan.order, plan.groups) == ((), ())
    assert "unit_keep: not available" in caplog.text
