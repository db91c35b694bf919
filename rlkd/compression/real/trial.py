"""The dry run of an untrained student, before any training: attach, leave half out, cut, export, load, compare.

What a student answers in training and what it answers once it is shipped come from different code: hooks that mask,
against tensors that are cut, a folder that transformers reads, samples that leave the batch. A control for which the
two differ on this model is switched off; a model for which they differ without any control is refused.
"""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.compression.real.cut import ship
from rlkd.compression.real.shipped import ShippedStudent
from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.compression.selection import exits_taken
from rlkd.data.examples import PADDING_MASK
from rlkd.errors import UserError
from rlkd.models.chain import Masks
from rlkd.models.real.attachment import Plan, keep_zeros, without
from rlkd.models.real.blocks import group_importance
from rlkd.models.real.hooks import Link, forward, logits_of
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind, as_user_error

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of answers, relative to the largest one where that is above 1
NOT_FINITE = 1e9  # stands for the difference of answers of which one is not finite
BORDER = 1e-5  # confidences this near to the threshold may fall on either side of it
CONTROLS = ("unit_keep", "exit_threshold", "feature_keep")
Inputs = Mapping[str, Tensor]


@torch.no_grad()
def largest_difference(
    student: Instrumented, shipped: ShippedStudent, inputs: Inputs, masks: Masks, *, keep: float, threshold: float
) -> float:
    """Compare a shipped student's answers with the trained one's: the largest difference, relative to the largest
    answer where that is above 1; NOT_FINITE where an answer is not.

    Args:
        student: on the CPU, in evaluation mode.
        shipped: of `ship`.
        inputs: of a batch.
        masks: one [size] a group.
        keep: share of tokens.
        threshold: of the exits.
    """
    logits = torch.stack([z.float() for z in student(inputs, masks, keep).logits])  # [E, B, C] or [E, B, L, V]
    answers = shipped(**inputs)  # [B, C] or [B, L, V]
    if answers.shape != logits.shape[1:]:
        return NOT_FINITE
    if student.plan.per_token:
        real = inputs[PADDING_MASK].bool() if PADDING_MASK in inputs else torch.ones(answers.shape[:2]).bool()
        logits, answers = logits[:, real], answers[real]  # [E, M, V], [M, V]
    confidence, answer = logits.softmax(-1).max(-1)  # [E, M]
    limit = torch.tensor([threshold])
    taken = exits_taken(confidence[None], answer[None], limit, logits.shape[-1], student.plan.patience)[0]  # [E, M]
    gaps = (logits - answers).abs().amax(-1)  # [E, M]
    unsure = ((confidence[:-1] - threshold).abs() < BORDER).any(0)  # [M]
    gap = torch.where(unsure, gaps.amin(0), (gaps * taken).sum(0))  # [M]
    if not bool(torch.isfinite(gap).all()):
        return NOT_FINITE
    return float(gap.max() / logits.abs().max().clamp_min(1.0))


def try_out(
    model: nn.Module,
    plan: Plan,
    links: Sequence[Link],
    kind: Kind,
    batches: Sequence[Inputs],
    *,
    processor: Any = None,
) -> Plan:
    """Rehearse what the student will go through; nothing of `model` is changed.

    Args:
        model: untrained, on the CPU.
        plan: of `make_plan`.
        links: of the hints.
        kind: what the model is for.
        batches: of a few samples, then of each of them alone.
        processor: tokenizer or image processor that is exported with it, or None.

    Returns:
        The plan without the controls that this model does not bear.

    Raises:
        UserError: the model cannot be trained, exported or loaded again, or answers otherwise then.
    """
    trial, name = copy.deepcopy(model).eval(), type(model).__name__
    borne = plan
    for control in CONTROLS:
        borne = _with(borne, without(plan, control, ""), control)
    failure = f"{name}: the dry run before the training failed"
    with as_user_error(failure), torch.random.fork_rng(devices=[]):  # fresh layers draw from the global generator
        _check_model(trial, batches[0])
        if plan.per_token:
            _check_causal(trial, batches[0])
        _check(trial, borne, links, kind, batches)
        for control in CONTROLS:
            reason: str | None = None
            for variant in _variants(plan, control):
                wider = _with(borne, variant, control)
                reason = _reason(trial, wider, links, kind, batches)
                if reason is None:
                    borne = wider
                    break
            else:
                borne = _with(borne, plan if reason is None else without(plan, control, reason), control)
                if reason is not None:
                    logger.warning(f"{control}: not available for {name}: {reason}")
        _check(trial, borne, links, kind, batches, export=True, processor=processor)
        _check_training(trial, borne, links, batches[0])
    return borne


