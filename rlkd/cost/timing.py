"""Measure latency: compacted students over a grid of keep ratios and exit rates, and a non-negative fit.

Everything is timed on one thread unless the caller says otherwise. A latency is the median over interleaved rounds, so
a slow moment of the machine affects one round of every network instead of all rounds of one network.
"""

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from rlkd.compression import compact
from rlkd.compression.selection import exit_ends
from rlkd.cost.profile import (
    ENERGY_MODEL,
    FORMAT,
    CostConfig,
    CostProfile,
    describe,
    load_profile,
    machine,
    save_profile,
)
from rlkd.cost.workload import REGRESSORS, workload
from rlkd.io.cache import cache_dir
from rlkd.models import ChainStudent, ExitGate, initialise

logger = logging.getLogger(__name__)

FEATURE_KEEPS = (1.0, 0.5, 0.2)
UNIT_KEEPS = (1.0, 0.5, 0.25, 0.1)
EXIT_RATES = (0.25, 0.5, 0.75, 0.95)
NUM_ROUNDS = 9
REPORT_ROUNDS = 21  # of reported latencies, for the 95th percentile
CALL_TIME_S = 2e-3


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch on so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, over rounds that were interleaved with those of the other calls."""

    median_s: float
    spread_s: float  # interquartile range
    p95_s: float
    num_rounds: int
    processor_s: float  # median of what the calling thread computed; less than median_s where other processes ran


def _seconds_a_call(call: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds and the calling thread's processor seconds, means over as many calls as fill CALL_TIME_S."""
    once = _elapsed(call, 1)
    wall_s = max(once[0], 1e-7)
    return once if wall_s >= CALL_TIME_S else _elapsed(call, max(1, round(CALL_TIME_S / wall_s)))


def _elapsed(call: Callable[[], object], num_calls: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.thread_time()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - wall) / num_calls, (time.thread_time() - processor) / num_calls


def time_calls(calls: Sequence[Callable[[], object]], num_rounds: int = NUM_ROUNDS, threads: int = 1) -> list[Latency]:
    """Time calls against each other: a warm-up of each, then rounds of all of them, with torch on `threads` threads.

    Every second round goes backwards, so a call does not always follow the same other call.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in calls]
    with torch_threads(threads), torch.inference_mode():
        for call in calls:
            _seconds_a_call(call)  # warm-up
        for number in range(num_rounds):
            for i in range(len(calls)) if number % 2 == 0 else reversed(range(len(calls))):
                seconds[i].append(_seconds_a_call(calls[i]))
    return [summarise(*zip(*column, strict=True)) for column in seconds]


def summarise(seconds: Sequence[float], processor_s: Sequence[float]) -> Latency:
    """Return median, interquartile range and 95th percentile of the rounds."""
    c = sorted(seconds)
    return Latency(
        median_s=statistics.median(c),
        spread_s=c[3 * len(c) // 4] - c[len(c) // 4],
        p95_s=c[math.ceil(0.95 * len(c)) - 1],
        num_rounds=len(c),
        processor_s=statistics.median(processor_s),
    )


def compare_latency(
    student: Callable[[], object],
    dense: Callable[[], object],
    batch_size: int,
    teacher: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Time a student beside the dense student and, if given, the teacher, for `result.json`.

    Args:
        student, dense, teacher: one call on a batch each.
        batch_size: of that batch.

    Returns:
        Seconds of a batch by name, with the prefix of the network, and the student's speed-ups.
    """
    calls = {"": student, "dense_": dense, **({"teacher_": teacher} if teacher else {})}
    timed = dict(zip(calls, time_calls(list(calls.values()), REPORT_ROUNDS), strict=True))
    row: dict[str, float] = {"batch_size": batch_size, "threads": 1, "num_rounds": REPORT_ROUNDS}
    for prefix, latency in timed.items():
        row[f"{prefix}latency_s"] = latency.median_s
        row[f"{prefix}spread_s"] = latency.spread_s
        row[f"{prefix}p95_s"] = latency.p95_s
    row["speedup"] = timed["dense_"].median_s / timed[""].median_s
    if teacher:
        row["speedup_over_teacher"] = timed["teacher_"].median_s / timed[""].median_s
    return row


def load_or_calibrate(config: CostConfig, student: ChainStudent) -> CostProfile:
    """Load the profile that `config` names, or the cached one of this machine and student, or measure a new one."""
    config.check()
    if config.profile is not None:
        return load_profile(Path(config.profile))
    key = json.dumps([FORMAT, machine(), describe(student), config.batch_size])
    path = cache_dir() / f"cost-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return load_profile(path)
    logger.info(f"calibrating: timing compacted students once on this machine (kept in {path})")
    profile = calibrate(student, config.batch_size)
    save_profile(profile, path)
    return profile


