"""Blocks of a real student are skipped in the order of their influence, and handed past in every pass."""

import dataclasses
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, Plan, control_table, keep_zeros, make_plan, without
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.hooks import link_places
from rlkd.models.real.instrumented import Instrumented

DEPTH = AttachConfig(units="depth")
OUT = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "vit": ("attention.o_proj", "mlp.fc2")}  # as in test_influence


def weakened(family: str, factors: tuple[float, ...]) -> nn.Module:
    """A model whose blocks add so much to their input."""
    model = tiny_models.tiny(family, layers=len(factors))
    with torch.no_grad():
        for path, factor in zip(block_paths(model), factors, strict=True):
            for name in OUT[family]:
                for parameter in model.get_submodule(f"{path}.{name}").parameters():
                    parameter.mul_(factor)
    return model


def masks_without(plan: Plan, *skipped: int) -> tuple[Tensor, ...]:
    return tuple(torch.full((group.size,), float(group.block + 1 not in skipped)) for group in plan.groups)


def test_the_block_of_least_influence_is_skipped_first() -> None:
    model = weakened("llama", (30.0, 0.0, 10.0, 0.01, 90.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = make_plan(model, tiny_models.batch("llama"), DEPTH, None)
    assert plan.order[-2:] == (4, 2)
    assert sorted(plan.order) == [1, 2, 3, 4, 5]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())
    assert make_plan(model, tiny_models.batch("llama"), AttachConfig(), None).order == ()


def test_the_block_that_selects_tokens_is_never_skipped() -> None:
    model, inputs = weakened("vit", (30.0, 0.0, 30.0)), tiny_models.batch("vit")
    plan = make_plan(model, inputs, AttachConfig(units="depth", select_after=2), None)
    assert plan.select_after == 2
    assert plan.order[0] == 2  # although it has the least influence
    assert make_plan(model, inputs, AttachConfig(units="depth", select_after=1), None).order == (1, 3, 2)


def test_influence_is_measured_on_the_samples_that_are_given() -> None:
    model, inputs = weakened("llama", (1.0, 1.0)), tiny_models.batch("llama")
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    make_plan(model, inputs, DEPTH, None, samples=tiny_models.batch("llama", size=9))
    handle.remove()
    assert seen.count(9) == 1  # one block is removed of two


def test_the_table_says_which_blocks_are_skipped() -> None:
    model = weakened("vit", (30.0, 0.0, 10.0, 0.01))
    plan = make_plan(model, tiny_models.batch("vit"), DEPTH, None)
    text = (
        "skips blocks [2, 4, 3] in this order, never block 1; the next one keeps a share of its hidden units and heads"
    )
    assert text in control_table(plan)
    assert "masked heads stay in the shipped model, as zeros" in control_table(keep_zeros(plan, ("units",)))
    assert without(plan, "unit_keep", "x").order == ()


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "llama_classifier", "llama"])
@pytest.mark.parametrize("skipped", [(3,), (2,), (2, 3)])
def test_a_skipped_block_hands_on_what_enters_it(family: str, skipped: tuple[int, ...]) -> None:
    """Answers, features and attention map are those of a model without the block."""
    model, inputs = tiny_models.loud(tiny_models.tiny(family, layers=3)), tiny_models.batch(family)
    plan = make_plan(model, inputs, dataclasses.replace(DEPTH, exits=(2,)), None)
    links = link_places(model, model, [plan.blocks[-1]], plan.blocks, inputs, inputs)
    with torch.no_grad(), Instrumented(model, plan, links).eval() as student:
        whole, masked = (student(inputs, masks_without(plan, *some), 1.0) for some in ((), skipped))
        head = student.heads[0]
    assert not torch.allclose(masked.logits[-1], whole.logits[-1], atol=1e-3)
    listed: Any = model.get_submodule(plan.blocks[0].rpartition(".")[0])
    left = nn.ModuleList(block for number, block in enumerate(listed, start=1) if number not in skipped)
    model.set_submodule(plan.blocks[0].rpartition(".")[0], left)
    exits = (1,) if skipped == (2,) else ()  # the exit after the skipped block 2 reads what block 1 gave
    smaller = make_plan(model, inputs, AttachConfig(exits=exits), None)
    links = link_places(model, model, [smaller.blocks[-1]], smaller.blocks, inputs, inputs)
    with torch.no_grad(), Instrumented(model, smaller, links).eval() as plain:
        plain.heads = nn.ModuleList([head] if exits else [])
        outputs = plain(inputs, masks_without(smaller), 1.0)
    for given, wanted in zip(reversed(masked.logits), reversed(outputs.logits), strict=False):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.features, outputs.features, atol=1e-5, rtol=1e-5)
    if outputs.map is None:
        assert masked.map is None
    else:
        torch.testing.assert_close(masked.map, outputs.map, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_tokens_are_left_out_on_the_way_into_a_skipped_block(family: str) -> None:
    model, inputs = tiny_models.loud(tiny_models.tiny(family, layers=4)), tiny_models.batch(family)
    plan = make_plan(model, inputs, AttachConfig(exits=(), units="depth"), None)
    with torch.no_grad(), Instrumented(model, plan, []).eval() as student:
        masked = student(inputs, masks_without(plan, 2, 3), 0.5)
    listed: Any = model.get_submodule(plan.blocks[0].rpartition(".")[0])
    model.set_submodule(plan.blocks[0].rpartition(".")[0], nn.ModuleList([listed[0], listed[3]]))
    smaller = make_plan(model, inputs, AttachConfig(exits=()), None)
    with torch.no_grad(), Instrumented(model, smaller, []).eval() as plain:
        ones = tuple(torch.ones(group.size) for group in smaller.groups)
        torch.testing.assert_close(plain(inputs, ones, 0.5).logits[-1], masked.logits[-1], atol=1e-5, rtol=1e-5)


def test_the_map_is_over_all_tokens_where_no_block_runs_behind_the_selection() -> None:
    model, inputs = tiny_models.tiny("bert", layers=3), tiny_models.batch("bert")
    plan = make_plan(model, inputs, AttachConfig(units="depth"), None)
    with torch.no_grad(), Instrumented(model, plan, []).eval() as student:
        some, every = (student(inputs, masks_without(plan, 2, 3), keep) for keep in (0.5, 1.0))
    assert some.positions is None
    assert some.map is not None
    assert every.map is not None
    assert some.map.shape == (4, 7)
    torch.testing.assert_close(some.map, every.map)
    torch.testing.assert_close(some.logits[-1], every.logits[-1])  # the head reads the first token, which stays


class Own(nn.Module):
    """Blocks of a user: `between` runs after each of them but the last, `pair` makes them give two tensors."""

    def __init__(self, *blocks: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 2)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            given = block(inputs)
            inputs = given[0] if isinstance(given, tuple) else given
            if self.between is not None and number < len(self.blocks) - 1:
                inputs = self.between(inputs)
        logits: Tensor = self.head(inputs)
        return logits


class Residual(nn.Module):
    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.pair = nn.Linear(8, 12), nn.Linear(12, 8), pair

    def forward(self, x: Tensor) -> Any:
        y = x + self.down(self.up(x).relu())
        return (y, y) if self.pair else y


def chain() -> nn.Module:
    """Units of every layer are read by the next one."""
    return Own(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))


