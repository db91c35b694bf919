"""A model whose masked units were cut out answers as it did under the masks, for every family and random masks."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from rlkd.models.real.blocks import Group, block_paths, find_groups, layout_of, mask_groups
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.shrink import cut_group, cut_to_shapes, kept_units, take_out

FAMILIES = [
    *("bert", "roberta", "electra", "distilbert", "vit", "llama", "llama_classifier", "qwen2"),
    *tiny_models.CONV_FAMILIES,
]


def model_with_groups(family: str, **changes: Any) -> tuple[nn.Module, list[Group]]:
    """A model whose biases, norms and running statistics are at no special value."""
    model = tiny_models.tiny(family, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))  # type: ignore[union-attr, operator]
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)  # type: ignore[union-attr, operator]
    blocks = block_paths(model)
    return model, find_groups(model, blocks, layout_of(model, blocks))


def random_masks(groups: list[Group], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(g.size, generator=generator) < torch.rand(1, generator=generator)).float() for g in groups]


@torch.no_grad()
def masked_and_cut(model: nn.Module, groups: list[Group], masks: list[Tensor], family: str) -> tuple[Tensor, Tensor]:
    inputs = tiny_models.batch(family)
    handles = mask_groups(model, groups, lambda: masks)
    masked = logits_of(forward(model, inputs))
    for handle in handles:
        handle.remove()
    for group, mask in zip(groups, masks, strict=True):
        cut_group(model, group, mask)
    return masked, logits_of(forward(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_cut_model_answers_as_the_masked_one(family: str, seed: int) -> None:
    model, groups = model_with_groups(family)
    masks = random_masks(groups, seed)
    num_before = sum(p.numel() for p in model.parameters())
    masked, cut = masked_and_cut(model, groups, masks, family)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < num_before
    for group, mask in zip(groups, masks, strict=True):
        reader: Any = model.get_submodule(group.reader)
        assert reader.weight.shape[1] == len(kept_units(group, mask)) * group.width
        if group.sharing == 1:
            assert reader.weight.shape[1] == max(1, int(mask.sum())) * group.width  # nothing else stays


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_of_which_nothing_is_left_answers_zeros(family: str) -> None:
    model, groups = model_with_groups(family)
    masks = [torch.zeros(group.size) for group in groups]
    masked, cut = masked_and_cut(model, groups, masks, family)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ("111 111 111", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("101 010 011", [0, 2, 3, 4, 7, 8]),  # the second three have one: another stays, as zeros
        ("101 000 010", [0, 2, 6, 7]),  # keys and values of the second three are not read
        ("000 000 000", [0]),
    ],
)
def test_heads_that_share_keys_and_values_stay_in_equal_number(mask: str, kept: list[int]) -> None:
    group = Group("heads", 0, "out", ("query",), 9, 4, shared=("key", "value"), sharing=3)
    given = torch.tensor([float(c) for c in mask.replace(" ", "")])
    assert kept_units(group, given).tolist() == kept


@pytest.mark.parametrize(
    ("mask", "num_heads", "num_shared"),
    [
        ("10 00 01 10", 3, 3),  # one head for each of three keys and values; one pair is gone
        ("11 01 00 10", 6, 3),  # two for each of three, of which two read as zeros
    ],
)
def test_keys_and_values_that_no_head_reads_are_gone(mask: str, num_heads: int, num_shared: int) -> None:
    model, groups = model_with_groups("llama", num_attention_heads=8, num_key_value_heads=4)
    heads = [group for group in groups if group.kind == "heads"]
    assert [(g.sharing, g.size, len(g.shared)) for g in heads] == [(2, 8, 2)] * 2
    kept = torch.tensor([float(c) for c in mask.replace(" ", "")])
    masks = [torch.ones(g.size) if g.kind == "units" else kept for g in groups]
    masked, cut = masked_and_cut(model, groups, masks, "llama")
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    sizes = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
    assert sizes == [num_heads * 4, num_shared * 4, num_shared * 4]
    assert attention.num_key_value_groups == num_heads // num_shared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_takes_the_shapes_of_a_cut_one(family: str) -> None:
    model, groups = model_with_groups(family)
    for group, mask in zip(groups, random_masks(groups, 4), strict=True):
        cut_group(model, group, mask)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    whole, _ = model_with_groups(family)
    cut_to_shapes(whole, groups, shapes)
    whole.load_state_dict(model.state_dict())
    inputs = tiny_models.batch(family)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(forward(whole, inputs)), logits_of(forward(model, inputs)))


@pytest.mark.parametrize("shape", [(32, 0), (32, 12), (32, 40)])
def test_shapes_that_no_cut_leaves_are_refused(shape: tuple[int, int]) -> None:
    model, groups = model_with_groups("bert")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    heads = next(group for group in groups if group.kind == "heads")  # of 8 channels each
    with pytest.raises(ValueError, match="no cut leaves that"):
        cut_to_shapes(model, groups, {**shapes, f"{heads.reader}.weight": shape})


def test_a_part_that_was_taken_out_says_so() -> None:
    model, _ = model_with_groups("bert")
    take_out(model, ["bert.encoder.layer.1", "classifier"])
    assert not [name for name in model.state_dict() if name.startswith(("bert.encoder.layer.1", "classifier"))]
    with pytest.raises(RuntimeError, match="was cut out of the student"):
        forward(model, tiny_models.batch("bert"))
