"""Measure the cost profile of a real student: physically smaller copies of it over a grid, and a non-negative fit.

The grid varies what controls leave out: kept units and heads (the same share everywhere, one of both kinds, and random
shares), skipped blocks, tokens, exits, and the batch size. Every copy is cut and answers as a shipped student does. The
copies share what is not cut with the model. Weights are those before any training: speed does not depend on them.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from rlkd.compression.real.choice import group_shares
from rlkd.compression.real.cut import shipment_of
from rlkd.compression.real.shipped import ShippedStudent, shipped_student
from rlkd.compression.selection import exit_ends
from rlkd.cost.profile import ENERGY_MODEL, machine
from rlkd.cost.real import ModuleProfile, load_speed, regressors
from rlkd.cost.real_work import ModuleWork, count_work, use_of
from rlkd.cost.timing import NUM_ROUNDS, time_calls
from rlkd.io.cache import cache_dir
from rlkd.models.real.attachment import Plan
from rlkd.models.real.hooks import capture, forward
from rlkd.models.real.instrumented import exit_answer, new_head
from rlkd.models.real.pretrained import Kind, transformers
from rlkd.models.real.shrink import kept_units, skip_blocks, take_out, take_units
from rlkd.models.real.traced import is_own_module

logger = logging.getLogger(__name__)

KEEPS = (1.0, 0.5, 0.25, 0.1)
NUM_RANDOM = 4  # settings with a share of its own for every group
DEPTHS = (0.75, 0.5, 0.25)  # kept units of copies that skip blocks
TOKENS = ((1.0, 0.5), (0.5, 0.25), (0.25, 0.5))  # kept units and heads, kept tokens
LEAVING = (1.0, 0.25)  # kept units and heads of copies that leave at the first exit, or by a threshold
BATCHES = (1, 8, 32)
BUDGET_S = 30.0  # of the copies at full size; most are smaller, so less is spent
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """What one copy leaves out."""

    shares: tuple[float, ...]  # kept units, one a group; 0 in blocks that are skipped
    tokens: float = 1.0
    leaves: str = "never"  # never, always, or some: by a threshold that half of the samples pass


@dataclass(frozen=True)
class Point:
    """One call that is timed, and what it runs."""

    setting: Setting
    batch_size: int
    call: Callable[[], object]
    amounts: list[float]  # as of `regressors`


def load_or_measure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    plan: Plan,
    kind: Kind,
    *,
    batch_size: int,
    batches: Sequence[int] = BATCHES,
    threads: int = 1,
) -> ModuleProfile:
    """Read the cached profile of this model and machine, or measure and cache one.

    Args:
        model: the student without its attachments, on the CPU, in evaluation mode.
        inputs: of one sample, [1, ...].
        plan: of the student.
        kind: what the model is for.
        batch_size: samples of the inference whose latency the reward reads.
        batches: further batch sizes that are timed.
        threads: CPU threads of one inference.
    """
    work = count_work(model, inputs, plan)
    sizes = sorted({batch_size, *batches})
    path = (
        cache_dir()
        / f"cost-real-{_key(model, inputs, plan, work, sizes=sizes, batch_size=batch_size, threads=threads)}.json"
    )
    if path.exists():
        return load_speed(path, plan, work, batch_size)
    logger.info("timing physically smaller copies of the student, once on this machine (kept in %s)", path)
    profile = measure(model, inputs, plan, kind, work=work, batch_size=batch_size, sizes=sizes, threads=threads)
    logger.info("the fit misses measured latencies by %.0f %% (RMS)", 100 * profile.provenance["relative_residual"])
    profile.save(path)
    return profile


def _key(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    plan: Plan,
    work: ModuleWork,
    *,
    sizes: Sequence[int],
    batch_size: int,
    threads: int,
) -> str:
    """Return a digest of everything that the latencies depend on."""
    described: Any = getattr(model, "config", None)
    is_own = is_own_module(model)
    config = repr(model) if is_own else {k: v for k, v in described.to_dict().items() if not k.startswith("_name")}
    shapes = {name: (list(value.shape), str(value.dtype)) for name, value in inputs.items()}
    package = torch.__version__ if is_own else transformers().__version__
    parts = [machine(threads), package, type(model).__name__, config, repr(plan), shapes, list(sizes), batch_size]
    reads = [read.groups for part in (*(b.reads for b in work.blocks), work.after_reads) for read in part]
    parts += [reads] if reads else []  # profiles of models without any keep the names that they had
    parts += [list(plan.order)] if plan.order else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def measure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    plan: Plan,
    kind: Kind,
    *,
    work: ModuleWork,
    batch_size: int,
    sizes: Sequence[int],
    threads: int = 1,
) -> ModuleProfile:
    """Time the copies and fit their latency; arguments as of `load_or_measure`, with all batch `sizes`."""
    generator = torch.Generator().manual_seed(0)
    settings = list(_settings(plan, generator))
    kept_sizes, num_rounds = _affordable(model, inputs, sizes, batch_size, len(settings), threads=threads)
    heads = _heads(plan, generator)
    batches = [_rows(inputs, size) for size in kept_sizes]
    points = [p for s in settings for p in _points(model, heads, plan, kind, work, s, batches)]
    measured = time_calls([point.call for point in points], num_rounds, threads)
    rows = np.array([point.amounts for point in points])  # [M, R]
    seconds = np.array([latency.processor_s if threads == 1 else latency.median_s for latency in measured])  # [M]
    coefficients = fit(rows, seconds)
    fitted = rows @ coefficients
    grid = [
        {
            "batch_size": point.batch_size,
            "kept": [round(share, 3) for share in sorted(set(point.setting.shares))],
            "tokens": point.setting.tokens,
            "leaves": point.setting.leaves,
            "latency_s": float(given),
            "wall_s": latency.median_s,
            "spread_s": latency.spread_s,
            "fitted_s": float(by_fit),
        }
        for point, latency, given, by_fit in zip(points, measured, seconds, fitted, strict=True)
    ]
    provenance = {
        "machine": machine(threads),
        "latency": "processor time on one thread (median of interleaved rounds), then fitted"
        if threads == 1
        else f"wall time on {threads} threads (median of interleaved rounds), then fitted",
        "batch_sizes": list(kept_sizes),
        "num_rounds": num_rounds,
        "relative_residual": float(np.sqrt(np.mean((fitted / seconds - 1) ** 2))),
        "median_error": float(np.median(np.abs(fitted / seconds - 1))),
        "grid": grid,
    }
    return ModuleProfile(plan, work, batch_size, tuple(map(float, coefficients)), dict(ENERGY_MODEL), provenance)


def fit(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit non-negative coefficients [R] of amounts `rows` [M, R] to relative errors of `seconds` [M]."""
    scales = np.maximum(rows.max(0), 1e-30)  # amounts differ by ten orders of magnitude
    coefficients, _ = nnls(rows / scales / seconds[:, None], np.ones(len(rows)))
    return np.asarray(coefficients / scales)


