"""The cost profile: cost of a workload on this machine, measured once, so that rewards never read a clock."""

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.cost.workload import REGRESSORS, Workload, dense_workload, workload
from rlkd.errors import UserError
from rlkd.io.files import number, read_json, reason, whole, write_whole
from rlkd.models import ChainStudent

FORMAT = 2
MAX_BATCH = 65_536
MAX_FIGURE = 1e3  # seconds or joules of one operation

# Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm, 0.9 V: a 32-bit float multiply 3.7 pJ and add
# 0.9 pJ; a 64-bit read of an 8 / 32 / 1024 KiB cache 10 / 20 / 100 pJ. Activations are taken to live in the
# 32 KiB cache (one write, one read), weights to come from the 1 MiB one, once a batch.
ENERGY_MODEL = {
    "kind": "modelled",
    "source": "Horowitz, ISSCC 2014 (45 nm): operations and bytes moved; not calibrated on this machine",
    "mac_j": 4.6e-12,
    "activation_j": 2 * 4 * 20e-12 / 8,
    "weight_j": 4 * 100e-12 / 8,
    "input_j": 4 * 20e-12 / 8,
}


@dataclass(frozen=True)
class CostConfig:
    """Where costs come from."""

    profile: str | None = None
    """A cost profile written by `rlkd calibrate`; by default one is made for this machine and student, and cached."""
    batch_size: int = 1024
    """Samples that one inference answers together, on one thread: the latency that the reward reads."""

    def check(self) -> None:
        """Raise UserError for an impossible batch size."""
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise UserError(f"cost.batch_size: got {self.batch_size}; allowed: 1 to {MAX_BATCH}")


@dataclass(frozen=True)
class Cost:
    """Cost of one inference of N students, with ratios to the dense student. Each [N]."""

    latency_s: Tensor  # of a batch
    energy_j: Tensor  # of a sample
    macs: Tensor  # of a sample
    latency_ratio: Tensor  # to the dense student
    energy_ratio: Tensor
    macs_ratio: Tensor
    parameters: Tensor  # of the student as it ships
    size_ratio: Tensor  # of the parameters

    @property
    def ratios(self) -> Tensor:
        """Return [N, 4], ratios to the dense student in the order of `rlkd.data.distribution.COSTS`."""
        return torch.stack([self.latency_ratio, self.energy_ratio, self.macs_ratio, self.size_ratio], dim=-1)


@dataclass(frozen=True)
class CostProfile:
    """Latency as a linear function of the workload, fitted on measured networks, and the energy model."""

    batch_size: int
    coefficients: tuple[float, ...]  # seconds, one a regressor, each >= 0
    energy: dict[str, Any]
    provenance: dict[str, Any]  # machine, versions, threads, student, grid with measured and fitted times, residual

    def latency_s(self, work: Workload) -> Tensor:
        """Return [N], seconds of one batch."""
        coefficients = torch.tensor(self.coefficients, dtype=torch.float64)  # [8]
        seconds: Tensor = work.regressors(self.batch_size) @ coefficients
        return seconds

    def energy_j(self, work: Workload) -> Tensor:
        """Return [N], joules of one sample."""
        e = self.energy
        joules: Tensor = (
            work.macs * e["mac_j"]
            + work.activations * e["activation_j"]
            + work.weights * (e["weight_j"] / self.batch_size)
            + work.inputs * e["input_j"]
        )
        return joules

    def cost(self, student: ChainStudent, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor) -> Cost:
        """Return the cost of N students of one structure; arguments as in `workload`."""
        work = workload(student, kept, exit_rates, exit_threshold=exit_threshold, batch_size=self.batch_size)
        dense = dense_workload(student, self.batch_size)
        latency, energy = self.latency_s(work), self.energy_j(work)
        return Cost(
            latency.float(),
            energy.float(),
            work.macs.float(),
            (latency / self.latency_s(dense)).float(),
            (energy / self.energy_j(dense)).float(),
            (work.macs / dense.macs).float(),
            work.parameters.float(),
            (work.parameters / dense.parameters).float(),
        )


def save_profile(profile: CostProfile, path: Path) -> None:
    """Write the profile as JSON, whole or not at all."""
    card = {"format": FORMAT, **asdict(profile)}
    card["coefficients"] = dict(zip(REGRESSORS, profile.coefficients, strict=True))
    write_whole(path, json.dumps(card, indent=1, allow_nan=False) + "\n")


def load_profile(path: Path | str) -> CostProfile:
    """Read a profile.

    Raises:
        UserError: the file is missing or is not a cost profile of this format.
    """
    path = Path(path)
    try:
        card = read_json(path, "a cost profile")
    except UserError as error:
        raise UserError(f"{error}; run `rlkd calibrate`") from error
    try:
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']!r:.20}; allowed: {FORMAT}")
        given = card["coefficients"]
        coefficients = tuple(number(given[name], f"coefficients.{name}", 0.0, MAX_FIGURE) for name in REGRESSORS)
        if sum(coefficients) <= 0:
            raise ValueError("every coefficient is 0")
        energy: dict[str, Any] = {}
        for name in ENERGY_MODEL:
            value = card["energy"][name]
            if name in ("kind", "source"):
                if not isinstance(value, str):
                    raise ValueError(f"energy.{name} is {value!r:.40}; allowed: a text")
                energy[name] = value
            else:
                energy[name] = number(value, f"energy.{name}", 0.0, MAX_FIGURE)
        if energy["mac_j"] <= 0:
            raise ValueError("energy.mac_j is 0; allowed: above 0")
        batch_size = whole(card["batch_size"], "batch_size", 1, MAX_BATCH)
        return CostProfile(batch_size, coefficients, energy, dict(card["provenance"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a cost profile, or a damaged one ({reason(error):.120}); run `rlkd calibrate`"
        ) from error


def machine(threads: int = 1) -> dict[str, Any]:
    """Describe the machine and the software, which measured times depend on besides the student."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": threads,
    }


def _processor() -> str:
    """Return the name of the processor; Python gives none on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def describe(student: ChainStudent) -> dict[str, Sequence[int] | str]:
    """Describe the structure of a student, which a profile belongs to."""
    return {
        "kind": "conv" if student.is_conv else "mlp",
        "input_shape": student.input_shape,
        "widths": student.group_sizes[1:],
        "exits": student.exits,
        **({"exit_rule": "gate"} if student.gates else {}),
    }
