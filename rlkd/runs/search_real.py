"""`rlkd search --data ...`: which cut of a transformers teacher to distil under cost limits.

Costs are ratios to the teacher. The latency of every cut is measured on this machine, in turns with the teacher; work
and parameters are counted, the energy is the estimate of the cost profile. Every cut within the limits is then trained
for a few windows by plain distillation (Hinton et al. 2015), or, where there are more, those that Optuna proposes.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import optuna

from rlkd.cost.real import profile_through
from rlkd.cost.real_work import ModuleWork, count_work
from rlkd.cost.timing import Latency, time_calls
from rlkd.data import Goal, Range, TaskDistribution
from rlkd.envs.action import ControlConfig, decode
from rlkd.envs.build_real import teacher_signals, typical_sample
from rlkd.envs.rate import with_learning_rate
from rlkd.envs.real import RealEpisodeConfig, RealScenario
from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.hooks import forward
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind, kind_of, load_config
from rlkd.models.real.sides import Side, load_student, load_teacher
from rlkd.runs.candidates import check_within, is_within, limits_of, propose, train_windows
from rlkd.runs.goals import task_of
from rlkd.runs.real_methods import plain_setting
from rlkd.teachers import Signals

logger = logging.getLogger(__name__)

NUM_DEPTHS = 8  # numbers of blocks that are tried by default, at most
MAX_SHAPES = 48  # that are timed
NUM_TOGETHER = 6  # cuts that are in memory and timed together, beside the teacher
Keep = Literal["influence", "spread", "first"]


@dataclass(frozen=True)
class CutSpace:
    """Cuts of the teacher that a search tries."""

    layers: tuple[int, ...] | None = None
    """Numbers of blocks; by default up to 8 of them, spread from 1 to the teacher's."""
    keeps: tuple[Keep, ...] = ("influence", "spread")
    """Which blocks stay, as cut.keep."""
    widths: tuple[float, ...] = (1.0, 0.5)
    """Shares of the width that stay, as cut.width."""
    exits: tuple[bool, ...] = (False, True)
    """Whether an early exit stands after half of the blocks."""

    def check(self) -> None:
        """Raise UserError for a space without a cut."""
        if not (self.keeps and self.widths and self.exits) or self.layers == ():
            raise UserError("space: got an empty list; allowed: one or more values each")
        for layers, width in itertools.product(self.layers or (1,), self.widths):
            StudentCut(layers=layers, width=width).check()


@dataclass(frozen=True)
class RealSearchConfig(RealConfig):
    """`rlkd search --data ...`: which cut of a transformers teacher to distil under limits."""

    num_windows: int = 2
    """Windows of a short training; the distillation takes 12 by default."""
    space: CutSpace = field(default_factory=CutSpace)
    num_candidates: int = 16
    """Cuts that are trained, at most; Optuna proposes them where more are within the limits."""

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        super().check()
        self.space.check()
        chosen = {
            "student": self.student != "",
            "cut": self.cut != StudentCut(),
            "attach.exits": self.attach.exits is not None,
            "cost.profile": self.cost.profile is not None,
        }
        for name, is_given in chosen.items():
            if is_given:
                raise UserError(
                    f"{name}: got a value; allowed: none, rlkd search chooses it (--space.layers and others)"
                )
        if self.is_absent or self.teacher_device_map is not None or self.teacher_shard:
            raise UserError(
                "teacher_signals, teacher_url, teacher_device_map, teacher_shard: got one of them; allowed: a teacher "
                "in memory, which students are cut from"
            )
        if self.num_candidates < 1 or self.num_windows < 1:
            raise UserError(
                f"search: got num_candidates {self.num_candidates}, num_windows {self.num_windows}; allowed: at least 1"
            )
        if not self.goal.has_limit:
            raise UserError("goal: got no limit; allowed: at least one of goal.latency, .macs, .energy, .size")


