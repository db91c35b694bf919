"""A real student with early exits, masked units, left-out tokens and adapters, all attached by hooks.

Exits are linear heads on the mean over a block's positions; those of a language model answer every position by a norm
of their own and the model's output embeddings (cf. CALM, Schuster et al. 2022). Tokens are left out once, after an
early block, by how much attention they received there (cf. PoWER-BERT, Goyal et al. 2020, which drops in every block):
later blocks compute fewer positions, in training as at inference. The first token stays, for the model's head reads it.
A block that is skipped hands on what enters it.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlkd.data.examples import PADDING_MASK
from rlkd.models.attention_map import attention_map
from rlkd.models.chain import Masks
from rlkd.models.real.attachment import Plan
from rlkd.models.real.blocks import mask_groups
from rlkd.models.real.hooks import Link, build_adapters, forward, logits_of, pool, tensor_at
from rlkd.models.real.influence import handed_on
from rlkd.models.real.shrink import kept_units

NUM_PIXELS = 16  # positions of a convolutional attention map


class ModuleOutputs(NamedTuple):
    """What one forward pass gives."""

    logits: tuple[Tensor, ...]  # one [B, C], or [B, L, V] a token, an exit, the last being the model's own
    features: Tensor  # [B, F], hint features through the adapters, side by side
    map: Tensor | None  # [B, P], unit norm: attention received in the last block, or activation over pixels
    positions: Tensor | None  # [B, P] which tokens the map is over, where some were left out
    valid: Tensor | None  # [B, P] bool, which of the map's tokens are real
    token_scores: Tensor | None  # [L], attention received after the selecting block, sorted, mean over the batch


@dataclass
class _Pass:
    """One forward pass under way."""

    masks: Masks
    keep: float
    valid: Tensor | None  # [B, L] bool
    skipped: tuple[int, ...]  # blocks, from 1
    last: int  # block that runs
    hidden: dict[int, Tensor] = field(default_factory=dict)  # by block from 1
    weights: dict[int, Tensor] = field(default_factory=dict)  # [B, heads, L, L], by block from 1
    chosen: Tensor | None = None  # [B, L'] int64
    mask: Tensor | None = None  # [B, 1, 1, L'], additive


class Instrumented(nn.Module):
    """A model with what `Plan` says attached to it, until `detach` takes all hooks off again.

    It is a context manager, too, which detaches at its end.

    Args:
        model: any module; called by keyword, its own forward pass is untouched while this one is not running.
        plan: of `make_plan`.
        links: places of the hints, among the plan's blocks.
    """

    def __init__(self, model: nn.Module, plan: Plan, links: list[Link]) -> None:
        super().__init__()
        self.model, self.plan, self.links = model, plan, links
        self.heads = nn.ModuleList(new_head(plan.widths[block - 1], plan) for block in plan.exits)
        self.adapters = build_adapters(links)
        self.terms = nn.ModuleDict()  # modules of loss terms, which train with the student
        cut = [g if g.kind == "heads" and "heads" in plan.cuts else None for g in plan.groups]
        self._cut_heads = {group.block + 1: index for index, group in enumerate(cut) if group is not None}
        self._pass: _Pass | None = None
        self._replayed: _Pass | None = None  # the last pass, whose blocks a backward pass computes again
        self._is_replayed = False
        self._handles: list[RemovableHandle] = []
        linked = {plan.blocks.index(link.student) + 1 for link in links}
        read = {*plan.exits, *linked, *([len(plan.blocks)] if plan.is_conv else [])}
        for number, path in enumerate(plan.blocks, start=1):
            block = model.get_submodule(path)
            if plan.select_after is not None:
                self._handles.append(block.register_forward_pre_hook(self._selector(number), with_kwargs=True))
            if plan.order:  # ahead of the hooks that read what the block gives
                self._handles.append(block.register_forward_hook(self._skipper(number), with_kwargs=True))
            if number in read:
                self._handles.append(block.register_forward_hook(self._keeper(number, "hidden", 0, path)))
        for number, place in enumerate(plan.attention, start=1):
            if number not in (len(plan.blocks), plan.select_after) and not plan.order:
                continue
            module = model.get_submodule(place.partition(":")[0])
            self._handles.append(module.register_forward_hook(self._keeper(number, "weights", 1, place)))
        ones = tuple(torch.ones(group.size) for group in plan.groups)
        self._handles += mask_groups(model, plan.groups, lambda: now.masks if (now := self._now()) else ones)

    def _now(self) -> _Pass | None:
        return self._pass or self._replayed

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within the block, a backward pass may compute blocks again (gradient checkpointing), as the last pass did."""
        self._is_replayed = True
        try:
            yield
        finally:
            self._is_replayed, self._replayed = False, None

    def detach(self) -> None:
        """Take all hooks off the model, which is then as it was before; this module can no longer be called."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clean_copy(self) -> nn.Module:
        """Copy the model without the hooks of this object."""
        copied = copy.deepcopy(self.model)
        ids = {handle.id for handle in self._handles}
        for module in copied.modules():
            kinds = ("", "_with_kwargs", "_always_called")
            for hooks in (vars(module).get(f"_forward{pre}hooks{kind}") for pre in ("_", "_pre_") for kind in kinds):
                for number in ids & set(hooks or ()):
                    del hooks[number]  # type: ignore[union-attr]
        return copied

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def forward(self, inputs: Mapping[str, Tensor], masks: Masks, keep: float = 1.0) -> ModuleOutputs:
        """Logits of every exit, adapted features and the attention map.

        Args:
            inputs: by keyword, as the model takes them.
            masks: one [size] a group of the plan.
            keep: share of each sample's tokens that blocks after `plan.select_after` see.
        """
        if not self._handles and (self.plan.groups or self.plan.exits or self.links):
            raise RuntimeError("this model was detached; make a new Instrumented")
        padding = inputs.get(PADDING_MASK)
        skipped = self.plan.skipped([float(mask.sum()) for mask in masks]) if self.plan.order else ()
        last_run = max((b for b in range(1, len(self.plan.blocks) + 1) if b not in skipped), default=0)
        now = self._pass = _Pass(masks, keep, None if padding is None else padding.bool(), skipped, last_run)
        all_valid = now.valid
        try:
            last = logits_of(forward(self.model, inputs))
        finally:
            self._pass, self._replayed = None, now if self._is_replayed else None
        plan = self.plan
        valid = {b: now.valid if self._selected(now, b) else all_valid for b in now.hidden}
        early = [
            exit_answer(self.model, head, now.hidden[b], valid[b], plan.per_token)
            for b, head in zip(plan.exits, self.heads, strict=True)
        ]
        places = [plan.blocks.index(link.student) + 1 for link in self.links]
        adapted = [a(pool(now.hidden[b], valid[b])) for b, a in zip(places, self.adapters, strict=True)]
        features = torch.cat(adapted, dim=-1) if adapted else last.new_zeros(len(last), 0)  # [B, F]
        seen_by_last = now.valid if self._selected(now, now.last) else all_valid
        return ModuleOutputs(
            logits=(*early, last),
            features=features,
            map=self._map(now, seen_by_last),
            positions=now.chosen if self._selected(now, now.last) else None,
            valid=seen_by_last,
            token_scores=self._token_scores(now, all_valid),
        )

    def _selected(self, now: _Pass, block: int) -> bool:
        return now.chosen is not None and self.plan.select_after is not None and block > self.plan.select_after

    def _weights(self, now: _Pass, block: int) -> Tensor:
        """Attention weights [B, heads, L, L] of a block, without the heads that the shipped student will lack."""
        weights, index = now.weights[block], self._cut_heads.get(block)
        if index is None:
            return weights
        kept = kept_units(self.plan.groups[index], now.masks[index])
        return weights if len(kept) == weights.shape[1] else weights[:, kept]  # no copy of the whole

    def _map(self, now: _Pass, valid: Tensor | None) -> Tensor | None:
        """Return the map of the last block that runs; its real tokens are `valid` [B, L]."""
        if self.plan.is_conv:
            return attention_map(now.hidden[len(self.plan.blocks)].float(), NUM_PIXELS)
        if not self.plan.attention:
            return None
        return F.normalize(received(self._weights(now, now.last).float(), valid), dim=-1, eps=1e-8)

    def _token_scores(self, now: _Pass, valid: Tensor | None) -> Tensor | None:
        if self.plan.select_after is None:
            return None
        scores = received(self._weights(now, self.plan.select_after).detach().float(), valid)  # [B, L]
        ordered = scores.sort(dim=-1, descending=True).values.mean(0)  # [L]
        return F.pad(ordered, (0, self.plan.num_positions - len(ordered)))

    def _keeper(self, number: int, store: str, item: int, place: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            now = self._pass
            if now is not None and (store == "hidden" or number in (now.last, self.plan.select_after)):
                getattr(now, store)[number] = tensor_at(output, item, place)

        return hook

    def _skipper(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            now = self._now()
            return handed_on(args, kwargs, output) if now is not None and number in now.skipped else output

        return hook

    def _selector(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now, after = self._now(), self.plan.select_after
            if now is None or after is None or number <= after or now.keep >= 1.0:
                return None
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            if number == after + 1:
                first = next(iter(bound.arguments))
                hidden = bound.arguments[first]  # [B, L, D]
                now.chosen, now.valid = choose_tokens(self._weights(now, after), now.valid, now.keep)
                now.mask = (~now.valid)[:, None, None].to(hidden.dtype) * torch.finfo(hidden.dtype).min
                index = now.chosen[..., None].expand(-1, -1, hidden.shape[-1])
                bound.arguments[first] = hidden.gather(1, index)  # [B, L', D]
            bound.arguments["attention_mask"] = now.mask
            return bound.args, bound.kwargs

        return hook


def new_head(width: int, plan: Plan) -> nn.Module:
    """Return the new module of an exit: a linear head, or the norm ahead of a language model's own head."""
    return nn.RMSNorm(width) if plan.per_token else nn.Linear(width, plan.num_classes)


