"""Exits, masks and left-out tokens attached to tiny transformers."""

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, Plan, control_table, make_plan
from rlkd.models.real.blocks import linear
from rlkd.models.real.hooks import link_places
from rlkd.models.real.instrumented import Instrumented, choose_tokens, received


def attached(family: str, config: AttachConfig | None = None, layers: int = 3) -> Instrumented:
    model, inputs = tiny_models.tiny(family, layers=layers), tiny_models.batch(family)
    plan = make_plan(model, inputs, config or AttachConfig(), None)
    links = link_places(model, model, [plan.blocks[-1]], plan.blocks, inputs, inputs)
    return Instrumented(model, plan, links).eval()


def full(plan: Plan) -> tuple[Tensor, ...]:
    return tuple(torch.ones(group.size) for group in plan.groups)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "vit"])
def test_an_encoder_has_all_controls(family: str) -> None:
    plan = attached(family).plan
    assert plan.select_after == 1
    assert plan.exits == (2,)
    assert plan.num_positions == (17 if family == "vit" else 7)
    assert plan.group_sizes[1:] == (64, 4) * 3
    assert "not available" not in control_table(plan)


def test_a_decoder_s_tokens_stay_because_its_head_reads_the_last() -> None:
    plan = attached("llama_classifier").plan
    assert "more than the first token" in plan.controls["feature_keep"]
    assert plan.group_sizes == (1, *(64, 4) * 3)


@pytest.mark.parametrize(
    ("family", "after"),
    [
        ("bert", ("bert.pooler.dense", "classifier")),
        ("vit", ("vit.layernorm", "classifier")),
        ("llama", ("model.norm",)),  # an exit answers through the model's output layer
        ("resnet", ("classifier.1",)),
    ],
)
def test_what_an_early_exit_does_without(family: str, after: tuple[str, ...]) -> None:
    model, inputs = tiny_models.tiny(family), tiny_models.batch(family)
    assert make_plan(model, inputs, AttachConfig(), None).after == after
    whole: nn.Module = next(module for _, module in model.named_children())
    whole.register_parameter("more", nn.Parameter(torch.zeros(1)))  # it ends behind the last block, and has all of them
    assert make_plan(model, inputs, AttachConfig(), None).after == after


def test_an_output_layer_inside_a_module_of_its_own_stays() -> None:
    t, inputs = tiny_models.need_transformers(), tiny_models.batch("bert")
    config = tiny_models.tiny("bert").config
    config.is_decoder = True
    plan = make_plan(t.BertLMHeadModel(config).eval(), inputs, AttachConfig(), None)
    assert plan.after == ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")  # not its decoder


def test_what_a_convolution_lacks_is_said() -> None:
    plan = attached("resnet").plan
    assert plan.is_conv
    assert plan.group_sizes == (1, 2, 4)  # a bottleneck's width is a quarter of its output
    table = control_table(plan).splitlines()
    assert [line.split()[0] for line in table if "not available" in line] == ["feature_keep"]
    assert "masked ones are cut out of the shipped model" in control_table(plan)
    without = make_plan(Plain(), {"pixel_values": torch.rand(2, 3, 16, 16)}, AttachConfig(blocks="body.*"), None)
    assert "not available" in without.controls["unit_keep"]
    assert without.group_sizes == (1, 1)


class Plain(nn.Module):
    """Convolutions in a row: every channel is read by the next block, so none is inner."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
        self.head = nn.Linear(5, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(pixel_values).mean((-2, -1))))


def test_attention_without_weights_switches_selection_off() -> None:
    model, inputs = tiny_models.tiny("bert", attn_implementation="sdpa"), tiny_models.batch("bert")
    model.set_attn_implementation("sdpa")
    plan = make_plan(model, inputs, AttachConfig(), None)
    assert plan.attention == ()
    assert "no attention weights" in plan.controls["feature_keep"]
    assert "not available" not in plan.controls["unit_keep"]


class MeanHead(nn.Module):
    """Reads all tokens, so that none can be left out unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_models.tiny("bert").bert
        self.config = self.body.config
        self.head = nn.Linear(32, 2)

    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(**inputs).last_hidden_state.mean(1)))


def test_a_head_that_reads_all_tokens_switches_selection_off() -> None:
    plan = make_plan(MeanHead(), tiny_models.batch("bert"), AttachConfig(), None)
    assert "more than the first token" in plan.controls["feature_keep"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "resnet"])
def test_with_everything_kept_the_last_exit_is_the_model(family: str) -> None:
    student, inputs = attached(family, layers=2), tiny_models.batch(family)
    with torch.no_grad():
        outputs = student(inputs, full(student.plan))
        torch.testing.assert_close(outputs.logits[-1], student.model(**inputs).logits)
    assert len(outputs.logits) == 2
    assert outputs.features.shape[0] == 4
    assert outputs.map is not None
    torch.testing.assert_close(outputs.map.norm(dim=-1), torch.ones(4))


