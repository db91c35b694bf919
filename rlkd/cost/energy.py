"""Energy of a call: read from counters where the machine has them, else estimated from operations and bytes moved.

On a CPU the counter is RAPL, of the processor's package in Linux's powercap; on an NVIDIA GPU it is that of the whole
board, read through NVML. Both count what else runs there, too. The estimate is that of the cost profile (Horowitz,
ISSCC 2014), and always labelled as modelled.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlkd.cost.profile import ENERGY_MODEL

logger = logging.getLogger(__name__)

RAPL = Path("/sys/class/powercap")
RAPL_S = 1.0  # its counters are refreshed about every millisecond
# Yang et al. 2023 (https://arxiv.org/abs/2312.02741): GPUs refresh their power readings up to every 100 ms.
NVML_S = 3.0
# Horowitz, ISSCC 2014, 45 nm: an 8-bit multiply 0.2 pJ and a 32-bit integer add 0.1 pJ.
INT8_MAC_J = 0.3e-12
WEIGHT_BYTES = {"float32": 4, "int8": 1}


@dataclass(frozen=True)
class Energy:
    """Joules of one sample, and where the number comes from."""

    joules: float
    kind: str  # "measured (...)" or "modelled (...)"


def rapl_counters(root: Path = RAPL) -> list[tuple[Path, int]]:
    """Return the counters of all processor packages that can be read, each with its range in microjoules."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue  # a part of a package, which the package's counter includes
        try:
            int((folder / "energy_uj").read_text())
            found.append((folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            return []  # some packages alone would be less than the whole
    return found


def joules_between(before: list[int], after: list[int], ranges: list[int]) -> float:
    """Return joules between two readings in microjoules; a counter that passed its range began anew."""
    return sum((b - a) % (span + 1) for a, b, span in zip(before, after, ranges, strict=True)) / 1e6


@dataclass(frozen=True)
class Counter:
    """An energy counter of this machine."""

    kind: str  # label of what it measures
    read: Callable[[], list[int]]  # a reading of each of its parts
    joules: Callable[[list[int], list[int]], float | None]  # between two readings; None where they do not tell
    measured_s: float  # calls fill so much time between two readings


def rapl_counter(root: Path = RAPL) -> Counter | None:
    """Return the counter of all processor packages; None where it cannot be read."""
    counters = rapl_counters(root)
    if not counters:
        return None
    ranges = [span for _, span in counters]
    return Counter(
        "measured (RAPL, whole package)",
        lambda: [int(path.read_text()) for path, _ in counters],
        lambda before, after: joules_between(before, after, ranges),
        RAPL_S,
    )


def board_joules(before_mj: Sequence[int], after_mj: Sequence[int]) -> float | None:
    """Return joules between two readings of a GPU's counter in millijoules; None where it did not advance."""
    joules = (after_mj[0] - before_mj[0]) / 1e3
    return joules if joules > 0 else None  # 0: too short a time; less: the driver was loaded anew


def nvml_counter(device: torch.device) -> Counter | None:
    """Return the counter of a CUDA device by NVML; None where it cannot be read, which is logged in one line.

    See `nvmlDeviceGetTotalEnergyConsumption`, https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html.
    """
    try:
        import pynvml
    except ImportError:
        logger.warning(
            "energy is an estimate: reading the GPU's counter needs the package nvidia-ml-py; run "
            "`pip install 'rlkd[gpu]'`"
        )
        return None
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES changes the numbers of CUDA's devices, not those of NVML: the UUID is the same in both
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except pynvml.NVMLError as error:
        logger.warning(f"energy is an estimate: the GPU's counter cannot be read ({error})")
        return None
    return Counter(
        "measured (NVML, whole GPU)",
        lambda: [int(pynvml.nvmlDeviceGetTotalEnergyConsumption(board))],
        board_joules,
        NVML_S,
    )


def energy_counter(device: torch.device) -> Counter | None:
    """Return the counter of what runs on `device`; None where it cannot be read."""
    return nvml_counter(device) if device.type == "cuda" else rapl_counter()


def measure_energy(call: Callable[[], object], samples_a_call: int, counter: Counter) -> Energy | None:
    """Return the energy of a sample, everything else that the counter counts included; None where it does not tell."""
    call()
    num_calls, start = 0, time.perf_counter()
    before = counter.read()
    while time.perf_counter() - start < counter.measured_s:
        call()
        num_calls += 1
    joules = counter.joules(before, counter.read())
    return None if joules is None else Energy(joules / (num_calls * samples_a_call), counter.kind)


def estimate_energy(macs: float, parameters: int, batch_size: int, precision: str = "float32") -> Energy:
    """Return the modelled energy of a sample: arithmetic, and weights read once a batch.

    Args:
        macs: of a sample.
        parameters: all are read.
        batch_size: samples that share the reading of the weights.
        precision: "float32" or "int8".
    """
    model: dict[str, Any] = ENERGY_MODEL
    mac_j = model["mac_j"] if precision == "float32" else INT8_MAC_J
    weight_j = model["weight_j"] * WEIGHT_BYTES[precision] / 4
    return Energy(macs * mac_j + parameters * weight_j / batch_size, "modelled (Horowitz, ISSCC 2014: MACs, weights)")
