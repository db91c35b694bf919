"""A shipped student as one straight graph: every block runs, every exit answers, and masks mark who has left.

`torch.export` cannot follow a student that drops samples on the way. It can follow this form, which gives the same
answers; `rlkd.export.surgery` then puts the early stops back into the exported graph.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.compression import CompactStudent
from rlkd.compression.real import shipped
from rlkd.compression.real.shipped import ShippedStudent
from rlkd.compression.selection import exit_ends
from rlkd.data.examples import PADDING_MASK
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.instrumented import exit_answer, received

Student = CompactStudent | ShippedStudent
BATCH = "batch"  # name of the first dimension in a graph
LOGITS, LAST = "logits", "last_logits"  # the answer, and that of a straight graph
SHARES = (
    1000  # the share of tokens that is kept is rounded up to a multiple of 1 / SHARES; slots that are over are masked
)


class FlatChain(nn.Module):
    """A chain student without its early stops.

    Args:
        student: shares its parameters.
    """

    def __init__(self, student: CompactStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return `go_on`, `waiting` and `answers` of every early exit, then the logits [B, C]."""
        logits = self.exit_logits(*values)
        so_far = logits[0]  # [B, C]
        steps: list[tuple[Tensor, Tensor]] = []
        for index, later in enumerate(logits[1:]):
            stays = self.student.stays(logits[index], index)  # [B]
            steps.append((steps[-1][0] & stays if steps else stays, so_far))
            so_far = torch.where(steps[-1][0][:, None], later, so_far)
        return _outputs(steps, so_far)

    def exit_logits(self, *values: Tensor) -> list[Tensor]:
        """Return the logits [B, C] of every exit, whoever has left before."""
        (inputs,), student = values, self.student
        x = inputs.reshape(inputs.shape[0], *student.input_shape)
        x = x if student.kept_inputs is None else x.index_select(1, student.kept_inputs)  # [B, D']
        logits = []
        for block, layer in enumerate(student.layers, start=1):
            x = F.relu(layer(x))
            if block in student.exits:
                logits.append(student.heads[student.exits.index(block)](x.flatten(1)))
        return logits


