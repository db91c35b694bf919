"""Find from dry passes which controls a real student supports, and describe them in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.block_calls import ObservedBlock, bears_fewer_rows, observe_blocks
from rlkd.models.real.blocks import Group, Layout, block_paths, find_groups, layout_of, output_layer
from rlkd.models.real.depth import block_order
from rlkd.models.real.hooks import capture, forward, resolve, width_of
from rlkd.models.real.traced import free_exits, is_own_module, traced_groups


@dataclass(frozen=True)
class AttachConfig:
    """What is attached to a real student."""

    blocks: str | None = None
    """Pattern of the module paths of its blocks; by default the children of its largest nn.ModuleList."""
    exits: tuple[int, ...] | None = None
    """After which blocks (from 1) an early exit stands; by default one, after half of the blocks, rounded up."""
    patience: int = 0
    """A sample also leaves where this many exits in a row have agreed (PABEE, Zhou et al. 2020); 0: confidence alone.
    Counts only where the exit control is at neither of its ends."""
    select_after: int = 1
    """After which block (from 1) the least attended tokens are left out."""
    hints: str = "last"
    """Which blocks learn from the teacher's features: `last`, or `all`, spread over the teacher's."""
    units: Literal["width", "depth"] = "width"
    """Whether the control of units leaves out the same share of units in every block (`width`), or whole blocks, those
    of least influence first (`depth`)."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        if self.patience < 0 or self.patience == 1:
            raise UserError(f"attach.patience: got {self.patience}; allowed: 0, or at least 2 exits that agree")
        if self.select_after < 1:
            raise UserError(f"attach.select_after: got {self.select_after}; allowed: at least 1")
        if self.hints not in ("last", "all"):
            raise UserError(f"attach.hints: got {self.hints!r}; allowed: last, all")
        if self.units not in ("width", "depth"):
            raise UserError(f"attach.units: got {self.units!r}; allowed: width, depth")


@dataclass(frozen=True)
class Plan:
    """The places of one student; block numbers count from 1."""

    blocks: tuple[str, ...]
    widths: tuple[int, ...]  # of every block's output
    exits: tuple[int, ...]  # blocks with an early exit; the model's own head is the last exit and not listed
    groups: tuple[Group, ...]
    attention: tuple[str, ...]  # one place a block, or none
    select_after: int | None
    num_positions: int  # of the token group; 1 where tokens cannot be left out
    num_classes: int
    is_conv: bool  # blocks give [B, C, H, W]
    patience: int  # exits in a row that must agree; 0: that rule is off
    controls: dict[str, str]  # control: what it does here, or "not available: ..."
    per_token: bool  # a language model: one answer a position, and exits answer through the model's own head
    drops_rows: bool  # a shipped student can take samples that left out of the batch: all that blocks are given follows
    has_features: bool  # the last block gives one row of features a sample
    cuts: tuple[str, ...]  # kinds of groups whose masked units the shipped model lacks; those of others stay as zeros
    cuts_depth: bool  # the shipped model lacks what lies behind an exit that every sample takes
    after: tuple[str, ...]  # modules with weights that run behind the last block alone; an early exit does without them
    order: tuple[int, ...] = field(default=(), repr=False)  # blocks, skipped from its end; () where all are thinned out

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Token positions, then the units of every group; where there are none, one unit that always stays."""
        return (self.num_positions, *(group.size for group in self.groups)) if self.groups else (self.num_positions, 1)

    def skipped(self, kept: Sequence[float]) -> tuple[int, ...]:
        """Return the blocks that are skipped: those whose groups keep no unit, given how many each group keeps."""
        if not self.order:
            return ()
        left = {group.block for group, count in zip(self.groups, kept, strict=True) if count}
        return tuple(number for number in range(1, len(self.blocks) + 1) if number - 1 not in left)


def make_plan(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    config: AttachConfig,
    num_positions: int | None,
    *,
    samples: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Look at two forward passes of `model`.

    Args:
        model: gives logits [B, C], or [B, L, V] a token, alone or under `logits`.
        inputs: of a few samples, at least two.
        config: what to attach.
        num_positions: longest sequence; by default the length in this pass.
        samples: of the train split, which the influence of blocks is measured on; by default `inputs`.

    Raises:
        UserError: no blocks, an exit that stands nowhere, or blocks that cannot be skipped.
    """
    config.check()
    is_own = is_own_module(model)
    blocks = resolve(model, [config.blocks]) if config.blocks else block_paths(model)
    if not blocks and is_own:
        blocks = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if not blocks:
        raise UserError("student: no nn.ModuleList of blocks was found; name them with --attach.blocks PATTERN")
    layout = layout_of(model, blocks)
    attention = _attention_places(model, blocks, layout, inputs)
    logits, observed, after = observe_blocks(model, blocks, inputs)
    seen = [observed[block] for block in blocks]
    per_token = logits.ndim == 3
    if logits.ndim != 2 and not per_token:
        raise UserError(
            f"student: got logits of shape {list(logits.shape)}; allowed: [samples, classes] or [samples, tokens, "
            "vocabulary]"
        )
    last = seen[-1].hidden
    widths = tuple(0 if block.hidden is None else width_of(block.hidden) for block in seen)
    why_no_exits = _why_no_exits(model, seen, widths, per_token)
    groups = tuple(find_groups(model, blocks, layout) or (traced_groups(model, blocks) if is_own else ()))
    exits = () if why_no_exits and config.exits is None else _exits(config, len(blocks), why_no_exits)
    if is_own and exits:
        exits, groups = _apart(config, exits, groups, blocks)
    if not all(seen[block - 1].hidden is not None for block in exits):
        exits, why_no_exits = (), "a block gives no features of the batch"
    why_not = _why_no_selection(logits, seen, attention, config.select_after)
    order: tuple[int, ...] = ()
    if config.units == "depth":
        stays = None if why_not else config.select_after
        given = inputs if samples is None else samples
        order = block_order(model, given, observed, widths=widths, groups=groups, stays=stays)
    is_conv = last is not None and last.ndim == 4
    length = (num_positions or last.shape[1]) if last is not None and last.ndim == 3 else 1
    controls = {
        "weight_feature": "features of the last block"
        if last is not None
        else "not available: its features do not follow the batch",
        "weight_attention": (
            "attention weights of the last block"
            if attention
            else "activations of the last block over pixels"
            if is_conv
            else "not available: the model gives no attention weights"
        ),
        "feature_keep": f"not available: {why_not}" if why_not else f"tokens after block {config.select_after}",
        "unit_keep": _units_in_words(groups, _kinds(groups), order),
        "exit_threshold": f"not available: {why_no_exits}" if why_no_exits else _about_exits(exits, per_token),
    }
    return Plan(
        blocks=tuple(blocks),
        widths=widths,
        exits=exits,
        groups=groups,
        attention=attention,
        select_after=None if why_not else config.select_after,
        num_positions=1 if why_not else length,
        num_classes=logits.shape[-1],
        is_conv=is_conv,
        patience=config.patience,
        controls=controls,
        per_token=per_token,
        drops_rows=not per_token
        and all(block.enters_as_left and block.follows_rows for block in seen[1:])
        and bears_fewer_rows(model, blocks[-1], inputs, logits),
        has_features=last is not None,
        cuts=_kinds(groups),
        cuts_depth=True,
        after=_outermost(after, _output_path(model) if per_token else ""),
        order=order,
    )


