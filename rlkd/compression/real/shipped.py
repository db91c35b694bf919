"""How a shipped student of a real model answers: samples, or a language model's tokens, leave at exits as trained.

Unlike in training, a block is skipped once every sample has left.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlkd.compression.selection import exit_ends, exits_at
from rlkd.data.examples import PADDING_MASK
from rlkd.models.real.hooks import forward, logits_of, pool, tensor_at
from rlkd.models.real.instrumented import choose_tokens, exit_answer
from rlkd.models.real.pretrained import Kind


@dataclass(frozen=True)
class Shipment:
    """What `student.json` says of how a student answers; block numbers count from 1."""

    kind: Kind
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    exits: tuple[int, ...]
    patience: int
    threshold: float
    select_after: int | None
    keep: float  # share of tokens
    num_classes: int  # of a language model the size of its vocabulary
    drops_rows: bool  # samples that left are taken out of the batch; else a batch stops once all have left
    gone: tuple[str, ...] = ()  # modules behind an exit that every sample takes: they have no weights
    skipped: tuple[str, ...] = ()  # blocks that hand on what enters them: they have no weights


class _AllLeft(Exception):
    """Every sample has its answer: the blocks that follow are not run."""


@dataclass
class _Batch:
    """One batch on its way through the blocks."""

    rows: Tensor  # [R] int64, samples that still wait
    waiting: Tensor  # [R] bool; samples that left may stay in the batch
    valid: Tensor | None  # [R, L] bool
    answers: Tensor  # [B, C], filled as samples leave
    size: int  # B
    hidden: Tensor | None = None  # what the last block with an exit gave
    stay: Tensor | None = None  # bool, which of the samples ahead of the last exit are still in the batch
    keep_mask: bool = False  # tokens were left out: the model's own attention mask no longer fits
    mask: Tensor | None = None  # [R, 1, 1, L']
    weights: Tensor | None = None  # [R, heads, L, L] of the selecting block
    history: list[Tensor] = field(default_factory=list)  # answers of the exits so far, each [R]


class ShippedStudent(nn.Module):
    """A trained student that leaves early and leaves tokens out as it was trained to.

    Call it with what the model takes; it gives logits [B, C], each sample's from the exit that it left at.
    """

    def __init__(self, model: nn.Module, heads: nn.ModuleList, shipment: Shipment) -> None:
        super().__init__()
        self.model, self.heads, self.shipment = model, heads, shipment
        self._batch: _Batch | None = None
        s = shipment
        always, never = exit_ends(torch.tensor([s.threshold]), s.num_classes)
        self._always, self._never = bool(always), bool(never)
        for block, path in enumerate(s.blocks[1:], start=2):
            model.get_submodule(path).register_forward_pre_hook(self._enter(block), with_kwargs=True)
        for block in () if self._never else s.exits:
            model.get_submodule(s.blocks[block - 1]).register_forward_hook(self._keep(s.blocks[block - 1]))
        if s.select_after is not None and s.keep < 1.0:
            place = s.attention[s.select_after - 1]
            model.get_submodule(place.partition(":")[0]).register_forward_hook(self._look(place))

    @property
    def config(self) -> Any:
        """The configuration of its model."""
        return self.model.config

    def forward(self, *values: Tensor, **inputs: Tensor) -> Tensor:
        """Logits [B, C]."""
        inputs = _named(self.model, values, inputs)
        size = len(next(iter(inputs.values())))
        padding = inputs.get(PADDING_MASK)
        now = self._batch = _Batch(
            torch.arange(size),
            torch.ones(size, dtype=torch.bool),
            None if padding is None else padding.bool(),
            torch.zeros(size, self.shipment.num_classes),
            size,
        )
        try:
            logits = logits_of(forward(self.model, inputs)).float()
            now.answers[now.rows[now.waiting]] = logits[now.waiting]
        except _AllLeft:
            pass  # every answer is in place
        finally:
            self._batch = None
        return now.answers

    def _keep(self, path: str) -> Any:
        """Keep what a block with an exit gives: the next block may be entered with something else."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._batch is not None:
                self._batch.hidden = tensor_at(output, 0, path)
                if self._always:
                    self._leave(self._batch, 0)

        return hook

    def _look(self, place: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._batch is not None:
                self._batch.weights = tensor_at(output, 1, place)

        return hook

    def _enter(self, number: int) -> Any:
        """Ahead of block `number`: let samples leave that the exit before it answers, then leave tokens out."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now, s = self._batch, self.shipment
            if now is None:
                return None
            before = len(now.rows)
            if number - 1 in s.exits and not self._never:
                self._leave(now, s.exits.index(number - 1))
            if len(now.rows) < now.size:
                args, kwargs = tree_map(lambda value: _of_rows(value, now, before), (args, kwargs))
            return self._with_kept_tokens(number, module, now, args, kwargs)

        return hook

    def _with_kept_tokens(
        self, number: int, module: nn.Module, now: _Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of block `number` for the tokens that stay, some of which may be left out here."""
        selects = number - 1 == self.shipment.select_after and self.shipment.keep < 1.0
        if not selects and not now.keep_mask:
            return args, kwargs
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        if selects:
            first = next(iter(bound.arguments))
            bound.arguments[first] = self._select(now, bound.arguments[first])
        bound.arguments["attention_mask"] = now.mask
        return bound.args, bound.kwargs

    def _leave(self, now: _Batch, index: int) -> None:
        """Answer the samples that leave here, and take them out of the batch where all else can follow."""
        s, hidden = self.shipment, now.hidden
        assert hidden is not None
        logits = self.heads[index](pool(hidden, now.valid)).float()  # [R, C]
        if self._always:
            now.answers = logits
            raise _AllLeft
        confidence, answer = logits.softmax(-1).max(-1)  # [R]
        now.history.append(answer)
        leave = exits_at(confidence, torch.tensor(s.threshold), s.num_classes)
        if 0 < s.patience <= len(now.history):
            recent = torch.stack(now.history[-s.patience :])  # [patience, R]
            leave = leave | (recent == recent[0]).all(0)
        leave = leave & now.waiting
        now.answers[now.rows[leave]] = logits[leave]
        now.waiting = now.waiting & ~leave
        if not bool(now.waiting.any()):
            raise _AllLeft
        if not s.drops_rows:
            return
        stay = now.stay = now.waiting
        now.rows, now.waiting = now.rows[stay], now.waiting[stay]
        now.history = [answers[stay] for answers in now.history]
        now.valid = None if now.valid is None else now.valid[stay]
        now.weights = None if now.weights is None else now.weights[stay]
        now.mask = None if now.mask is None else now.mask[stay]

    def _select(self, now: _Batch, hidden: Tensor) -> Tensor:
        assert now.weights is not None
        chosen, now.valid = choose_tokens(now.weights, now.valid, self.shipment.keep)
        now.mask = (~now.valid)[:, None, None].to(hidden.dtype) * torch.finfo(hidden.dtype).min
        now.keep_mask = True
        return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))


