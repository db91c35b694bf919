"""What of a real student can be controlled: found from one dry pass, and said in a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.blocks import Group, Layout, block_paths, find_groups, layout_of
from rlkd.models.real.hooks import capture, forward, resolve, width_of


@dataclass(frozen=True)
class AttachConfig:
    """What is attached to a real student."""

    blocks: str | None = None
    """Pattern of the module paths of its blocks; by default the children of its largest nn.ModuleList."""
    exits: tuple[int, ...] | None = None
    """After which blocks (from 1) an early exit stands; by default one, after half of the blocks."""
    patience: int = 0
    """A sample also leaves where this many exits in a row have agreed (PABEE, Zhou et al. 2020); 0: confidence alone.
    Counts only where the exit control is at neither of its ends."""
    select_after: int = 1
    """After which block (from 1) the least attended tokens are left out."""
    hints: str = "last"
    """Which blocks learn from the teacher's features: `last`, or `all`, spread over the teacher's."""

    def check(self) -> None:
        """Raises UserError for an impossible value."""
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

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Token positions, then the units of every group; where there are none, one unit that always stays."""
        return (self.num_positions, *(group.size for group in self.groups)) if self.groups else (self.num_positions, 1)


def logits_of(output: Any) -> Tensor:
    """Logits [B, C], or [B, L, V] a token, of a model's output: its `logits`, or itself."""
    return torch.as_tensor(output if isinstance(output, Tensor) else output["logits"])


def make_plan(model: nn.Module, inputs: Mapping[str, Tensor], config: AttachConfig, num_positions: int | None) -> Plan:
    """Look at one forward pass of `model`.

    Args:
        model: gives logits [B, C], or [B, L, V] a token, alone or under `logits`.
        inputs: of a few samples.
        config: what to attach.
        num_positions: longest sequence; by default the length in this pass.

    Raises:
        UserError: no blocks, or an exit that stands nowhere.
    """
    config.check()
    blocks = resolve(model, [config.blocks]) if config.blocks else block_paths(model)
    if not blocks:
        raise UserError("student: no nn.ModuleList of blocks was found; name them with --attach.blocks PATTERN")
    layout = layout_of(model, blocks)
    attention = _attention_places(model, blocks, layout, inputs)
    was_training = model.training
    with capture(model.eval(), blocks) as seen:
        logits = logits_of(forward(model, inputs))
    model.train(was_training)
    per_token = logits.ndim == 3
    if logits.ndim != 2 and not per_token:
        raise UserError(
            f"student: got logits of shape {list(logits.shape)}; allowed: [samples, classes] or [samples, tokens, "
            "vocabulary]"
        )
    last = seen[blocks[-1]]
    widths = tuple(width_of(seen[block]) for block in blocks)
    no_exits = per_token and not _has_head_for(model, widths)
    exits = () if no_exits and config.exits is None else _exits(config, len(blocks), no_exits)
    why_not = _why_no_selection(logits, last, attention, config.select_after, len(blocks))
    groups = tuple(find_groups(model, blocks, layout))
    length = (num_positions or last.shape[1]) if last.ndim == 3 else 1
    controls = {
        "weight_attention": (
            "attention weights of the last block"
            if attention
            else "activations of the last block over pixels"
            if last.ndim == 4
            else "not available: the model gives no attention weights"
        ),
        "feature_keep": f"not available: {why_not}" if why_not else f"tokens after block {config.select_after}",
        "unit_keep": _units_in_words(groups),
        "exit_threshold": _about_exits(exits, per_token),
    }
    return Plan(
        tuple(blocks),
        widths,
        exits,
        groups,
        attention,
        None if why_not else config.select_after,
        1 if why_not else length,
        logits.shape[-1],
        last.ndim == 4,
        config.patience,
        controls,
        per_token,
    )


def _units_in_words(groups: tuple[Group, ...]) -> str:
    """What unit_keep masks, and what of it stays in the shipped model."""
    if not groups:
        return "not available: no known layout of feed-forward layers and heads, or of inner channels"
    count = f"in {len(groups)} groups; masked"
    if groups[0].kind == "channels":
        return f"{sum(g.size for g in groups)} inner channels {count} ones stay in the shipped model, as zeros"
    return f"{sum(g.size for g in groups)} hidden units and heads {count} heads stay in the shipped model, as zeros"


def control_table(plan: Plan) -> str:
    """One line a control: what it does to this student, or why it does nothing."""
    always = dict.fromkeys(("weights", "temperature", "learning_rate"), "always")
    return "\n".join(f"{name:<16}  {text}" for name, text in {**always, **plan.controls}.items())


def _about_exits(exits: tuple[int, ...], per_token: bool) -> str:
    if not exits:
        return "not available: no early exit"
    how = " (a token each, through the model's own head; later blocks run unless all have left)" if per_token else ""
    return f"exits after blocks {list(exits)}{how}"


def _has_head_for(model: nn.Module, widths: tuple[int, ...]) -> bool:
    """Whether the head of a language model reads what every block gives."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return isinstance(head, nn.Linear) and set(widths) == {head.in_features}


def _exits(config: AttachConfig, num_blocks: int, no_exits: bool) -> tuple[int, ...]:
    if no_exits and config.exits:
        raise UserError(
            f"attach.exits: got {list(config.exits)}; allowed: [], for this model's head does not read what its blocks "
            "give"
        )
    if config.exits is None:
        return (num_blocks // 2,) if num_blocks > 1 else ()
    if sorted(set(config.exits)) != list(config.exits) or not set(config.exits) <= set(range(1, num_blocks)):
        raise UserError(
            f"attach.exits: got {list(config.exits)}; allowed: rising block numbers from 1 to {num_blocks - 1} "
            "(the last block has the model's own head)"
        )
    return config.exits


def _attention_places(
    model: nn.Module, blocks: list[str], layout: Layout | None, inputs: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """A place a block whose output is weights [B, heads, L, L]; none where the model does not give them."""
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
    logits: Tensor, last: Tensor, attention: tuple[str, ...], select_after: int, num_blocks: int
) -> str:
    """Why tokens cannot be left out, or "". The answer must hang on the first position alone, which always stays."""
    if last.ndim != 3:
        return "the blocks give no tokens"
    if logits.ndim == 3:
        return "every token has an answer of its own"
    if not attention:
        return "the model gives no attention weights"
    if select_after >= num_blocks:
        return f"no block comes after block {select_after}"
    (gradient,) = torch.autograd.grad(logits.sum(), last)
    if bool(gradient[:, 1:].abs().sum() > 0):
        return "the head reads more than the first token"
    return ""