def bare_plan(num_classes: int, per_token: bool) -> Plan:
    """Return the plan of a model that is not looked into: no blocks, no features."""
    return Plan(
        blocks=(),
        widths=(),
        exits=(),
        groups=(),
        attention=(),
        select_after=None,
        num_positions=1,
        num_classes=num_classes,
        is_conv=False,
        patience=0,
        controls={},
        per_token=per_token,
        drops_rows=False,
        has_features=False,
        cuts=(),
        cuts_depth=False,
        after=(),
    )


def without(plan: Plan, control: str, reason: str) -> Plan:
    """Return the plan with one control switched off: `unit_keep`, `feature_keep` or `exit_threshold`."""
    controls = {**plan.controls, control: f"not available: {reason}"}
    if control == "unit_keep":
        return replace(plan, groups=(), cuts=(), order=(), controls=controls)
    if control == "feature_keep":
        return replace(plan, select_after=None, num_positions=1, controls=controls)
    return replace(plan, exits=(), controls=controls)


def keep_zeros(plan: Plan, cuts: tuple[str, ...]) -> Plan:
    """Return the plan for a model whose groups of these kinds alone can be cut; others stay, as zeros."""
    controls = {**plan.controls, "unit_keep": _units_in_words(plan.groups, cuts, plan.order)}
    return replace(plan, cuts=cuts, controls=controls)


def _kinds(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group.kind for group in groups))


def _outermost(paths: Sequence[str], needed: str) -> tuple[str, ...]:
    """Return the paths that lie in no other one of them, without those that hold the module at `needed`."""
    free = [path for path in paths if not f"{needed}.".startswith(f"{path}.")]
    return tuple(path for path in free if not any(path.startswith(f"{other}.") for other in free))


def _output_path(model: nn.Module) -> str:
    """Return the path of a language model's output layer, which its exits answer through; "" where it has none."""
    head = output_layer(model)
    return next((name for name, module in model.named_modules() if module is head), "")


