"""Tiny models with exits as trained students that can ship."""

import tiny_models
import torch

from rlkd.models.real.attachment import AttachConfig, Plan, make_plan
from rlkd.models.real.hooks import link_places
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind

KINDS: dict[str, Kind] = dict.fromkeys(tiny_models.IMAGE_FAMILIES, "image_classification")


def trained(family: str, attach: AttachConfig) -> Instrumented:
    model, inputs = (
        tiny_models.tiny(family, layers=2 if family in tiny_models.CONV_FAMILIES else 3),
        tiny_models.batch(family, size=12),
    )
    plan = make_plan(model, inputs, attach, None)
    student = Instrumented(model, plan, link_places(model, model, plan.blocks[-1:], plan.blocks, inputs, inputs)).eval()
    torch.manual_seed(0)
    for head in student.heads:
        torch.nn.init.normal_(head.weight, std=0.15)
        head.bias.data.zero_()
    return student


def quarter(plan: Plan, kinds: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """Masks that leave a quarter of the units of these kinds, and all others."""
    return tuple(
        (torch.arange(g.size) % 4 == 0).float() if g.kind in kinds else torch.ones(g.size) for g in plan.groups
    )