def test_masked_units_equal_zeroed_weights() -> None:
    student, inputs = attached("bert"), tiny_models.batch("bert")
    masks = tuple((torch.arange(g.size) % 3 != 0).float() for g in student.plan.groups)
    with torch.no_grad():
        masked = student(inputs, masks).logits[-1]
        for group, mask in zip(student.plan.groups, masks, strict=True):
            linear(student.model, group.reader).weight.mul_(mask.repeat_interleave(group.width))
        torch.testing.assert_close(student.model(**inputs).logits, masked)


def test_received_attention_and_chosen_tokens_by_hand() -> None:
    weights = torch.tensor([[[[0.1, 0.2, 0.7, 0.0], [0.3, 0.3, 0.4, 0.0], [0.2, 0.2, 0.6, 0.0], [0.7, 0.1, 0.1, 0.1]]]])
    valid = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(received(weights, valid), torch.tensor([[0.6, 0.7, 1.7, 0.0]]) / 3)
    chosen, used = choose_tokens(weights.repeat(2, 1, 1, 1), torch.tensor([[True] * 3 + [False], [True] * 4]), 0.6)
    assert chosen.tolist() == [[0, 2], [0, 2]]  # round(1.8) and round(2.4)
    assert used.tolist() == [[True, True], [True, True]]
    chosen, used = choose_tokens(weights.repeat(2, 1, 1, 1), torch.tensor([[True] * 3 + [False], [True] * 4]), 0.85)
    assert used.tolist() == [[True, True, True], [True, True, True]]
    _, used = choose_tokens(weights, valid, 0.01)
    assert used.tolist() == [[True]]


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_left_out_tokens_equal_a_blocked_view(family: str) -> None:
    """Leaving tokens out after block 1 equals letting nobody look at them from block 2 on."""
    student, inputs = attached(family), tiny_models.batch(family)
    with torch.no_grad():
        outputs = student(inputs, full(student.plan), keep=0.5)
    chosen, used = outputs.positions, outputs.valid
    assert chosen is not None
    assert used is not None
    length = 17 if family == "vit" else 7
    counts = [length] * 4 if family == "vit" else inputs["attention_mask"].sum(1).tolist()
    assert used.sum(1).tolist() == [round(0.5 * n) for n in counts]
    seen = torch.zeros(4, length).scatter_add(1, chosen, used.float()) > 0  # [B, L]
    blocked = (~seen)[:, None, None].float() * torch.finfo(torch.float32).min

    def block(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return args[:1], {"attention_mask": blocked}

    handles = [
        student.model.get_submodule(path).register_forward_pre_hook(block, with_kwargs=True)
        for path in student.plan.blocks[1:]
    ]
    with torch.no_grad():
        expected = student.model(**inputs).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(outputs.logits[-1], expected, atol=1e-5, rtol=1e-4)
    assert (outputs.logits[-1] - student.model(**inputs).logits).abs().max() > 1e-6


def test_padding_does_not_change_an_answer() -> None:
    student = attached("bert")
    inputs = tiny_models.batch("bert")
    row = {name: values[2:3] for name, values in inputs.items()}  # 5 tokens and 2 of padding
    cut = {name: values[:, :5] for name, values in row.items()}
    with torch.no_grad():
        for keep in (1.0, 0.6):
            a, b = (student(x, full(student.plan), keep) for x in (row, cut))
            for one, other in zip(a.logits, b.logits, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.features, b.features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AttachConfig(exits=(3,)), r"attach\.exits: got \[3\]; allowed: rising block numbers from 1 to 2"),
        (AttachConfig(patience=1), r"attach\.patience: got 1"),
        (AttachConfig(blocks="bert.encoder.layr.*"), "closest is"),
        (AttachConfig(hints="some"), r"attach\.hints"),
        (AttachConfig(select_after=0), r"attach\.select_after"),
    ],
)
def test_impossible_attachments(config: AttachConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        attached("bert", config)


def test_a_module_without_a_list_of_blocks_has_its_children_as_blocks() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.b(torch.relu(self.a(x))))

    inputs = {"x": torch.rand(2, 3)}
    assert make_plan(Flat(), inputs, AttachConfig(), None).blocks == ("a", "b")
    plan = make_plan(Flat(), inputs, AttachConfig(blocks="[ab]"), None)
    assert (plan.blocks, plan.exits, plan.num_classes) == (("a", "b"), (1,), 2)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_on_a_model_that_was_detached() -> None:
    model, inputs = tiny_models.tiny("bert"), tiny_models.batch("bert")
    plan = make_plan(model, inputs, AttachConfig(), None)
    assert num_hooks(model) == 0
    first = Instrumented(model, plan, [])
    masks = tuple(torch.ones(group.size) for group in plan.groups)
    assert num_hooks(model) > 0
    first(inputs, masks)
    first.detach()
    assert num_hooks(model) == 0
    with pytest.raises(RuntimeError, match="was detached"):
        first(inputs, masks)
    with Instrumented(model, plan, []) as second:
        second(inputs, masks)
    assert num_hooks(model) == 0
