"""Signals of a real teacher for all samples: one pass, cached as memory-mapped files."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rlkd.data.examples import PADDING_MASK, Examples, TokenExamples, to_device
from rlkd.errors import UserError
from rlkd.io.cache import Arrays, Spec, cached_arrays, cached_together, digest_tensors
from rlkd.io.memory import enough_memory
from rlkd.io.processes import in_turns
from rlkd.models.attention_map import attention_map
from rlkd.models.real.attachment import Plan
from rlkd.models.real.hooks import capture, forward, logits_of, pool
from rlkd.models.real.instrumented import NUM_PIXELS, received
from rlkd.models.real.pretrained import device_of, state_of, transformers
from rlkd.models.real.sharding import is_sharded, whole
from rlkd.models.real.traced import is_own_module
from rlkd.teachers.signals import Signals

logger = logging.getLogger(__name__)


TEACHER_LESS = "lower --train.evaluation_batch_size, or spread the teacher with --teacher_device_map auto"


def module_signals(
    teacher: nn.Module, plan: Plan, places: Sequence[str], data: Examples, batch_size: int = 64
) -> Signals:
    """Logits, pooled features and attention maps of one teacher, from the cache where it has them.

    Features of several places lie side by side, each scaled to a mean square of one over the train split. Maps are
    the attention that every token receives in the last block, or convolutional activation over pixels; P is 0 where
    the teacher gives neither.

    Args:
        teacher: on its device; every process must call this for a sharded one.
        plan: of the teacher.
        places: blocks whose output the hints learn.
        data: all samples, as the teacher takes them.
        batch_size: of the pass.
    """
    size, width = len(data.labels), sum(plan.widths[plan.blocks.index(place)] for place in places)
    num_positions = NUM_PIXELS if plan.is_conv else (data.num_positions or plan.num_positions) if plan.attention else 0
    specs: dict[str, Spec] = {"logits": ((size, plan.num_classes), "float32")}
    if places:
        specs["features"] = ((size, width), "float32")
    if num_positions:
        specs["maps"] = ((size, num_positions), "float32")
    key = {**signals_key(teacher, data), "places": " ".join(places)}

    def fill(arrays: Arrays) -> None:
        logger.info(f"one pass of the teacher over {size} samples of {data.name} (kept in the cache)")
        with enough_memory(f"the teacher's answers to {batch_size} samples at once", TEACHER_LESS):
            _fill(arrays, teacher, plan, places, data, batch_size, num_positions)

    tensors = (cached_together if is_sharded(teacher) else cached_arrays)("signals", key, specs, fill)
    logits = tensors["logits"]  # [S, C]
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the teacher's answers are not finite; its weights are damaged, or its inputs too large")
    validation, train = data.splits["validation"], data.splits["train"]
    accuracy = (logits[validation].argmax(-1) == data.labels[validation]).float().mean()
    log_p = F.log_softmax(logits[train], dim=-1)  # [S_train, C]
    entropy = -(log_p.exp() * log_p).sum(-1).mean() / math.log(data.num_classes)
    maps = tensors.get("maps", torch.zeros(size, 0))
    features = tensors.get("features", torch.zeros(size, 0))
    return Signals(logits[None], features[None], maps[None], accuracy[None], entropy[None], plan.is_conv)


def describe_quality(signals: Signals, data: Examples) -> str:
    """Describe the teacher's accuracy on validation, with a warning where a constant answer is as good."""
    if isinstance(data, TokenExamples):
        return ""
    accuracy, labels = float(signals.accuracy[0]), data.labels[data.splits["validation"]]
    chance = float(labels.bincount().max()) / len(labels)
    line = (
        f"the teacher answers {accuracy:.3f} of the validation samples correctly; "
        f"the commonest class has {chance:.3f}\n"
    )
    if accuracy > chance or accuracy == 1.0:
        return line
    return (
        f"{line}WARNING: the teacher is at or below chance on these data: its classes may mean something else than the "
        "labels (see the table of labels in mapping.txt), or its inputs are prepared in another way\n"
    )