def _settings(plan: Plan, generator: torch.Generator) -> Iterator[Setting]:
    """Yield the grid: what the copies leave out."""
    kinds = [group.kind for group in plan.groups if group.kind in plan.cuts]

    def even(share: float, **others: Any) -> Setting:
        return Setting(tuple(share for _ in plan.groups), **others)

    yield even(1.0)
    if kinds:
        for share in KEEPS[1:]:
            yield even(share)
        for kind in sorted(set(kinds)) if len(set(kinds)) > 1 else ():
            yield Setting(tuple(KEEPS[2] if group.kind == kind else 1.0 for group in plan.groups))
        for _ in range(NUM_RANDOM):
            yield Setting(tuple((0.1 + 0.9 * torch.rand(len(plan.groups), generator=generator)).tolist()))
    for share in DEPTHS if plan.order else ():
        shares, stays = group_shares(plan, torch.tensor(share))
        yield Setting(tuple((shares * stays).tolist()))
    for share, tokens in TOKENS if plan.select_after is not None else ():
        yield even(share if kinds else 1.0, tokens=tokens)
    for share in LEAVING if plan.exits else ():
        for leaves in ("always", "some"):
            yield even(share if kinds else 1.0, leaves=leaves)


def _affordable(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    sizes: Sequence[int],
    batch_size: int,
    num_settings: int,
    *,
    threads: int,
) -> tuple[list[int], int]:
    """Return batch sizes and rounds that BUDGET_S allows; `batch_size` always, at least MIN_ROUNDS of it."""
    least = _rows(inputs, sizes[0])
    (once,) = time_calls([partial(forward, model, least)], 1, threads)
    once_s = once.processor_s if threads == 1 else once.median_s
    chosen = [batch_size]
    most = BUDGET_S / num_settings / once_s * sizes[0]  # samples of all rounds of a setting
    for size in sizes:
        if size != batch_size and (sum(chosen) + size) * (MIN_ROUNDS + 1) <= most:
            chosen.append(size)
    return sorted(chosen), max(MIN_ROUNDS, min(NUM_ROUNDS, math.floor(most / sum(chosen)) - 1))


