"""The cost profile of a real student: counted work, and seconds by a fit to physically smaller students.

`rlkd.cost.real_timing` measures it; nothing here reads a clock.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.cost.profile import ENERGY_MODEL, MAX_FIGURE, Cost
from rlkd.cost.real_work import ModuleWork, Use, Work, num_parameters, use_of
from rlkd.errors import UserError
from rlkd.io.files import number, read_json, reason, write_whole
from rlkd.models.real.attachment import Plan

FORMAT = 2
OUTSIDE = ("call_s", "outside_mac_s", "activation_s", "weight_s", "decision_s", "decided_s", "selection_s")
SHAPE = ("run_s", "linear_mac_s", "product_mac_s")  # for each shape of block


def coefficient_names(work: ModuleWork) -> tuple[str, ...]:
    """Return the names of the coefficients of a fit: those of a call, then those of every shape of block."""
    return (*OUTSIDE, *(f"block_{shape}_{name}" for shape in range(len(set(work.shapes))) for name in SHAPE))


def regressors(use: Use, batch_size: int) -> list[float]:
    """Return the amounts of what one batch runs, in the order of `coefficient_names`."""
    values = [1.0, batch_size * use.outside_macs, batch_size * use.total.activations, use.total.weights]
    values += [use.num_decisions, batch_size * use.decided, use.selects]
    for run, linear, products in zip(use.runs, use.linear_macs, use.products_macs, strict=True):
        values += [run, batch_size * linear, batch_size * products]
    return values


@dataclass(frozen=True)
class ModuleProfile:
    """Work and speed of one student, from which the reward takes its costs."""

    plan: Plan
    work: ModuleWork
    batch_size: int
    coefficients: tuple[float, ...]  # seconds, one a name of `coefficient_names`, each >= 0
    energy: dict[str, Any]
    provenance: dict[str, Any]  # machine, threads, grid with measured and fitted times, residual

    def cost(self, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor) -> Cost:
        """Return the cost with ratios to the dense student, fields [1].

        Args:
            kept: [1, G], token positions and units of every group that are kept.
            exit_rates: [1, E].
            exit_threshold: [1].
        """
        now = self._costs(kept[0].double(), exit_rates[0].double(), exit_threshold)
        sizes = torch.tensor(self.plan.group_sizes, dtype=torch.float64)
        dense = self._costs(sizes, torch.zeros(len(self.plan.exits) + 1), torch.ones(1))
        ratios = [a / b for a, b in zip(now, dense, strict=True)]
        size = num_parameters(self.work, self.plan, kept[0].double(), exit_threshold)
        values = (*now, *ratios, size, size / self.work.parameters)
        return Cost(*(torch.tensor([float(value)]) for value in values))

    def latency_s(self, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor, batch_size: int) -> float:
        """Return the seconds of a batch of any size; arguments as in `cost`, without the first dimension."""
        use = use_of(self.work, self.plan, kept, exit_rates, exit_threshold, batch_size=batch_size)
        return self._seconds(use, batch_size)

    def _seconds(self, use: Use, batch_size: int) -> float:
        return sum(c * x for c, x in zip(self.coefficients, regressors(use, batch_size), strict=True))

    def _costs(self, kept: Tensor, exit_rates: Tensor, threshold: Tensor) -> tuple[float, float, float]:
        """Return seconds of a batch, joules and MACs of a sample."""
        use = use_of(self.work, self.plan, kept, exit_rates, threshold, batch_size=self.batch_size)
        return self._seconds(use, self.batch_size), self.energy_j(use.total), use.total.macs

    def energy_j(self, work: Work) -> float:
        """Return the joules of one sample of any model, whose weights a whole batch reads once."""
        e = self.energy
        joules: float = (
            work.macs * e["mac_j"]
            + work.activations * e["activation_j"]
            + work.weights * e["weight_j"] / self.batch_size
        )
        return joules

    def save(self, path: Path) -> None:
        """Write speed and counts as JSON."""
        card = {
            "format": FORMAT,
            "batch_size": self.batch_size,
            "coefficients": dict(zip(coefficient_names(self.work), self.coefficients, strict=True)),
            "energy": self.energy,
            "provenance": self.provenance,
            "dense_macs": self.work.dense_macs,
            "work": asdict(self.work),
        }
        write_whole(path, json.dumps(card, indent=1) + "\n")


def profile_through(plan: Plan, work: ModuleWork, batch_size: int, latency_s: float) -> ModuleProfile:
    """Return a profile through one measured latency; seconds follow the MACs where samples leave early.

    Args:
        plan: of the student.
        work: of the student.
        batch_size: samples of the batch.
        latency_s: of that batch in the dense student.
    """
    rate = latency_s / (batch_size * work.dense_macs)
    coefficients = tuple(rate if name.endswith("mac_s") else 0.0 for name in coefficient_names(work))
    provenance = {"latency": "of the dense student, measured; of others in proportion to MACs"}
    return ModuleProfile(plan, work, batch_size, coefficients, dict(ENERGY_MODEL), provenance)


def load_speed(path: Path, plan: Plan, work: ModuleWork, batch_size: int) -> ModuleProfile:
    """Return the profile of a student with the speed that an earlier run wrote for it, so costs repeat with the seed.

    Raises:
        UserError: the file is missing, or belongs to another student or batch size.
    """
    names = coefficient_names(work)
    try:
        card = read_json(path, "a cost profile of a real student")
        given = [card["format"], card["batch_size"], card["dense_macs"]]
        wanted = [FORMAT, batch_size, work.dense_macs]
        if given == wanted:
            found = card["coefficients"]
            if sorted(found) != sorted(names):
                raise ValueError(f"coefficients has {sorted(found)!s:.60}; allowed: {list(names)!s:.120}")
            coefficients = tuple(number(found[name], name, 0.0, MAX_FIGURE) for name in names)
            if sum(coefficients) <= 0:
                raise ValueError("every coefficient is 0")
            provenance = {**dict(card["provenance"]), "read_from": path.name}
            return ModuleProfile(plan, work, batch_size, coefficients, dict(ENERGY_MODEL), provenance)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a cost profile of a real student, or a damaged one ({reason(error):.120})"
        ) from error
    raise UserError(
        f"{path}: got format, batch size and dense MACs {given!s:.80}; allowed: {wanted}, this student's; without "
        "--cost.profile it is measured anew"
    )