def signals_key(teacher: nn.Module, data: Examples) -> dict[str, str]:
    """Say what signals depend on: weights, code, data with their preprocessing, and versions."""
    splits = [(f"split {name}", index) for name, index in sorted(data.splits.items())]
    return {
        "teacher": digest_tensors((name, whole(value)) for name, value in state_of(teacher).items()),
        **_code_key(teacher, data),
        "data": digest_tensors([*sorted(data.inputs.items()), ("labels", data.labels), *splits]),
        "fixed_length": str(data.fixed_length),
        "torch": torch.__version__,
    }


@torch.no_grad()
def _code_key(teacher: nn.Module, data: Examples) -> dict[str, str]:
    """Identify the code of a model: a version of transformers, or the answers of a user's module to a few samples."""
    config: Any = getattr(teacher, "config", None)
    if not is_own_module(teacher):
        text = config.to_json_string(use_diff=False)
        return {"config": hashlib.sha256(text.encode()).hexdigest(), "transformers": transformers().__version__}
    was_training = teacher.training
    inputs = to_device(data.batch(data.few()), device_of(teacher))
    try:
        answers = logits_of(forward(teacher.eval(), inputs)).float().cpu()
    finally:
        teacher.train(was_training)
    return {"module": repr(teacher), "answers": digest_tensors([("answers", answers)])}


@torch.no_grad()
def _fill(
    arrays: Arrays,
    teacher: nn.Module,
    plan: Plan,
    places: Sequence[str],
    data: Examples,
    batch_size: int,
    num_positions: int,
) -> None:
    device = device_of(teacher)
    attention = plan.attention[-1:] if num_positions else ()
    last = plan.blocks[-1:] if plan.is_conv else ()
    with capture(teacher.eval(), [*places, *attention, *last]) as seen:

        def answer(rows: Tensor) -> dict[str, Tensor]:
            inputs = to_device(data.batch(rows), device)
            mask = inputs.get(PADDING_MASK)
            kept = {"logits": logits_of(forward(teacher, inputs))}
            if places:
                kept["features"] = torch.cat([pool(seen[place], mask) for place in places], dim=-1)  # [B, F]
            if num_positions:
                kept["maps"] = _maps(seen, attention, last, mask, num_positions)
            return {name: values.float().cpu() for name, values in kept.items()}

        for rows, kept in answers_of(teacher, data, batch_size, answer):
            for name, values in kept.items():
                arrays[name][rows.numpy()] = values.numpy()
    if places and arrays:
        scale_features(arrays["features"], [plan.widths[plan.blocks.index(p)] for p in places], data.splits["train"])


def answers_of(
    teacher: nn.Module, data: Examples, batch_size: int, answer: Callable[[Tensor], dict[str, Tensor]]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the samples [B] of every batch with the teacher's answers.

    Processes that hold a sharded teacher answer the batches in turns; the first one alone gets the answers.

    Args:
        teacher: gives the answers.
        data: all samples.
        batch_size: of the passes.
        answer: gives the answers to the samples [B], on the CPU.
    """
    batches = torch.split(data.by_length(torch.arange(len(data.labels))), batch_size)
    if is_sharded(teacher):
        yield from in_turns(batches, answer)
        return
    for rows in batches:
        yield rows, answer(rows)


def scale_features(features: NDArray[Any], widths: Sequence[int], train: Tensor) -> None:
    """Bring each place's columns of features [S, F], `widths` wide, to a mean square of one over the train split."""
    start = 0
    for width in widths:
        block = features[:, start : start + width]
        scale = max(float((block[train.numpy()].astype("float64") ** 2).mean()) ** 0.5, 1e-8)
        features[:, start : start + width] = block / scale
        start += width


def _maps(
    seen: dict[str, Tensor], attention: Sequence[str], last: Sequence[str], mask: Tensor | None, num_positions: int
) -> Tensor:
    """[B, P] float32 on the CPU, rows of unit norm."""
    if last:
        return attention_map(seen[last[0]].float(), num_positions).cpu()
    return attention_maps(seen[attention[0]], mask, num_positions)


def attention_maps(weights: Tensor, mask: Tensor | None, num_positions: int) -> Tensor:
    """[B, P] float32 on the CPU: attention [B, heads, L, L] that each token receives, rows of unit norm, then zeros."""
    maps = F.normalize(received(weights.float(), None if mask is None else mask.bool()), dim=-1)
    return F.pad(maps, (0, num_positions - maps.shape[-1])).cpu()