@dataclass(frozen=True)
class CutCandidate:
    """One cut with its costs, and what its short training reached."""

    layers: int
    keep: Keep
    width: float
    exits: tuple[int, ...]
    ratios: tuple[float, float, float, float]  # to the teacher, in the order of COSTS; no sample leaves early
    latency_s: float  # of a batch, measured
    accuracy: float = math.nan  # on validation
    expected_latency_s: float = math.nan  # with the share of samples that left early, in proportion to MACs

    @property
    def structure(self) -> tuple[int, str, float, tuple[int, ...]]:
        """Blocks, which ones, width and exits."""
        return self.layers, self.keep, self.width, self.exits

    @property
    def cut(self) -> StudentCut:
        """How the student is cut."""
        return StudentCut(layers=self.layers, keep=self.keep, width=self.width)


@dataclass(frozen=True)
class RealSpace:
    """Holds what the search draws from, with the costs of every cut."""

    config: RealSearchConfig
    kind: Kind
    teacher: Side
    teacher_work: ModuleWork
    teacher_latency_s: float  # of a batch, measured
    cuts: tuple[CutCandidate, ...]  # the fastest first, those without an exit before the others
    limits: tuple[float, ...]  # in the order of COSTS; inf: none

    def fitting(self) -> list[CutCandidate]:
        """Return the cuts within all limits, the fastest first."""
        return [cut for cut in self.cuts if is_within(cut, self.limits)]


def name_of(candidate: CutCandidate) -> str:
    """Describe a cut in words."""
    width = "" if candidate.width == 1.0 else f", width {candidate.width:g}"
    exits = f", exit after {candidate.exits[0]}" if candidate.exits else ""
    return f"{candidate.layers} layers ({candidate.keep}){width}{exits}"


