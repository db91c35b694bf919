"""Signals of a causal language model for all texts: its k likeliest next tokens, one pass, cached as mapped files.

A text of L tokens over a vocabulary of V has L V logits, for which there is no room; kept are k of them a position and
the logsumexp of the others (`rlkd.losses.tokens`), with features and attention maps as of any teacher.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.data import Labelled, Task
from rlkd.data.anchors import Anchors
from rlkd.data.examples import PADDING_MASK, TokenExamples, to_device
from rlkd.errors import UserError
from rlkd.io.cache import Arrays, Spec, cached_arrays, cached_together
from rlkd.io.memory import enough_memory
from rlkd.losses.tokens import TopK, masked_mean, top_k
from rlkd.models.real.attachment import Plan
from rlkd.models.real.hooks import capture, forward, logits_of, pool
from rlkd.models.real.pretrained import device_of
from rlkd.models.real.sharding import is_sharded
from rlkd.teachers.landmarks import LANDMARKS
from rlkd.teachers.real.module_signals import TEACHER_LESS, answers_of, attention_maps, scale_features, signals_key
from rlkd.teachers.signals import Signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSignals(Signals):
    """Of one teacher. `logits` is [1, S, 0]; `accuracy` is the quality (`Anchors`) of its validation cross entropy."""

    tokens: TopK  # fields [S, L, k], [S, L, k] int64, [S, L]
    losses: Tensor  # [S, L - 1], the teacher's cross entropy of every next token, nats
    hits: Tensor  # [S, L - 1], 1 where the teacher's likeliest token is the next one
    counted: Tensor  # [S, L - 1] bool
    anchors: Anchors

    def agreement(self, teacher: int, samples: Tensor, labels: Tensor) -> Tensor:
        """Quality of the teacher's cross entropy on the texts at `samples` [B]; labels play no part."""
        return self.anchors.quality(self.mean(self.losses, samples))

    def landmarks(self, data: Labelled, tasks: Sequence[Task]) -> Tensor:
        """[N, 5], the teacher's quality everywhere: a vocabulary is too large for closed forms."""
        return self.accuracy.expand(len(tasks), len(LANDMARKS))

    def mean(self, values: Tensor, samples: Tensor) -> Tensor:
        """Mean of values [S, L - 1] over the counted positions of the texts at `samples`; a scalar."""
        return masked_mean(values[samples], self.counted[samples])

    def top(self, samples: Tensor, length: int) -> TopK:
        """Of the texts at `samples` [B], cut to `length` positions."""
        return TopK(*(values[samples, :length] for values in self.tokens))


def token_signals(
    teacher: nn.Module,
    plan: Plan,
    places: Sequence[str],
    data: TokenExamples,
    k: int,
    anchors: Anchors,
    batch_size: int = 8,
) -> TokenSignals:
    """As `module_signals`, for a causal language model.

    Args:
        teacher: on its device; gives logits [B, L, V].
        plan: of the teacher.
        places: blocks whose output the hints learn.
        data: all texts; a teacher's answers beyond its vocabulary are left out.
        k: logits a position that are kept.
        anchors: of perplexity.
        batch_size: of the pass.

    Raises:
        UserError: k is not from 1 to V, or the teacher's answers are not finite.
    """
    if not 1 <= k <= data.num_classes:
        raise UserError(f"tokens.top_k: got {k}; allowed: 1 to {data.num_classes}, the teacher's vocabulary")
    size, length = data.inputs["input_ids"].shape
    width = sum(plan.widths[plan.blocks.index(place)] for place in places)
    specs: dict[str, Spec] = {
        "values": ((size, length, k), "float32"),
        "indices": ((size, length, k), "int64"),
        "rest": ((size, length), "float32"),
        "losses": ((size, length - 1), "float32"),
        "hits": ((size, length - 1), "float32"),
        "entropy": ((size, length - 1), "float32"),
    }
    if places:
        specs["features"] = ((size, width), "float32")
    if plan.attention:
        specs["maps"] = ((size, length), "float32")
    key = {**signals_key(teacher, data), "places": " ".join(places), "k": str(k), "vocabulary": str(data.num_classes)}

    def fill(arrays: Arrays) -> None:
        logger.info(f"one pass of the teacher over {size} texts of {data.name} (kept in the cache)")
        with enough_memory(f"the teacher's answers to {batch_size} samples at once", TEACHER_LESS):
            _fill(arrays, teacher, plan, places, data, k, batch_size)

    tensors = (cached_together if is_sharded(teacher) else cached_arrays)("tokens", key, specs, fill)
    signals = TokenSignals(
        logits=torch.zeros(1, size, 0),
        features=tensors.get("features", torch.zeros(size, 0))[None],
        maps=tensors.get("maps", torch.zeros(size, 0))[None],
        accuracy=torch.zeros(1),
        entropy=torch.zeros(1),
        are_conv=False,
        tokens=TopK(tensors["values"], tensors["indices"], tensors["rest"]),
        losses=tensors["losses"],
        hits=tensors["hits"],
        counted=data.counted,
        anchors=anchors,
    )
    if not bool(torch.isfinite(signals.losses[data.counted]).all() and torch.isfinite(signals.tokens.values).all()):
        raise UserError("the teacher's answers are not finite; its weights are damaged, or its inputs too large")
    nats = signals.mean(signals.losses, data.splits["validation"])
    entropy = signals.mean(tensors["entropy"], data.splits["train"]) / math.log(data.num_classes)
    return dataclasses.replace(signals, accuracy=anchors.quality(nats)[None], entropy=entropy[None])


@torch.no_grad()
def _fill(
    arrays: Arrays,
    teacher: nn.Module,
    plan: Plan,
    places: Sequence[str],
    data: TokenExamples,
    k: int,
    batch_size: int,
) -> None:
    device = device_of(teacher)
    attention, length = plan.attention[-1:], data.inputs["input_ids"].shape[1]
    with capture(teacher.eval(), [*places, *attention]) as seen:

        def answer(rows: Tensor) -> dict[str, Tensor]:
            inputs = to_device(data.batch(rows), device)
            ids, mask = inputs["input_ids"], inputs[PADDING_MASK]
            logits = logits_of(forward(teacher, inputs))[..., : data.num_classes].float()  # [B, L, V]
            log_p = F.log_softmax(logits[:, :-1], dim=-1)  # [B, L - 1, V]
            kept = {
                **top_k(logits, k)._asdict(),
                "losses": -log_p.gather(-1, ids[:, 1:, None])[..., 0],
                "hits": (log_p.argmax(-1) == ids[:, 1:]).float(),
                "entropy": -(log_p.exp() * log_p).sum(-1),
            }
            if places:
                kept["features"] = torch.cat([pool(seen[place], mask) for place in places], dim=-1).float()  # [B, F]
            if attention:
                kept["maps"] = attention_maps(seen[attention[0]], mask, length)
            return {name: values.cpu() for name, values in kept.items()}

        for rows, kept in answers_of(teacher, data, batch_size, answer):
            for name, values in kept.items():
                arrays[name][rows.numpy(), : values.shape[1]] = values.numpy()
    if places and arrays:
        scale_features(arrays["features"], [plan.widths[plan.blocks.index(p)] for p in places], data.splits["train"])
