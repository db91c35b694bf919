"""Inner channels of convolutional blocks: masking them equals cutting them out, in answers and in MACs."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from rlkd.compression.real.cut import cut_model
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.cost.real import ModuleProfile
from rlkd.cost.real_work import count_work
from rlkd.models.real.attachment import AttachConfig, Plan, make_plan
from rlkd.models.real.blocks import Group, group_importance
from rlkd.models.real.instrumented import Instrumented


def attached(family: str) -> Instrumented:
    model = tiny_models.tiny(family)
    torch.manual_seed(3)
    for module in model.modules():  # running statistics other than 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    inputs = tiny_models.batch(family)
    return Instrumented(model, make_plan(model, inputs, AttachConfig(), None), []).eval()


def half(plan: Plan) -> list[Tensor]:
    return [(torch.arange(group.size) % 2).float() for group in plan.groups]


def cut_out(model: nn.Module, groups: Sequence[Group], masks: Sequence[Tensor]) -> nn.Module:
    """A copy whose layers are physically smaller: rows of writers and their normalisation, columns of readers."""
    small = copy.deepcopy(model)
    for module in small.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()  # the masks of the original
    for group, mask in zip(groups, masks, strict=True):
        kept = mask.bool()
        for path in group.writers:
            layer: Any = small.get_submodule(path)
            norm: Any = getattr(small.get_submodule(path.rpartition(".")[0]), "normalization", None)
            for part in filter(None, (layer, norm)):
                for name, value in [*part.named_parameters(), *part.named_buffers()]:
                    if value.ndim and len(value) == group.size:
                        setattr(part, name, type(value)(value.data[kept]) if name in part._parameters else value[kept])
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.groups = int(kept.sum())
            elif isinstance(layer, nn.Conv2d) and path != group.writers[0]:
                layer.weight = nn.Parameter(layer.weight.data[:, kept])
        reader: Any = small.get_submodule(group.reader)
        reader.weight = nn.Parameter(reader.weight.data[:, kept])
    return small


@pytest.mark.parametrize("family", tiny_models.CONV_FAMILIES)
def test_masked_channels_equal_cut_ones_in_answers_and_macs(family: str) -> None:
    student, inputs = attached(family), tiny_models.batch(family)
    plan = student.plan
    assert all(group.kind == "channels" for group in plan.groups)
    masks = half(plan)
    small = cut_out(student.model, plan.groups, masks)
    with torch.no_grad():
        masked = student(inputs, masks).logits[-1]
        torch.testing.assert_close(masked, small(**inputs).logits, atol=1e-4, rtol=1e-4)
        assert (masked - student.model(**inputs).logits).abs().max() > 1e-4
        shipped = cut_model(student.model, "image_classification", plan.groups, masks)
        torch.testing.assert_close(shipped(**inputs).logits, masked, atol=1e-4, rtol=1e-4)
    one = {name: values[:1] for name, values in inputs.items()}
    work = count_work(student.model, one, plan)
    profile = ModuleProfile(plan, work, 8, tiny_models.even_speed(work, 1e-3, 1e-9), dict(ENERGY_MODEL), {})
    kept = torch.tensor([[1.0, *(float(mask.sum()) for mask in masks)]])
    counted = profile.cost(kept, torch.tensor([[0.0, 1.0]]), torch.tensor([1.0]))
    assert float(counted.macs) == pytest.approx(count_work(small, one, plan).dense_macs)
    assert float(counted.macs) < profile.work.dense_macs


def test_every_layer_of_a_stage_has_its_group() -> None:
    assert [(g.block, g.size) for g in attached("resnet_basic").plan.groups] == [(0, 8), (0, 8), (1, 16)]
    assert [(g.block, g.size) for g in attached("convnext").plan.groups] == [(0, 32), (1, 64), (1, 64)]
    mobile = attached("mobilenet").plan
    assert [g.block for g in mobile.groups] == list(range(16))
    assert all(len(g.writers) == 2 for g in mobile.groups)  # expansion and depthwise convolution


def test_importance_of_a_channel_by_hand() -> None:
    student = attached("resnet_basic")
    group = student.plan.groups[0]
    state = dict(student.model.named_parameters())
    written, read = state[f"{group.writers[0]}.weight"], state[f"{group.reader}.weight"]
    with torch.no_grad():
        written[3], read[:, 3] = 0.0, 0.0
        written[5, 0, 0, 0] = 720.0  # mean over 8 channels and 9 pixels: at least 10
    scores = group_importance(student.model, student.plan.groups)[0]
    assert int(scores.argmin()) == 3
    assert float(scores[3]) == 0.0
    assert 10.0 <= float(scores[5]) < 10.5