def resnet_of_one_width() -> nn.Module:
    """Two stages; the second one halves the image."""
    t = tiny_models.need_transformers()
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], num_labels=2)
    model: nn.Module = t.ResNetForImageClassification(config)
    return model.eval()


CANNOT = {
    "widths": (
        lambda: tiny_models.tiny("resnet"),
        tiny_models.batch("resnet"),
        r"its blocks have the widths \[8, 16\]",
    ),
    "sizes": (resnet_of_one_width, tiny_models.batch("resnet"), "a block gives another size than it takes"),
    "no units": (lambda: tiny_models.tiny("gpt2"), tiny_models.batch("gpt2"), "block 1 has no units that rlkd knows"),
    "shared blocks": (
        lambda: architectures.tiny_model("AlbertForSequenceClassification"),
        {"input_ids": torch.arange(5, 19).reshape(2, 7)},
        "its blocks do not run once each",
    ),
    "two tensors": (lambda: Own(Residual(True), Residual(True)), {"inputs": torch.rand(4, 8)}, "one tensor each"),
    "a layer between": (
        lambda: Own(Residual(), Residual(), between=nn.Tanh()),
        {"inputs": torch.rand(4, 8)},
        "do not hand on what they give",
    ),
    "a chain": (chain, {"inputs": torch.rand(4, 8)}, "units of block 1 are read outside of it"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_blocks_that_cannot_be_skipped_are_refused_in_one_line(name: str) -> None:
    make: Any
    make, inputs, reason = CANNOT[name]
    torch.manual_seed(0)
    model = make().eval()
    make_plan(model, inputs, AttachConfig(exits=()), None)  # its width can be a control
    with pytest.raises(UserError, match=rf"attach\.units: got depth; allowed: width, because .*{reason}") as error:
        make_plan(model, inputs, AttachConfig(exits=(), units="depth"), None)
    assert "\n" not in str(error.value)


def test_another_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"attach\.units: got 'height'; allowed: width, depth"):
        AttachConfig(units="height").check()  # type: ignore[arg-type]