def _variants(plan: Plan, control: str) -> list[Plan]:
    """Return the plan, then one with less of a control, to try in this order; [] for a control that it lacks."""
    if control == "unit_keep" and plan.groups:
        fewer = dict.fromkeys([tuple(kind for kind in plan.cuts if kind != "heads"), ()])
        return [plan, *(keep_zeros(plan, cuts) for cuts in fewer if cuts != plan.cuts)]
    if control == "exit_threshold" and plan.exits:
        rows = [True, False] if plan.drops_rows else [False]
        return [replace(plan, cuts_depth=depth, drops_rows=drops) for depth in (True, False) for drops in rows]
    return [plan] if control == "feature_keep" and plan.select_after is not None else []


def _with(plan: Plan, other: Plan, control: str) -> Plan:
    """Return the plan with one control as in another plan of the same model."""
    controls = {**plan.controls, control: other.controls[control]}
    if control == "unit_keep":
        return replace(plan, groups=other.groups, cuts=other.cuts, order=other.order, controls=controls)
    if control == "exit_threshold":
        drops, depth = other.drops_rows, other.cuts_depth
        return replace(plan, exits=other.exits, drops_rows=drops, cuts_depth=depth, controls=controls)
    return replace(plan, select_after=other.select_after, num_positions=other.num_positions, controls=controls)


def _reason(trial: nn.Module, plan: Plan, links: Sequence[Link], kind: Kind, batches: Sequence[Inputs]) -> str | None:
    """Why a plan does not work, in words; None where it does."""
    try:
        with as_user_error("it fails"):
            _check(trial, plan, links, kind, batches)
    except UserError as error:
        return str(error)
    return None


@torch.no_grad()
def _check_model(model: nn.Module, inputs: Inputs) -> None:
    """Raise UserError for answers that are not finite, or differ between two passes."""
    first, second = (logits_of(forward(model, inputs)) for _ in range(2))
    if not bool(torch.isfinite(first).all()):
        raise UserError(f"{type(model).__name__}: its answers are not finite; give another model")
    if _difference(first, second) > TOLERANCE:
        raise UserError(f"{type(model).__name__}: its answers to one text differ from call to call; give another model")


@torch.no_grad()
def _check_causal(model: nn.Module, inputs: Inputs) -> None:
    """Raise UserError for a language model whose answer to a token depends on later tokens."""
    ids = inputs["input_ids"]
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % int(ids.max() + 1)
    first, second = (logits_of(forward(model, {**inputs, "input_ids": i}))[:, :-1] for i in (ids, changed))
    if _difference(first, second) > TOLERANCE:
        raise UserError(
            f"{type(model).__name__}: its answers depend on later tokens; give a causal model (config: is_decoder)"
        )


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return NOT_FINITE
    return float((a - b).abs().max() / a.abs().max().clamp_min(1.0))


