"""A trained real student at inference: what its controls left out is cut out of it.

Hidden units, heads, inner channels, skipped blocks and blocks behind an exit that every sample takes are physically
gone.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.compression.real.shipped import Shipment, ShippedStudent, shipped_student
from rlkd.compression.selection import exit_ends
from rlkd.models.chain import Masks
from rlkd.models.real.attachment import Plan
from rlkd.models.real.blocks import KINDS as KINDS_OF_GROUPS
from rlkd.models.real.blocks import Group, linear
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import HIDDEN_UNITS, Kind, new_model, on_meta
from rlkd.models.real.shrink import cut_group, skip_blocks, take_out, zero_group


def cut_model(
    model: nn.Module, kind: Kind, groups: Sequence[Group], masks: Masks, cuts: Collection[str] = KINDS_OF_GROUPS
) -> nn.Module:
    """Return a model on the CPU that answers like `model` under `masks`, physically smaller.

    Args:
        model: of transformers.
        kind: what it is for.
        groups: its groups.
        masks: one [size] a group.
        cuts: kinds of groups that are cut; masked units of others stay, as zeros.
    """
    small = new_model(copy.deepcopy(model.config), kind, seed=0)
    small.load_state_dict({name: value.detach().cpu() for name, value in model.state_dict().items()})
    _cut_groups(small, groups, masks, cuts)
    described = _described(small, groups)
    if not fits(described, kind, small):
        return small
    plain = new_model(described, kind, seed=0)
    plain.load_state_dict(small.state_dict())
    return plain


def _cut_groups(model: nn.Module, groups: Sequence[Group], masks: Masks, cuts: Collection[str]) -> None:
    """Cut masked units out of a model on the CPU; those of groups of other kinds than `cuts` become zeros."""
    for group, mask in zip(groups, masks, strict=True):
        (cut_group if group.kind in cuts else zero_group)(model, group, mask.cpu())


def _described(model: nn.Module, groups: Sequence[Group]) -> Any:
    """Return the configuration with the sizes that hidden units and heads have in the first block."""
    described: Any = copy.deepcopy(model.config)
    first: dict[str, Group] = {group.kind: group for group in reversed(groups)}
    for kind, group in first.items():
        count = torch.as_tensor(model.get_submodule(group.reader).weight).shape[1] // group.width
        if kind == "units":
            name = next((n for n in HIDDEN_UNITS if isinstance(getattr(described, n, None), int)), None)
            if name is not None:
                setattr(described, name, count)
        elif kind == "heads" and count < group.size:
            described.num_attention_heads, described.head_dim = count, group.width
            if hasattr(described, "num_key_value_heads"):
                shared = (*group.shared, *group.writers)[0]
                described.num_key_value_heads = linear(model, shared).out_features // group.width
    return described


def fits(described: Any, kind: Kind, model: nn.Module) -> bool:
    """Tell whether a model of the configuration has the tensors of `model`."""
    made = on_meta(described, kind)
    return made is not None and shapes_of(made.state_dict()) == shapes_of(model.state_dict())


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


def shipment_of(plan: Plan, kind: Kind, keep: float, threshold: float, *, skipped: Sequence[int] = ()) -> Shipment:
    """Return how a student of a plan answers: without exits that no sample takes and parts that no sample reaches.

    Args:
        plan: of the student.
        kind: of its model.
        keep: share of tokens.
        threshold: of the exits.
        skipped: blocks, from 1.
    """
    always, never = (bool(end) for end in exit_ends(torch.tensor([threshold]), plan.num_classes))
    exits = () if never else plan.exits[:1] if always else plan.exits
    depth = exits[0] if always and exits else len(plan.blocks)
    selects = plan.select_after is not None and plan.select_after < depth
    num_left = depth if plan.cuts_depth else len(plan.blocks)
    return Shipment(
        kind=kind,
        blocks=plan.blocks,
        attention=plan.attention[:depth],
        exits=exits,
        patience=plan.patience,
        threshold=threshold,
        select_after=plan.select_after if selects else None,
        keep=keep if selects else 1.0,
        num_classes=plan.num_classes,
        drops_rows=plan.drops_rows,
        gone=(*plan.blocks[num_left:], *plan.after) if num_left < len(plan.blocks) else (),
        skipped=tuple(plan.blocks[number - 1] for number in skipped if number <= num_left),
    )


def ship(student: Instrumented, kind: Kind, unit_masks: Masks, keep: float, threshold: float) -> ShippedStudent:
    """Return the student as it will answer, on the CPU, without what no sample reaches.

    Args:
        student: trained.
        kind: of its model.
        unit_masks: one [size] a group of its plan.
        keep: share of tokens.
        threshold: of the exits.
    """
    plan = student.plan
    skipped = plan.skipped([float(mask.sum()) for mask in unit_masks])
    shipment = shipment_of(plan, kind, keep, threshold, skipped=skipped)
    left = [(g, mask) for g, mask in zip(plan.groups, unit_masks, strict=True) if g.block + 1 not in skipped]
    groups, masks = [group for group, _ in left], tuple(mask for _, mask in left)
    if kind == "module":
        model = student.clean_copy().cpu().requires_grad_(False)
        _cut_groups(model, groups, masks, plan.cuts)
    else:
        model = cut_model(student.model, kind, groups, masks, plan.cuts)
    skip_blocks(model, shipment.skipped)
    take_out(model, shipment.gone)
    heads = copy.deepcopy(student.heads[: len(shipment.exits)]).cpu()
    return shipped_student(model, heads, shipment)