def _rows(inputs: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Make a batch of one sample [1, ...], rolled by one place for each row, so that confidences differ."""
    return {name: torch.cat([value.roll(i, -1) for i in range(size)]).contiguous() for name, value in inputs.items()}


def _heads(plan: Plan, generator: torch.Generator) -> nn.ModuleList:
    """Make exits with weights that tell samples apart."""
    with torch.random.fork_rng(devices=[]):
        heads = nn.ModuleList(new_head(plan.widths[block - 1], plan) for block in plan.exits)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + float(plan.per_token))
    return heads.eval()


def _points(
    model: nn.Module,
    heads: nn.ModuleList,
    plan: Plan,
    kind: Kind,
    work: ModuleWork,
    setting: Setting,
    batches: Sequence[dict[str, Tensor]],
) -> Iterator[Point]:
    """Yield the calls of one setting on batches; none where its threshold would stand at an end."""
    masks = [_mask(group.size, share) for group, share in zip(plan.groups, setting.shares, strict=True)]
    counts = [float(len(kept_units(g, m))) if bool(m.any()) else 0.0 for g, m in zip(plan.groups, masks, strict=True)]
    skipped = plan.skipped(counts)
    tokens = plan.num_positions * (setting.tokens if plan.select_after is not None else 1.0)
    kept = torch.tensor([tokens, *counts]).double()
    student: ShippedStudent | None = None
    for batch in batches:
        rates = torch.eye(len(plan.exits) + 1)[0 if setting.leaves == "always" else -1]
        threshold = 0.0 if setting.leaves == "always" else 1.0
        if student is None or setting.leaves == "some":  # by a threshold of each batch
            small = _smaller(model, plan, masks, skipped)
            if setting.leaves == "some":
                threshold, rates = _half(small, heads, plan, batch)
                if any(exit_ends(torch.tensor(threshold), plan.num_classes)):
                    continue
            shipment = shipment_of(plan, kind, setting.tokens, threshold, skipped=skipped)
            take_out(small, shipment.gone)
            student = shipped_student(small, heads[: len(shipment.exits)], shipment)
        size = len(next(iter(batch.values())))
        use = use_of(work, plan, kept, rates.double(), torch.tensor(threshold), batch_size=size)
        yield Point(setting, size, partial(_call, student, batch), regressors(use, size))


def _call(student: ShippedStudent, batch: dict[str, Tensor]) -> Tensor:
    answers: Tensor = student(**batch)
    return answers


def _mask(size: int, share: float) -> Tensor:
    return (torch.arange(size) < max(1, round(share * size))).float() if share else torch.zeros(size)


def _smaller(model: nn.Module, plan: Plan, masks: Sequence[Tensor], skipped: Sequence[int]) -> nn.Module:
    """Copy the model with fewer units and without `skipped` blocks; the copy shares all tensors that are not cut."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, shared)
    for group, mask in zip(plan.groups, masks, strict=True):
        if group.kind in plan.cuts and group.block + 1 not in skipped:
            take_units(small, group, kept_units(group, mask))
    skip_blocks(small, [plan.blocks[number - 1] for number in skipped])
    return small


@torch.no_grad()
def _half(model: nn.Module, heads: nn.ModuleList, plan: Plan, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Return a threshold that half of the samples, or tokens, pass at the first exit, and the exit rates [E]."""
    places = [plan.blocks[block - 1] for block in plan.exits]
    with capture(model, places) as seen:
        forward(model, batch)
    answers = [
        exit_answer(model, head, seen[place], None, plan.per_token) for head, place in zip(heads, places, strict=True)
    ]
    confidence = torch.stack([z.float().softmax(-1).amax(-1).flatten() for z in answers])  # [E - 1, M]
    threshold = float(confidence[0].median()) - 1e-6
    waiting, rates = torch.ones(confidence.shape[1], dtype=torch.bool), []
    for row in confidence:
        leave = waiting & (row >= threshold)
        rates.append(leave.float().mean())
        waiting = waiting & ~leave
    return threshold, torch.stack([*rates, waiting.float().mean()])
