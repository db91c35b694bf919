"""Find from dry passes which controls a real student supports, and describe them in a table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rlkd.data.examples import PADDING_MASK
from rlkd.errors import UserError
from rlkd.models.real.blocks import Group, Layout, block_paths, find_groups, layout_of
from rlkd.models.real.hooks import capture, forward, resolve, tensor_at, width_of
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

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        if self.patience < 0 or self.patience == 1:
            raise UserError(f"attach.patience: got {self.patience}; allowed: 0, or at least 2 exits that agree")
        if self.select_after < 1:
            raise UserError(f"attach.select_after: got {self.select_after}; allowed: at least 1")
        if self.hints not in ("last", "all"):
            raise UserError(f"attach.hints: got {self.hints!r}; allowed: last, all")


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

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Token positions, then the units of every group; where there are none, one unit that always stays."""
        return (self.num_positions, *(group.size for group in self.groups)) if self.groups else (self.num_positions, 1)


def logits_of(output: Any) -> Tensor:
    """Logits [B, C], or [B, L, V] a token, of a model's output: its `logits`, or itself.

    Raises:
        UserError: it has none.
    """
    if not isinstance(output, Tensor) and "logits" not in output:
        raise UserError(f"student: got an output with {', '.join(output)}; allowed: one with logits")
    return torch.as_tensor(output if isinstance(output, Tensor) else output["logits"])


@dataclass(frozen=True)
class _Observed:
    """What one forward pass showed of a block, beside a second pass with one row and one position fewer."""

    hidden: Tensor | None  # first tensor of its output; None where its first size is not the batch
    num_calls: int
    enters_as_left: bool  # its first argument is the output of the block before
    follows_rows: bool  # every other tensor that it is given has the batch, or one, as first size


def make_plan(model: nn.Module, inputs: Mapping[str, Tensor], config: AttachConfig, num_positions: int | None) -> Plan:
    """Look at two forward passes of `model`.

    Args:
        model: gives logits [B, C], or [B, L, V] a token, alone or under `logits`.
        inputs: of a few samples, at least two.
        config: what to attach.
        num_positions: longest sequence; by default the length in this pass.

    Raises:
        UserError: no blocks, or an exit that stands nowhere.
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
    logits, observed, after = _observe(model, blocks, inputs)
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
        "unit_keep": _units_in_words(groups, _kinds(groups)),
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
        and _bears_fewer_rows(model, blocks[-1], inputs, logits),
        has_features=last is not None,
        cuts=_kinds(groups),
        cuts_depth=True,
        after=_outermost(after, _output_path(model) if per_token else ""),
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
        return replace(plan, groups=(), cuts=(), controls=controls)
    if control == "feature_keep":
        return replace(plan, select_after=None, num_positions=1, controls=controls)
    return replace(plan, exits=(), controls=controls)


def keep_zeros(plan: Plan, cuts: tuple[str, ...]) -> Plan:
    """Return the plan for a model whose groups of these kinds alone can be cut; others stay, as zeros."""
    controls = {**plan.controls, "unit_keep": _units_in_words(plan.groups, cuts)}
    return replace(plan, cuts=cuts, controls=controls)


def _kinds(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group.kind for group in groups))


def _outermost(paths: Sequence[str], needed: str) -> tuple[str, ...]:
    """Return the paths that lie in no other one of them, without those that hold the module at `needed`."""
    free = [path for path in paths if not f"{needed}.".startswith(f"{path}.")]
    return tuple(path for path in free if not any(path.startswith(f"{other}.") for other in free))


def _output_path(model: nn.Module) -> str:
    """Return the path of a language model's output layer, which its exits answer through; "" where it has none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return next((name for name, module in model.named_modules() if module is head), "")


def _observe(
    model: nn.Module, blocks: Sequence[str], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, _Observed], list[str]]:
    """Logits of a pass, with their graph, what the pass showed of every block, and what ran behind the last one."""
    was_training = model.training
    model.eval()
    try:
        with _calls(model, blocks) as first, _order(model, blocks) as order:
            logits = logits_of(forward(model, inputs))
        with _calls(model, blocks) as second, torch.no_grad():
            other = _other_pass(model, inputs, second)
    finally:
        model.train(was_training)
    sizes = (len(next(iter(inputs.values()))), other)
    observed: dict[str, _Observed] = {}
    before: Tensor | None = None
    for block in blocks:
        calls, others = first[block], second[block]
        hidden = _hidden(calls, others, sizes) if calls and others else None
        entered = calls[0][0] if calls else None
        observed[block] = _Observed(
            hidden,
            len(calls),
            before is not None and entered is not None and torch.equal(entered, before),
            bool(calls) and bool(others) and _follow_rows(calls[0][1], others[0][1], sizes),
        )
        before = hidden
    last = max((number for number, path in enumerate(order) if path is None), default=len(order))
    early = set(order[:last])
    after = dict.fromkeys(path for path in order[last:] if path is not None and path not in early)
    return logits, observed, list(after)


Call = tuple[Tensor | None, list[Tensor], Any]  # first argument, the other tensors, output


