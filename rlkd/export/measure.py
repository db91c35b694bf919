"""Measure forms of a student side by side: latency, throughput, memory, size, work, energy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rlkd.cost.energy import Energy, energy_counter, estimate_energy, measure_energy
from rlkd.cost.timing import REPORT_ROUNDS, Latency, time_calls

NUM_COUNTED = 32  # samples whose operations are counted, one at a time, where early exits make them differ
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CPU = torch.device("cpu")

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class MeasuredForm:
    """One form of one student."""

    name: str
    load: Callable[[], Callable[[Inputs], object]]  # makes it anew, to see what memory it takes
    file_bytes: int | None  # None: it has no file of its own
    parameters: int
    macs: float  # of a sample, in the mean
    precision: str  # "float32" or "int8"
    accuracy: float | None = None  # on test data


def count_macs(run: Callable[[Inputs], object], samples: Sequence[Inputs]) -> float:
    """Return the multiply-accumulates of a sample, in the mean over samples that are run one at a time.

    Matrix products and convolutions count, as torch dispatches them; elementwise work does not.
    """
    total = 0.0
    for inputs in samples:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(inputs)
        total += counter.get_total_flops() / 2
    return total / len(samples)


def parameters_of(module: nn.Module) -> int:
    """Count the parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def peak_memory_bytes(load: Callable[[], Callable[[Inputs], object]], inputs: Inputs) -> int | None:
    """Return how much resident memory making a student and one call add at most; None where Linux does not tell.

    The process is warm: what libraries take at their first call is not counted.
    """
    load()(inputs)
    try:
        CLEAR.write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        load()(inputs)
        return max(0, _resident("VmHWM") - before)
    except (OSError, KeyError, ValueError):
        return None


def _resident(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def measure(
    forms: Sequence[MeasuredForm],
    batch: Callable[[int], Inputs],
    batch_sizes: Sequence[int],
    threads: int = 1,
    num_rounds: int = REPORT_ROUNDS,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """Return a row for each form; all are timed against each other at every batch size.

    Args:
        forms: of one or several students on the same data.
        batch: gives the inputs of so many samples.
        batch_sizes: samples that one call answers.
        threads: of a call.
        num_rounds: interleaved rounds.
        device: that the forms run on; memory is measured on a CPU alone.
    """
    is_cpu, counter = device.type == "cpu", energy_counter(device)
    memory = [peak_memory_bytes(form.load, batch(max(batch_sizes))) if is_cpu else None for form in forms]
    runs = [form.load() for form in forms]
    rows: list[dict[str, Any]] = [
        {
            "form": form.name,
            "precision": form.precision,
            "parameters": form.parameters,
            "macs": form.macs,
            "file_bytes": form.file_bytes,
            "peak_memory_bytes": peak,
            "accuracy": form.accuracy,
            "batches": {},
        }
        for form, peak in zip(forms, memory, strict=True)
    ]
    for size in batch_sizes:
        inputs = batch(size)
        calls = [partial(run, inputs) for run in runs]
        timed = time_calls(calls, num_rounds, threads)
        for row, form, call, latency in zip(rows, forms, calls, timed, strict=True):
            energy = measure_energy(call, size, counter) if counter else None
            energy = energy or estimate_energy(form.macs, form.parameters, size, form.precision)
            row["batches"][str(size)] = _row(latency, size, threads, energy, form.accuracy)
    return rows


def _row(latency: Latency, batch_size: int, threads: int, energy: Energy, accuracy: float | None) -> dict[str, Any]:
    """Return what was measured of one form at one batch size."""
    return {
        "latency_s": latency.median_s,
        "spread_s": latency.spread_s,
        "p95_s": latency.p95_s,
        "num_rounds": latency.num_rounds,
        "threads": threads,
        "throughput_per_s": batch_size / latency.median_s,
        "energy_j": energy.joules,
        "energy_kind": energy.kind,
        "accuracy_per_joule": None if accuracy is None or energy.joules <= 0 else accuracy / energy.joules,
    }