def build_space(config: RealSearchConfig) -> RealSpace:
    """Load teacher and data, and count and time every cut once.

    Raises:
        UserError: an impossible search, models or data that cannot be used, or limits that no cut is within.
    """
    config.check()
    kind = kind_of(load_config(config.teacher), config.teacher)
    teacher = load_teacher(config.sources(), kind)
    one = typical_sample(teacher.data)
    work = count_work(teacher.model, one, teacher.plan)
    num_blocks = len(teacher.plan.blocks)
    shapes = _shapes(config.space, num_blocks)
    cuts, latencies = _measured(config, kind, teacher, work, shapes)
    latency_s = sorted(latencies)[len(latencies) // 2]
    space = RealSpace(
        config=config,
        kind=kind,
        teacher=teacher,
        teacher_work=work,
        teacher_latency_s=latency_s,
        cuts=tuple(sorted(cuts, key=lambda c: (c.latency_s, c.exits))),
        limits=limits_of(config.goal, latency_s),
    )
    check_within(space.cuts, space.limits, name_of)
    return space


def _shapes(space: CutSpace, num_blocks: int) -> list[tuple[int, float]]:
    """Return numbers of blocks and widths, but not those of the whole teacher."""
    count = min(num_blocks, NUM_DEPTHS)
    spread = sorted({round(1 + i * (num_blocks - 1) / max(1, count - 1)) for i in range(count)})
    layers = spread if space.layers is None else sorted(set(space.layers))
    if layers[-1] > num_blocks:
        raise UserError(f"space.layers: got {list(layers)!s:.60}; allowed: 1 to {num_blocks}, the teacher's")
    widths = sorted(set(space.widths))
    shapes = [shape for shape in itertools.product(layers, widths) if shape != (num_blocks, 1.0)]
    if not shapes:
        raise UserError("space: got the whole teacher alone; allowed: fewer space.layers, or space.widths below 1")
    if len(shapes) > MAX_SHAPES:
        raise UserError(
            f"space: got {len(shapes)} pairs of layers and width; allowed: {MAX_SHAPES}, which are timed; give fewer "
            "space.layers or space.widths"
        )
    return shapes


def _measured(
    config: RealSearchConfig, kind: Kind, teacher: Side, work: ModuleWork, shapes: list[tuple[int, float]]
) -> tuple[list[CutCandidate], list[float]]:
    """Return the cuts of all shapes that can be built, with their costs, and the teacher's latencies beside them."""
    threads, size = config.timed()[0], config.cost.batch_size
    one = typical_sample(teacher.data)
    batch = {name: value.expand(size, *value.shape[1:]).contiguous() for name, value in one.items()}
    cuts: list[CutCandidate] = []
    teacher_s: list[float] = []
    refusals: list[str] = []
    for start in range(0, len(shapes), NUM_TOGETHER):
        some: list[tuple[tuple[int, float], Side]] = []
        for layers, width in shapes[start : start + NUM_TOGETHER]:
            try:
                cut = StudentCut(layers=layers, keep="spread", width=width)  # which blocks stay costs nothing here
                side = _cut_side(config, kind, teacher, cut, None)
            except UserError as error:
                refusals.append(str(error))
                continue
            some.append(((layers, width), side))
        if not some:
            continue
        models = [teacher.model, *(side.model for _, side in some)]
        timed = [
            _seconds(t, threads) for t in time_calls([partial(forward, m, batch) for m in models], threads=threads)
        ]
        teacher_s.append(timed[0])
        for (shape, side), seconds in zip(some, timed[1:], strict=True):
            counted = count_work(side.model, one, side.plan)
            cuts += _candidates(config.space, shape, side, counted, work, (seconds, timed[0]), size)
    if not cuts:
        raise UserError(f"search: no student can be cut from {config.teacher}: {refusals[0]:.300}")
    if refusals:
        logger.info("%d cuts cannot be built (%s)", len(refusals), refusals[0])
    return cuts, teacher_s


def _seconds(latency: Latency, threads: int) -> float:
    """Return the latency as the cost profile has it: processor time, which other processes do not disturb."""
    return latency.processor_s if threads == 1 else latency.median_s


def _candidates(
    space: CutSpace,
    shape: tuple[int, float],
    side: Side,
    counted: ModuleWork,
    teacher: ModuleWork,
    seconds: tuple[float, float],
    batch_size: int,
) -> Iterator[CutCandidate]:
    """Yield the cuts of one shape, which cost the same; `seconds` are those of a cut and of the teacher beside it."""
    layers, width = shape
    profile = profile_through(side.plan, counted, batch_size, seconds[0])
    ratios = (
        seconds[0] / seconds[1],
        profile.energy_j(counted.dense) / profile.energy_j(teacher.dense),
        counted.dense_macs / teacher.dense_macs,
        counted.parameters / teacher.parameters,
    )
    keeps = space.keeps if 1 < layers < len(teacher.blocks) else space.keeps[:1]
    for keep, has_exit in itertools.product(dict.fromkeys(keeps), sorted(set(space.exits))):
        exits = side.plan.exits if layers > 1 else ()
        if has_exit and not exits and False in space.exits:
            continue  # the same as without one
        yield CutCandidate(layers, keep, width, exits if has_exit else (), ratios, seconds[0])


def _cut_side(
    config: RealSearchConfig, kind: Kind, teacher: Side, cut: StudentCut, exits: tuple[int, ...] | None
) -> Side:
    """Return the student of a cut with the teacher's data; `exits` as in `AttachConfig`."""
    attach = dataclasses.replace(config.attach, exits=exits)
    sources = dataclasses.replace(config.sources(), cut=cut, attach=attach)
    return load_student(sources, kind, teacher, seed=0)[0]


def train_shortly(
    space: RealSpace, signals: Signals, candidate: CutCandidate, seed: int, rates: dict[float, float]
) -> CutCandidate:
    """Return the cut with its validation accuracy after a short plain distillation, and its expected latency.

    Args:
        space: of the cut.
        signals: the teacher's answers.
        candidate: trained here.
        seed: of exits, batches and dropout.
        rates: step sizes by width that range tests found; the first cut of a width adds its own.
    """
    config, controls = space.config, ControlConfig()
    side = _cut_side(config, space.kind, space.teacher, candidate.cut, candidate.exits)
    work = count_work(side.model, typical_sample(side.data), side.plan)
    train = config.train
    if train.learning_rate == 0 and candidate.width in rates:
        train = dataclasses.replace(train, learning_rate=rates[candidate.width])
    num_labels = len(side.data.splits["train"])
    task = TaskDistribution(
        dataset=side.data.name, label_noise=Range(0.0, 0.0), num_labels=Range(num_labels, num_labels)
    )
    scenario = RealScenario(
        RealEpisodeConfig(config.num_windows, task, train, controls, config.loss),
        side.data,
        signals,
        profile_through(side.plan, work, config.cost.batch_size, candidate.latency_s),
        plain_setting(controls),
        space.teacher_work,
        Instrumented(side.model, side.plan, []),
        {name: value.clone() for name, value in side.model.state_dict().items()},
        space.kind,
        side.processor,
        "",
        side.data.report,
        config.tokens,
        space.teacher.model,
        space.teacher.data,
    )
    scenario = with_learning_rate(scenario, seed)
    rates.setdefault(candidate.width, scenario.config.train.learning_rate)
    setting = decode(scenario.start[None], controls, side.data.num_classes)
    metrics, threshold, has_learned = train_windows(
        scenario.students(1), [task_of(scenario, seed)], setting, config.num_windows, has_exits=bool(candidate.exits)
    )
    if not bool(has_learned[0]):
        logger.warning("%s: its training diverged; its accuracy counts as 0", name_of(candidate))
    cost = scenario.cost(metrics.kept, metrics.exit_rates, threshold)
    return dataclasses.replace(
        candidate,
        accuracy=float(metrics.accuracy[0]) if bool(has_learned[0]) else 0.0,
        expected_latency_s=float(cost.latency_s[0]),
    )


def search(space: RealSpace, seed: int, on_candidate: Callable[[CutCandidate], object]) -> list[CutCandidate]:
    """Ask the teacher and return the trained cuts, each within the limits: all of them, or those that are proposed.

    Args:
        space: what to draw from.
        seed: of the proposals and the trainings.
        on_candidate: called after each training.
    """
    config, fitting = space.config, space.fitting()
    signals = _signals(space)
    rates: dict[float, float] = {}

    def train(candidate: CutCandidate) -> CutCandidate:
        return train_shortly(space, signals, candidate, seed, rates)

    if len(fitting) <= config.num_candidates:
        done = []
        for candidate in fitting:
            done.append(train(candidate))
            on_candidate(done[-1])
        return done
    by_point = {_point(candidate): candidate for candidate in fitting}
    axes: dict[str, list[Any]] = {
        name: sorted(set(values))
        for name, values in zip(("layers", "keep", "width", "has_exit"), zip(*by_point, strict=True), strict=True)
    }

    def draw(trial: optuna.Trial) -> CutCandidate | None:
        return by_point.get(tuple(trial.suggest_categorical(name, values) for name, values in axes.items()))

    first = [dict(zip(axes, point, strict=True)) for point in by_point]
    return propose(draw, train, first=first, num_candidates=config.num_candidates, seed=seed, on_candidate=on_candidate)


def _point(candidate: CutCandidate) -> tuple[Any, ...]:
    """Return the cut as values of the axes."""
    return candidate.layers, candidate.keep, candidate.width, bool(candidate.exits)


def _signals(space: RealSpace) -> Signals:
    """Return the teacher's answers to all samples."""
    teacher = space.teacher
    teacher.model.to(space.config.train.torch_device())
    signals = teacher_signals(space.config, teacher, [])
    teacher.model.cpu()
    return signals


def distil_config(space: RealSpace, winner: CutCandidate) -> RealConfig:
    """Return the configuration of `rlkd distil` for a cut: that of the search, and the floor alone of its goal.

    The cut is within the limits already; without a floor it should keep 98 % of what its dense student reaches.
    """
    config = space.config
    goal = Goal(keep=config.goal.keep, reference=config.goal.reference, accuracy=config.goal.accuracy)
    if not goal.has_floor:
        goal = Goal(keep=0.98, reference="dense")
    own = {f.name for f in dataclasses.fields(RealConfig)} - {"num_windows"}
    values = {name: getattr(config, name) for name in own}
    values["goal"], values["cut"] = goal, winner.cut
    values["attach"] = dataclasses.replace(config.attach, exits=winner.exits)
    return RealConfig(**values)
