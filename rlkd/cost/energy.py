"""Energy of a call: read from counters where the machine has them, else estimated from operations and bytes moved.

The counter is RAPL, of the processor's package in Linux's powercap; it counts what else runs there, too. The estimate
is that of the cost profile (Horowitz, ISSCC 2014), and always labelled as modelled.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.cost.profile import ENERGY_MODEL

RAPL = Path("/sys/class/powercap")
MEASURED_S = 1.0  # counters are refreshed about every millisecond
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


def measure_energy(call: Callable[[], object], samples_a_call: int, root: Path = RAPL) -> Energy | None:
    """Return the energy of a sample by RAPL, everything else on the machine included; None where it cannot be read."""
    counters = rapl_counters(root)
    if not counters:
        return None
    call()
    num_calls, start = 0, time.perf_counter()
    before = [int(path.read_text()) for path, _ in counters]
    while time.perf_counter() - start < MEASURED_S:
        call()
        num_calls += 1
    after = [int(path.read_text()) for path, _ in counters]
    joules = joules_between(before, after, [span for _, span in counters])
    return Energy(joules / (num_calls * samples_a_call), "measured (RAPL, whole package)")


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