def exit_answer(model: nn.Module, head: nn.Module, hidden: Tensor, valid: Tensor | None, per_token: bool) -> Tensor:
    """Logits [B, C] of an exit, or [B, L, V] of a language model's.

    Args:
        model: has the output embeddings.
        head: of `new_head`.
        hidden: [B, L, D] or [B, C, H, W], a block's output.
        valid: [B, L] bool, which positions are real; by default all.
        per_token: whether it is a language model.
    """
    if not per_token:
        return torch.as_tensor(head(pool(hidden, valid)))
    return torch.as_tensor(model.get_output_embeddings()(head(hidden)))  # type: ignore[operator]


def received(weights: Tensor, valid: Tensor | None) -> Tensor:
    """Attention that every position receives: mean over heads and real queries, [B, heads, L, L] gives [B, L].

    Args:
        weights: rows (queries) sum to one.
        valid: [B, L] bool, which positions are real; by default all.
    """
    mean = weights.mean(1)  # [B, L, L]
    if valid is None:
        return mean.mean(1)
    real = valid.to(mean.dtype)  # [B, L]
    return (mean * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1.0) * real


def choose_tokens(weights: Tensor, valid: Tensor | None, keep: float) -> tuple[Tensor, Tensor]:
    """Of every sample's n real tokens, the round(keep n), at least one, that received most attention; the first always.

    Args:
        weights: [B, heads, L, L].
        valid: [B, L] bool; by default all.
        keep: in (0, 1].

    Returns:
        Positions [B, L'] int64, the first token's at 0, and whether each slot is used, [B, L'] bool.
    """
    scores = received(weights.detach().float(), valid).clone()  # [B, L]
    real = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    scores[~real] = -1.0
    scores[:, 0] = float("inf")
    count = (keep * real.sum(1)).round().long().clamp_min(1)  # [B]
    longest = int(count.max())
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :longest]  # [B, L']
    return chosen, torch.arange(longest, device=chosen.device) < count[:, None]