@torch.no_grad()
def _check(
    model: nn.Module,
    plan: Plan,
    links: Sequence[Link],
    kind: Kind,
    batches: Sequence[Inputs],
    *,
    export: bool = False,
    processor: Any = None,
) -> None:
    """Compare the attached model with the shipped one, half of everything left out.

    Args:
        model: untrained, in evaluation mode.
        plan: controls that it does not have stay untouched.
        links: of the hints.
        kind: what the model is for.
        batches: of a few samples, then of each of them alone.
        export: write the shipped student to a folder, and compare what is loaded from it.
        processor: goes into that folder.

    Raises:
        UserError: they differ; says by how much.
    """
    masks = _half_masks(plan)
    keep = 1.0 if plan.select_after is None else 0.5
    with Instrumented(model, plan, list(links)).eval() as student:
        _draw_heads(student)
        group_importance(model, plan.groups)
        whole = student(batches[0], masks, 1.0).logits
        if plan.select_after is not None:
            reordered = student(batches[0], masks, 1.0 - 1e-9).logits  # every token, in another order
            if _difference(whole[-1], reordered[-1]) > TOLERANCE:
                raise UserError("its later blocks tell tokens by their place")
        whole = student(batches[0], masks, keep).logits
        for threshold in (_middle(whole[0]), *((0.0,) if plan.exits else ())):  # some leave; all leave
            shipped = ship(student, kind, masks, keep, threshold)
            if export:
                with tempfile.TemporaryDirectory() as folder:
                    save_module_student(shipped, Path(folder) / "student", processor, {})
                    own = student.clean_copy() if kind == "module" else None
                    shipped = load_module_student(Path(folder) / "student", own)
            for inputs in batches:
                gap = largest_difference(student, shipped, inputs, masks, keep=keep, threshold=threshold)
                if gap > TOLERANCE:
                    raise UserError(f"the shipped model answers otherwise, by {gap:.1e} of its largest answer")
        for number, inputs in enumerate(batches[1:]):
            _check_alone(student, inputs, masks, keep, tuple(z[number] for z in whole))


def _check_alone(student: Instrumented, inputs: Inputs, masks: Masks, keep: float, whole: Sequence[Tensor]) -> None:
    """Raise UserError where a sample's answers [C], or [L, V], differ between a pass alone and a batch."""
    for alone, batched in zip(student(inputs, masks, keep).logits, whole, strict=True):
        row = alone[0]
        gap = _difference(row, batched[: len(row)] if student.plan.per_token else batched)
        if gap > TOLERANCE:
            raise UserError(f"an answer depends on the other samples of its batch, by {gap:.1e} of the largest")


def _half_masks(plan: Plan) -> Masks:
    """Return masks of half the units of every group, one [size] a group, and none of half the blocks of an order."""
    skipped = set(plan.order[(len(plan.order) + 1) // 2 :])
    return tuple((torch.arange(g.size) % 2 == 0).float() * (g.block + 1 not in skipped) for g in plan.groups)


def _draw_heads(student: Instrumented) -> None:
    """Weights of exits, drawn so that their answers differ."""
    generator = torch.Generator().manual_seed(0)
    for head in student.heads:
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + float(student.plan.per_token))


def _middle(logits: Tensor) -> float:
    """Return a threshold that half of the samples, or tokens, pass at the exit of these logits [..., C]."""
    confidence = logits.float().softmax(-1).amax(-1).flatten().sort().values
    half = len(confidence) // 2
    return float(confidence[max(0, half - 1) : half + 1].mean())


def _check_training(model: nn.Module, plan: Plan, links: Sequence[Link], inputs: Inputs) -> None:
    """Raise UserError where half a student has no finite gradient in training mode; change running statistics."""
    masks = _half_masks(plan)
    with Instrumented(model, plan, list(links)).train() as student:
        torch.manual_seed(0)
        outputs = student(inputs, masks, 1.0 if plan.select_after is None else 0.5)
        parts = [*outputs.logits, outputs.features, *([] if outputs.map is None else [outputs.map])]
        loss = torch.stack([part.float().square().sum() for part in parts]).sum()
        parameters = [p for p in student.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
            raise UserError("a training step has gradients that are not finite; give another model")