def calibrate(student: ChainStudent, batch_size: int) -> CostProfile:
    """Time physically smaller versions of `student` and fit their latency to their workload.

    Args:
        student: gives the structure; its parameters are overwritten.
        batch_size: samples of one inference.
    """
    generator = torch.Generator().manual_seed(0)
    initialise(student, generator)
    inputs = torch.rand(batch_size, *student.input_shape, generator=generator)
    networks, works, settings = [], [], []
    for setting, masks, threshold, rates in _grid(student, inputs):
        networks.append(compact(student, masks, threshold))
        kept = torch.tensor([[mask.sum() for mask in masks]])
        works.append(
            workload(student, kept, rates[None], exit_threshold=torch.tensor([threshold]), batch_size=batch_size)
        )
        settings.append(setting)
    calls: list[Callable[[], object]] = [lambda n=network: n(inputs) for network in networks]  # type: ignore[misc]
    measured = [(latency.median_s, latency.spread_s) for latency in time_calls(calls)]
    rows = torch.cat([work.regressors(batch_size) for work in works]).numpy()  # [M, 8]
    seconds = np.array([median for median, _ in measured])  # [M]
    coefficients = _fit(rows, seconds)
    fitted = rows @ coefficients
    grid = [
        {**setting, "latency_s": median, "spread_s": iqr, "fitted_s": float(fit)}
        for setting, (median, iqr), fit in zip(settings, measured, fitted, strict=True)
    ]
    provenance: dict[str, Any] = {
        "machine": machine(),
        "student": describe(student),
        "latency": "measured (median of interleaved rounds), then fitted",
        "relative_residual": float(np.sqrt(np.mean((fitted / seconds - 1) ** 2))),
        "grid": grid,
    }
    return CostProfile(batch_size, tuple(map(float, coefficients)), dict(ENERGY_MODEL), provenance)


def _fit(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit [8] non-negative coefficients to relative errors.

    Networks without exit decisions determine the cost of calls, layers and arithmetic; networks with decisions then
    determine the cost of deciding. In one fit the many networks with decisions would distort the other coefficients.
    """
    deciding = [REGRESSORS.index("decision_s"), REGRESSORS.index("decided_s")]
    plain = [i for i in range(len(REGRESSORS)) if i not in deciding]
    decides = rows[:, deciding[0]] > 0
    coefficients = np.zeros(len(REGRESSORS))
    coefficients[plain], _ = nnls(rows[~decides][:, plain] / seconds[~decides, None], np.ones(int((~decides).sum())))
    if decides.any():
        rest = 1 - rows[decides] @ coefficients / seconds[decides]
        coefficients[deciding], _ = nnls(rows[decides][:, deciding] / seconds[decides, None], rest)
    return coefficients


def _grid(
    student: ChainStudent, inputs: Tensor
) -> Iterator[tuple[dict[str, float], tuple[Tensor, ...], float, Tensor]]:
    """Yield settings, masks, threshold and exit rates of every network to be timed."""
    feature_keeps = (1.0,) if student.is_conv else FEATURE_KEEPS
    for feature_keep in feature_keeps:
        for unit_keep in UNIT_KEEPS:
            keeps = (feature_keep, *(unit_keep for _ in student.group_sizes[1:]))
            masks = tuple(
                (torch.arange(size) < max(1, round(keep * size))).float()
                for size, keep in zip(student.group_sizes, keeps, strict=True)
            )
            setting = {"feature_keep": feature_keep, "unit_keep": unit_keep}
            num_exits = len(student.exits)
            never = torch.zeros(num_exits)
            yield {**setting, "exit_rate": 0.0}, masks, 1.0, never
            if num_exits == 1:
                continue
            always = torch.zeros(num_exits)
            always[0] = 1.0
            yield {**setting, "exit_rate": 1.0}, masks, 0.0, always
            for rate in EXIT_RATES:
                threshold, rates = _threshold_for(student, masks, inputs, rate)
                for gate in cast("list[ExitGate]", list(student.gates)):
                    gate.stand_for(threshold)
                if any(exit_ends(torch.tensor(threshold), student.num_classes)):
                    continue  # all samples are answered alike by so narrow a network, without a decision
                yield {**setting, "exit_rate": rate}, masks, threshold, rates


@torch.no_grad()
def _threshold_for(
    student: ChainStudent, masks: tuple[Tensor, ...], inputs: Tensor, rate: float
) -> tuple[float, Tensor]:
    """Find the threshold at which about `rate` of the inputs leave at the first exit, and the rates of all exits."""
    confidence = torch.stack([z.softmax(-1).amax(-1) for z in student(inputs, masks).logits])  # [E, B]
    threshold = float(confidence[0].quantile(1.0 - rate))
    waiting = torch.ones(inputs.shape[0], dtype=torch.bool)
    rates = []
    for row in confidence[:-1]:
        leave = waiting & (row >= threshold)
        rates.append(leave.float().mean())
        waiting = waiting & ~leave
    return threshold, torch.stack([*rates, waiting.float().mean()])
