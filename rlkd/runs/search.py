"""`rlkd search`: depth, width and exits of a chain student under cost limits, before any distillation.

Every candidate is trained for a few windows, several seeds in lock-step, dense and under the published setting; its
costs come from one cost profile. Optuna's multi-objective tree-structured Parzen estimator (Ozaki et al. 2022) proposes
candidates for both ends: validation accuracy up, latency down. The front is what no other candidate beats in both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
import torch

from rlkd.cost import Cost, CostConfig, CostProfile, load_or_calibrate
from rlkd.data import DataSet, Goal, TaskDistribution, draw_task, load_dataset
from rlkd.data.distribution import Range
from rlkd.envs.action import ControlConfig, decode, published_setting
from rlkd.errors import UserError
from rlkd.models import ChainStudent, StudentConfig, build_student
from rlkd.models.chain import MAX_BLOCKS, MAX_WIDTH
from rlkd.runs.candidates import check_within, is_within, limits_of, propose, train_windows
from rlkd.students import Population, TrainConfig
from rlkd.teachers import Signals, TeacherConfig, compute_signals, load_teachers

LEAST_SEEDS = 2  # a population has at least two students


@dataclass(frozen=True)
class StructureConfig:
    """`rlkd search`: which chain student to distil under limits."""

    dataset: str = "digits"
    """Data set, as `rlkd list` has them."""
    reference: StudentConfig = field(default_factory=StudentConfig)
    """The student that limits are ratios to, and whose kind the candidates have."""
    depths: tuple[int, int] = (1, 4)
    """Fewest and most blocks."""
    widths: tuple[int, int] = (8, 128)
    """Fewest and most units of the first block; log steps."""
    tapers: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)
    """Units of a block over those of the block before; rounded to a whole number."""
    num_candidates: int = 24
    """Candidates that are trained."""
    num_seeds: int = 3
    """Trainings of each, in lock-step; their mean counts."""
    num_windows: int = 4
    """Windows of a short training; the distillation takes 12 by default."""
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(num_samples=(0,)))
    train: TrainConfig = field(default_factory=TrainConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    goal: Goal = field(default_factory=lambda: Goal(macs="2x"))

    def check(self) -> None:
        """Raise UserError for a search that has no candidate."""
        for part in (self.reference, self.teacher, self.train, self.cost, self.goal):
            part.check()
        (low, high), (narrow, wide) = self.depths, self.widths
        if not 1 <= low <= high <= MAX_BLOCKS:
            raise UserError(f"depths: got {list(self.depths)}; allowed: 1 <= fewest <= most <= {MAX_BLOCKS}")
        if not 1 <= narrow <= wide <= MAX_WIDTH:
            raise UserError(f"widths: got {list(self.widths)}; allowed: 1 <= fewest <= most <= {MAX_WIDTH}")
        if not self.tapers or not all(0.05 <= taper <= 4 for taper in self.tapers):
            raise UserError(f"tapers: got {list(self.tapers)}; allowed: one or more from 0.05 to 4")
        if self.num_candidates < 1 or self.num_windows < 1 or self.num_seeds < LEAST_SEEDS:
            raise UserError(
                f"search: got num_candidates {self.num_candidates}, num_windows {self.num_windows}, num_seeds "
                f"{self.num_seeds}; allowed: at least 1, 1 and {LEAST_SEEDS}"
            )
        if not self.goal.has_limit:
            raise UserError("goal: got no limit; allowed: at least one of goal.latency, .macs, .energy, .size")


@dataclass(frozen=True)
class Candidate:
    """One structure with its costs, and what its short trainings reached."""

    widths: tuple[int, ...]
    exits: tuple[int, ...]
    ratios: tuple[float, float, float, float]  # to the reference, in the order of COSTS; no sample leaves early
    latency_s: float  # of a batch
    accuracy: float = math.nan  # on validation, mean over seeds
    expected_latency_s: float = math.nan  # with the share of samples that left early

    @property
    def structure(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths and exits."""
        return self.widths, self.exits