@contextmanager
def _calls(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of every block within the `with` block, in their order."""
    calls: dict[str, list[Call]] = {block: [] for block in blocks}
    handles = []
    for block in blocks:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, block: str = block) -> None:
            leaves = tree_leaves((args, kwargs))
            first = leaves[0] if leaves and isinstance(leaves[0], Tensor) else None
            calls[block].append((first, [leaf for leaf in leaves[1:] if isinstance(leaf, Tensor)], output))

        handles.append(model.get_submodule(block).register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _order(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[str | None]]:
    """Yield a list that passes fill: paths of modules with weights of their own as they begin, None as a block ends."""
    order: list[str | None] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    handles += [model.get_submodule(path).register_forward_hook(lambda *_: order.append(None)) for path in blocks]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _other_pass(model: nn.Module, inputs: Mapping[str, Tensor], calls: dict[str, list[Call]]) -> int:
    """Run another number of rows and, where the model takes it, one position of a text fewer; gives that number."""
    size = len(next(iter(inputs.values())))
    index = torch.arange(size - 1) if size > 1 else torch.zeros(2, dtype=torch.int64)
    rows = {name: values[index] for name, values in inputs.items()}
    mask = rows.get(PADDING_MASK)
    length = 0 if mask is None else mask.shape[1]
    shorter = {k: v[:, :-1] if v.ndim > 1 and v.shape[1] == length else v for k, v in rows.items()}
    try:
        forward(model, shorter)
    except Exception:  # a model that takes whole texts alone: what the blocks showed before it failed does not count
        for seen in calls.values():
            seen.clear()
        forward(model, rows)
    return len(index)


def _hidden(calls: Sequence[Call], others: Sequence[Call], sizes: tuple[int, int]) -> Tensor | None:
    """Return the last call's output, [B, L, D], [B, C, H, W] or [B, D], of the batch's size and the model's width."""
    try:
        hidden, smaller = (tensor_at(given[-1][2], 0, "") for given in (calls, others))
    except UserError:
        return None
    fits = (hidden.shape[0], smaller.shape[0]) == sizes and 2 <= hidden.ndim <= 4
    return hidden if fits and hidden.ndim == smaller.ndim and width_of(hidden) == width_of(smaller) else None


@torch.no_grad()
def _bears_fewer_rows(model: nn.Module, last: str, inputs: Mapping[str, Tensor], logits: Tensor) -> bool:
    """Whether the model answers the rest rightly when one row is taken away ahead of its last block."""
    size = len(logits)

    def drop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(lambda v: v[:-1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v, (args, kwargs))

    was_training = model.training
    handle = model.get_submodule(last).register_forward_pre_hook(drop, with_kwargs=True)
    try:
        fewer = logits_of(forward(model.eval(), inputs))
    except Exception:  # what follows needs every row, whatever it raises
        return False
    finally:
        handle.remove()
        model.train(was_training)
    return size > 1 and fewer.shape[0] == size - 1 and torch.allclose(fewer, logits[:-1], rtol=1e-4, atol=1e-5)


def _follow_rows(tensors: Sequence[Tensor], others: Sequence[Tensor], sizes: tuple[int, int]) -> bool:
    """Whether each has the batch as first size, or one."""
    if len(tensors) != len(others):
        return False
    pairs = zip(tensors, others, strict=True)
    return all(a.ndim > 0 and (a.shape[0], b.shape[0]) in (sizes, (1, 1)) for a, b in pairs)


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


def _units_in_words(groups: tuple[Group, ...], cuts: tuple[str, ...]) -> str:
    """Describe what unit_keep masks, and what of it stays in the shipped model."""
    if not groups:
        return "not available: no known layout of feed-forward layers and heads, or of inner channels"
    what = "inner channels" if groups[0].kind == "channels" else "hidden units and heads"
    stay = [kind for kind in _kinds(groups) if kind not in cuts]
    end = "masked ones are cut out of the shipped model"
    if stay:
        end = f"masked {'heads' if stay == ['heads'] else 'ones'} stay in the shipped model, as zeros"
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


def _why_no_exits(model: nn.Module, seen: Sequence[_Observed], widths: tuple[int, ...], per_token: bool) -> str:
    """Why no exit can stand after a block, or ""."""
    if any(block.num_calls != 1 for block in seen):
        return "its blocks do not run once each, as modules, in one pass"
    if not per_token:
        return ""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if isinstance(head, nn.Linear) and set(widths) == {head.in_features}:
        return ""
    return "the model's head does not read what its blocks give"


def _exits(config: AttachConfig, num_blocks: int, why_not: str) -> tuple[int, ...]:
    if why_not and config.exits:
        raise UserError(f"attach.exits: got {list(config.exits)}; allowed: [], for {why_not}")
    if config.exits is None:
        return ((num_blocks + 1) // 2,) if num_blocks > 1 else ()
    if sorted(set(config.exits)) != list(config.exits) or not set(config.exits) <= set(range(1, num_blocks)):
        raise UserError(
            f"attach.exits: got {list(config.exits)}; allowed: rising block numbers from 1 to {num_blocks - 1} "
            "(the last block has the model's own head)"
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


def _why_no_selection(logits: Tensor, seen: Sequence[_Observed], attention: tuple[str, ...], select_after: int) -> str:
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