def _apart(
    config: AttachConfig, exits: tuple[int, ...], groups: tuple[Group, ...], blocks: Sequence[str]
) -> tuple[tuple[int, ...], tuple[Group, ...]]:
    """Separate exits and groups of a user's own module: an exit must not read units that are cut.

    Exits that were asked for stay and the groups give way; the default exit moves to the nearest place between groups.
    """
    if config.exits is None:
        free = free_exits(groups, blocks)
        return ((min(free, key=lambda block: abs(block - exits[0])),) if free else ()), groups
    return exits, tuple(group for group in groups if set(exits) <= set(free_exits([group], blocks)))


def _units_in_words(groups: tuple[Group, ...], cuts: tuple[str, ...], order: tuple[int, ...]) -> str:
    """Describe what unit_keep skips or masks, and what of it stays in the shipped model."""
    if not groups:
        return "not available: no known layout of feed-forward layers and heads, or of inner channels"
    what = "inner channels" if groups[0].kind == "channels" else "hidden units and heads"
    stay = [kind for kind in _kinds(groups) if kind not in cuts]
    end = "masked ones are cut out of the shipped model"
    if stay:
        end = f"masked {'heads' if stay == ['heads'] else 'ones'} stay in the shipped model, as zeros"
    if order:
        return (
            f"skips blocks {list(order[:0:-1])} in this order, never block {order[0]}; the next one keeps a share of "
            f"its {what}; skipped blocks are not in the shipped model, {end}"
        )
    return f"{sum(g.size for g in groups)} {what} in {len(groups)} groups; {end}"


def control_table(plan: Plan) -> str:
    """One line a control: what it does to this student, or why it does nothing."""
    always = dict.fromkeys(("weights", "temperature", "learning_rate"), "always")
    return "\n".join(f"{name:<16}  {text}" for name, text in {**always, **plan.controls}.items())


def _about_exits(exits: tuple[int, ...], per_token: bool) -> str:
    if not exits:
        return "not available: no early exit"
    how = " (a token each, through the model's own head; later blocks run unless all have left)" if per_token else ""
    return f"exits after blocks {list(exits)}{how}"


def _why_no_exits(model: nn.Module, seen: Sequence[ObservedBlock], widths: tuple[int, ...], per_token: bool) -> str:
    """Why no exit can stand after a block, or ""."""
    if any(block.num_calls != 1 for block in seen):
        return "its blocks do not run once each, as modules, in one pass"
    if not per_token:
        return ""
    head = output_layer(model)
    if isinstance(head, nn.Linear) and set(widths) == {head.in_features}:
        return ""
    return "the model's head does not read what its blocks give"


def _exits(config: AttachConfig, num_blocks: int, why_not: str) -> tuple[int, ...]:
    if why_not and config.exits:
        raise UserError(f"attach.exits: got {list(config.exits)}; allowed: [], for {why_not}")
    if config.exits is None:
        return ((num_blocks + 1) // 2,) if num_blocks > 1 else ()
    if sorted(set(config.exits)) != list(config.exits) or not set(config.exits) <= set(range(1, num_blocks)):
        rising = f"rising block numbers from 1 to {num_blocks - 1}" if num_blocks > 1 else "[]"
        raise UserError(
            f"attach.exits: got {list(config.exits)}; allowed: {rising} (the last block has the model's own head)"
        )
    return config.exits


def _attention_places(
    model: nn.Module, blocks: list[str], layout: Layout | None, inputs: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Return each block's place of attention weights [B, heads, L, L]; [] where the model does not give them."""
    if layout is None:
        return ()
    places = tuple(f"{block}.{layout.attention}:1" for block in blocks)
    was_training = model.training
    try:
        with torch.no_grad(), capture(model.eval(), places) as seen:
            forward(model, inputs)
    except UserError:  # attention other than eager gives no weights
        return ()
    finally:
        model.train(was_training)
    return places if all(w.ndim == 4 and w.shape[-1] == w.shape[-2] for w in seen.values()) else ()


def _why_no_selection(
    logits: Tensor, seen: Sequence[ObservedBlock], attention: tuple[str, ...], select_after: int
) -> str:
    """Why tokens cannot be left out, or "". The answer must hang on the first position alone, which always stays."""
    last = seen[-1].hidden
    if last is None or last.ndim != 3:
        return "the blocks give no tokens"
    if logits.ndim == 3:
        return "every token has an answer of its own"
    if not attention:
        return "the model gives no attention weights"
    if select_after >= len(seen):
        return f"no block comes after block {select_after}"
    if any(block.num_calls != 1 for block in seen) or not all(block.enters_as_left for block in seen[select_after:]):
        return "its blocks do not hand their tokens on from one to the next"
    (gradient,) = torch.autograd.grad(logits.sum(), last, allow_unused=True)
    if gradient is None:
        return "the head does not read the last block"
    if bool(gradient[:, 1:].abs().sum() > 0):
        return "the head reads more than the first token"
    return ""
