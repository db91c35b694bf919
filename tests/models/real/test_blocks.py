"""Masked units equal units that were cut out."""

import pytest
import tiny_models
import torch

from rlkd.models.real.blocks import block_paths, find_groups, group_importance, layout_of, linear, mask_groups

FAMILIES = ["bert", "roberta", "distilbert", "vit", "llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_units_and_heads_are_found_in_every_block(family: str) -> None:
    model = tiny_models.tiny(family)
    blocks = block_paths(model)
    groups = find_groups(model, blocks, layout_of(model, blocks))
    assert len(blocks) == 2
    assert [(g.kind, g.block, g.size, g.width) for g in groups] == [
        (kind, block, *size) for block in (0, 1) for kind, size in (("units", (64, 1)), ("heads", (4, 8)))
    ]
    assert [s.shape[0] for s in group_importance(model, groups)] == [64, 4, 64, 4]


def test_a_model_of_no_known_layout_has_blocks_and_no_units() -> None:
    model = tiny_models.tiny("gpt2")
    blocks = block_paths(model)
    assert len(blocks) == 2
    assert find_groups(model, blocks, layout_of(model, blocks)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_equals_zeroing_what_the_reader_reads(family: str) -> None:
    model, inputs = tiny_models.tiny(family), tiny_models.batch(family)
    blocks = block_paths(model)
    groups = find_groups(model, blocks, layout_of(model, blocks))
    generator = torch.Generator().manual_seed(3)
    masks = [(torch.rand(g.size, generator=generator) < 0.5).float() for g in groups]
    with torch.no_grad():
        dense = model(**inputs).logits
        handles = mask_groups(model, groups, lambda: masks)
        masked = model(**inputs).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(model(**inputs).logits, dense)
        for group, mask in zip(groups, masks, strict=True):
            linear(model, group.reader).weight.mul_(mask.repeat_interleave(group.width))
        torch.testing.assert_close(model(**inputs).logits, masked)
    assert (masked - dense).abs().max() > 1e-5


def test_importance_by_hand() -> None:
    model = tiny_models.tiny("bert")
    groups = find_groups(model, block_paths(model), layout_of(model, block_paths(model)))
    with torch.no_grad():
        linear(model, groups[0].writers[0]).weight.fill_(0.5)
        linear(model, groups[0].reader).weight.zero_()
        linear(model, groups[0].reader).weight[:, 3] = -2.0  # read with 2, written with 0.5
        for path in groups[1].writers:
            linear(model, path).weight.fill_(1.0)
        linear(model, groups[1].reader).weight.zero_()
        linear(model, groups[1].reader).weight[:, 8:12] = 4.0  # half of the channels of the second head
    units, heads = group_importance(model, groups)[:2]
    assert units[3].item() == pytest.approx(2.5)
    assert units[0].item() == pytest.approx(0.5)
    assert heads.tolist() == pytest.approx([1.0, 3.0, 1.0, 1.0])