class ShippedCausal(ShippedStudent):
    """A trained language model; it gives logits [B, L, V], each token's from the exit that it left at.

    Later blocks run unless all tokens of the batch have left, for those that go on attend to all before them.
    """

    def forward(self, *values: Tensor, **inputs: Tensor) -> Tensor:
        """Logits [B, L, V]; at padding anything."""
        inputs = _named(self.model, values, inputs)
        ids = inputs["input_ids"]
        padding = inputs.get(PADDING_MASK)
        waiting = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding.bool()  # [B, L]
        now = self._batch = _Batch(torch.arange(len(ids)), waiting, waiting, torch.empty(0), len(ids))
        try:
            logits = logits_of(forward(self.model, inputs)).float()  # [B, L, V]
        except _AllLeft:
            return now.answers
        finally:
            self._batch = None
        return torch.where(now.waiting[..., None], logits, now.answers) if len(now.answers) else logits

    def _leave(self, now: _Batch, index: int) -> None:
        """Answer the tokens that leave here; all stay in the batch."""
        s, hidden = self.shipment, now.hidden
        assert hidden is not None
        logits = exit_answer(self.model, self.heads[index], hidden, now.valid, True).float()  # [B, L, V]
        if self._always:  # nothing to decide, which over a vocabulary would cost more than a block
            now.answers = logits
            raise _AllLeft
        total = logits.logsumexp(-1)  # [B, L]
        best, answer = logits.max(-1)  # [B, L]
        now.history.append(answer)
        leave = exits_at((best - total).exp(), torch.tensor(s.threshold), s.num_classes)
        if 0 < s.patience <= len(now.history):
            recent = torch.stack(now.history[-s.patience :])  # [patience, B, L]
            leave = leave | (recent == recent[0]).all(0)
        leave = leave & now.waiting
        now.answers = torch.where(leave[..., None], logits, now.answers) if len(now.answers) else logits
        now.waiting = now.waiting & ~leave
        if not bool(now.waiting.any()):
            raise _AllLeft


def _named(model: nn.Module, values: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs by name; `values` are given by position, as the model's forward takes them."""
    if not values:
        return inputs
    placed = inspect.signature(model.forward).bind_partial(*values).arguments
    twice = sorted(set(placed) & set(inputs))
    if twice:
        raise TypeError(f"{type(model).__name__}: got {twice[0]} by position and by name; allowed: once")
    return {**placed, **inputs}


def _of_rows(value: Any, now: _Batch, before: int) -> Any:
    """Take from a tensor of all samples, or of the `before` ones ahead of this exit, the rows still in the batch."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) in (len(now.rows), 1):
        return value
    return value[now.stay if len(value) == before else now.rows]


def shipped_student(model: nn.Module, heads: nn.ModuleList, shipment: Shipment) -> ShippedStudent:
    """In evaluation mode, of the class that its kind needs."""
    made = ShippedCausal if shipment.kind == "causal_lm" else ShippedStudent
    return made(model, heads, shipment).eval()