class FlatModel(ShippedStudent):
    """A shipped real student without its early stops.

    Args:
        student: shares its model, on which this module sets hooks of its own that rest while it does not run.
        names: of the inputs, in the order in which `forward` takes them.
    """

    def __init__(self, student: ShippedStudent, names: Sequence[str]) -> None:
        super().__init__(student.model, student.heads, replace(student.shipment, drops_rows=False))
        self.names = tuple(names)
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._raw: list[Tensor] = []

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return `go_on`, `waiting` and `answers` of every early exit, then the logits [B, C] or [B, L, V]."""
        last = self.exit_logits(*values)[-1]
        if not self._steps:
            return (last,)
        waiting, so_far = self._steps[-1]
        return _outputs(self._steps, torch.where(waiting[..., None], last, so_far))

    def exit_logits(self, *values: Tensor) -> list[Tensor]:
        """Return the logits of every exit up to the last one that a sample can reach, whoever has left before."""
        inputs = dict(zip(self.names, values, strict=True))
        padding, first = inputs.get(PADDING_MASK), values[0]
        valid = None if padding is None else padding.bool()
        by_token = self.shipment.kind == "causal_lm"
        everyone = torch.ones_like(first, dtype=torch.bool) if by_token else torch.ones_like(first.flatten(1)[:, 0]) > 0
        waiting = valid if by_token and valid is not None else everyone  # [B, L] or [B]
        self._steps, self._raw = [], []
        nothing = torch.empty(0)
        self._batch = shipped._Batch(nothing, waiting, valid, nothing, 0)
        try:
            last = logits_of(forward(self.model, inputs)).float()
        except shipped._AllLeft:
            return self._raw
        finally:
            self._batch = None

        return [*self._raw, last]

    def _enter(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now, s = self._batch, self.shipment
            if now is None:
                return None
            if number - 1 in s.exits and not self._never:
                self._leave(now, s.exits.index(number - 1))
            return self._with_kept_tokens(number, module, now, args, kwargs)

        return hook

    def _leave(self, now: shipped._Batch, index: int) -> None:
        """Record what the exit answers, by the rule of `ShippedStudent`, and go on with all samples."""
        s, hidden = self.shipment, now.hidden
        assert hidden is not None
        by_token = s.kind == "causal_lm"
        logits = exit_answer(self.model, self.heads[index], hidden, now.valid, by_token).float()
        self._raw.append(logits)
        if self._always:
            raise shipped._AllLeft
        answer = logits.argmax(-1)
        now.history.append(answer)
        leave = logits.softmax(-1).amax(-1) >= s.threshold
        if 0 < s.patience <= len(now.history):
            recent = torch.stack(now.history[-s.patience :])  # [patience, B]
            leave = leave | (recent == answer).all(0)
        so_far = torch.where(now.waiting[..., None], logits, self._steps[-1][1]) if self._steps else logits
        now.waiting = now.waiting & ~leave
        self._steps.append((now.waiting, so_far))

    def _select(self, now: shipped._Batch, hidden: Tensor) -> Tensor:
        """As in `ShippedStudent`, with as many slots as a text without padding needs; empty ones are masked."""
        weights, keep = now.weights, self.shipment.keep
        assert weights is not None
        scores = received(weights.float(), now.valid)  # [B, L]
        real = torch.ones_like(scores) > 0 if now.valid is None else now.valid
        scores = torch.where(real, scores, -1.0)
        scores = torch.cat([torch.full_like(scores[:, :1], torch.inf), scores[:, 1:]], dim=1)
        count = (keep * real.sum(1)).round().long().clamp_min(1)  # [B]
        num_slots = (scores.shape[1] * -(-round(keep * SHARES * SHARES) // SHARES) + SHARES - 1) // SHARES
        chosen = scores.topk(num_slots, dim=-1).indices  # [B, L']; in ONNX equal scores go to the lower index, too
        now.valid = torch.arange(num_slots) < count[:, None]
        now.mask = (~now.valid)[:, None, None].to(hidden.dtype) * torch.finfo(hidden.dtype).min
        now.keep_mask = True
        return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))


def flatten(student: Student, names: Sequence[str]) -> FlatChain | FlatModel:
    """Return the straight form of a student, in evaluation mode; it takes the inputs `names` in this order."""
    made = FlatChain(student) if isinstance(student, CompactStudent) else FlatModel(student, names)
    return made.eval()


def num_early_exits(student: Student) -> int:
    """Count the early exits at which some samples leave while others go on."""
    if isinstance(student, CompactStudent):
        return len(student.exits) - 1
    shipment = student.shipment
    always, never = exit_ends(torch.tensor(shipment.threshold), shipment.num_classes)
    return 0 if always or never else len(shipment.exits)


def go_on(exit_number: int) -> str:
    """Name the output that is true while a sample has no answer after early exit `exit_number`, counted from 1."""
    return f"go_on_{exit_number}"


def waiting(exit_number: int) -> str:
    """Name the output that marks the samples without an answer after early exit `exit_number`."""
    return f"waiting_{exit_number}"


def answers(exit_number: int) -> str:
    """Name the output with the logits so far after early exit `exit_number`."""
    return f"answers_{exit_number}"


def output_names(num_early: int) -> list[str]:
    """Return the names of what a flat student gives, in order."""
    early = [name(k) for k in range(1, num_early + 1) for name in (go_on, waiting, answers)]
    return [*early, LAST]


def _outputs(steps: Sequence[tuple[Tensor, Tensor]], logits: Tensor) -> tuple[Tensor, ...]:
    early = [tensor for waiting, so_far in steps for tensor in (waiting.any(), waiting, so_far)]
    return (*early, logits)