@dataclass(frozen=True)
class Space:
    """What the search draws from, with the costs of every structure."""

    config: StructureConfig
    data: DataSet
    profile: CostProfile
    limits: tuple[float, ...]  # in the order of COSTS; inf: none

    def candidate(self, depth: int, width: int, taper: float, has_exit: bool) -> Candidate | None:
        """Return a structure with its costs; None where it cannot be built."""
        widths = tuple(max(1, min(MAX_WIDTH, round(width * taper**block))) for block in range(depth))
        exits = (1,) if has_exit and depth > 1 else ()
        try:
            student = build_student(self._structure(widths, exits), self.data.input_shape, self.data.num_classes)
        except UserError:
            return None  # more halvings than the images' size allows
        cost = _dense_cost(self.profile, student)
        reference = self.reference_cost()
        latency, energy, macs, size = (
            float(getattr(cost, name)) / float(getattr(reference, name))
            for name in ("latency_s", "energy_j", "macs", "parameters")
        )
        return Candidate(widths, exits, (latency, energy, macs, size), float(cost.latency_s))

    def fits(self, candidate: Candidate) -> bool:
        """Whether a structure is within all limits though no sample leaves early."""
        return is_within(candidate, self.limits)

    def reference_cost(self) -> Cost:
        """Return the costs of the student that ratios refer to."""
        return _dense_cost(self.profile, _reference(self.config, self.data))

    def grid(self) -> list[Candidate]:
        """Return structures that span the search, the fastest first, for the table of what is possible."""
        made = [self.candidate(**point) for point in self.points()]
        return sorted({c.widths: c for c in made if c is not None}.values(), key=lambda c: c.latency_s)

    def points(self) -> list[dict[str, Any]]:
        """Return arguments of `candidate` that span the search, without an early exit."""
        (low, high), (narrow, wide) = self.config.depths, self.config.widths
        widths = sorted({round(narrow * (wide / narrow) ** (i / 6)) for i in range(7)})
        return [
            {"depth": depth, "width": width, "taper": taper, "has_exit": False}
            for depth in range(low, high + 1)
            for width in widths
            for taper in self.config.tapers
        ]

    def _structure(self, widths: tuple[int, ...], exits: tuple[int, ...]) -> StudentConfig:
        return replace(self.config.reference, widths=widths, exits=exits)


def build_space(config: StructureConfig) -> Space:
    """Load data, and time students of the reference's kind once on this machine.

    Raises:
        UserError: an impossible search.
    """
    config.check()
    data = load_dataset(config.dataset)
    reference = _reference(config, data)
    profile = load_or_calibrate(config.cost, reference)
    latency_s = float(_dense_cost(profile, reference).latency_s)
    return Space(config, data, profile, limits_of(config.goal, latency_s))


def _reference(config: StructureConfig, data: DataSet) -> ChainStudent:
    return build_student(config.reference, data.input_shape, data.num_classes)


def _dense_cost(profile: CostProfile, student: ChainStudent) -> Cost:
    kept, rates = torch.tensor([student.group_sizes]), torch.eye(len(student.exits))[-1:]
    return profile.cost(student, kept, rates, torch.ones(1))


def check_satisfiable(space: Space) -> list[Candidate]:
    """Return the structures of the grid that are within the limits.

    Raises:
        UserError: none is; says what the smallest one costs.
    """
    grid = space.grid()
    if not grid:
        raise UserError("search: no structure can be built of these depths and widths for this data; allowed: fewer")
    check_within(grid, space.limits, lambda candidate: f"widths {list(candidate.widths)}")
    return [candidate for candidate in grid if space.fits(candidate)]


def train_shortly(space: Space, signals: Signals, candidate: Candidate, seed: int) -> Candidate:
    """Return the candidate with its mean validation accuracy after a short training, and its expected latency."""
    config, data = space.config, space.data
    structure = replace(config.reference, widths=candidate.widths, exits=candidate.exits)
    student = build_student(structure, data.input_shape, data.num_classes)
    group = Population(student, data, signals, config.num_seeds, config.train, record=False)
    num_labels = float(len(data.splits["train"]))
    tasks = TaskDistribution(
        dataset=config.dataset, label_noise=Range(0.0, 0.0), num_labels=Range(num_labels, num_labels)
    )
    seeds = range(seed, seed + config.num_seeds)
    drawn = [draw_task(s, tasks, data, len(signals.accuracy)) for s in seeds]
    controls = ControlConfig()
    setting = decode(published_setting(controls).expand(config.num_seeds, -1), controls, data.num_classes)
    metrics, threshold, _ = train_windows(group, drawn, setting, config.num_windows, has_exits=bool(candidate.exits))
    cost = space.profile.cost(student, metrics.kept, metrics.exit_rates, threshold)
    return replace(
        candidate,
        accuracy=float(metrics.accuracy.mean()),
        expected_latency_s=float(cost.latency_s.mean()),
    )


def search(space: Space, seed: int, on_candidate: Callable[[Candidate], object]) -> list[Candidate]:
    """Load the teacher and return all trained candidates, each within the limits; at least one.

    Args:
        space: what to draw from; `check_satisfiable` found structures of it that are within the limits.
        seed: of the proposals and the trainings.
        on_candidate: called after each.
    """
    config = space.config
    signals = compute_signals(load_teachers(config.teacher, space.data), space.data)
    made = [(point, space.candidate(**point)) for point in space.points()]

    def draw(trial: optuna.Trial) -> Candidate | None:
        drawn = space.candidate(
            trial.suggest_int("depth", *config.depths),
            trial.suggest_int("width", *config.widths, log=True),
            trial.suggest_categorical("taper", list(config.tapers)),
            trial.suggest_categorical("has_exit", [False, True]),
        )
        return drawn if drawn is not None and space.fits(drawn) else None

    return propose(
        draw,
        lambda candidate: train_shortly(space, signals, candidate, seed),
        first=[point for point, candidate in made if candidate is not None and space.fits(candidate)],
        num_candidates=config.num_candidates,
        seed=seed,
        on_candidate=on_candidate,
    )
