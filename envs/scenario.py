"""Everything that does not change between episodes: data, teachers' signals, student structure, cost profile."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlkd.compression.selection import num_kept
from rlkd.cost import Cost, CostConfig, CostProfile, load_or_calibrate
from rlkd.data import DataSet, Labelled, Task, TaskDistribution, load_dataset
from rlkd.envs.action import ControlConfig, published_setting
from rlkd.envs.references import References, load_warm_start, stated_reference, train_references
from rlkd.errors import UserError
from rlkd.io.numbers import check_finite
from rlkd.io.settings import with_types
from rlkd.losses import LossConfig
from rlkd.models import ChainStudent, StudentConfig, build_student
from rlkd.students import Population, SoloStudent, Students, TrainConfig
from rlkd.students.adapted import chain_objective
from rlkd.teachers import Signals, TeacherConfig, compute_signals, load_teachers


def check_keep(keep_checkpoints: int) -> None:
    """Raise UserError for fewer than one checkpoint."""
    if keep_checkpoints < 1:
        raise UserError(f"keep_checkpoints: got {keep_checkpoints}; allowed: at least 1")


def check_sections(config: Any, *names: str) -> None:
    """Raise UserError for fewer than one window, or the first impossible value of the named sections."""
    if config.num_windows < 1:
        raise UserError(f"num_windows: got {config.num_windows}; allowed: at least 1")
    for name in names:
        getattr(config, name).check()
    check_finite(config)
    config.train.torch_device()


@dataclass(frozen=True)
class EnvConfig:
    """The whole configuration of the environment."""

    num_windows: int = 12
    """Decisions of one episode; each trains the student for train.steps_per_window steps."""
    warm_windows: int = 0
    """Windows of dense training under the published setting before the episode; 0 starts from fresh weights."""
    task: TaskDistribution = field(default_factory=TaskDistribution)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    controls: ControlConfig = field(default_factory=ControlConfig)
    cost: CostConfig = field(default_factory=CostConfig)

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        if self.warm_windows < 0:
            raise UserError(f"warm_windows: got {self.warm_windows}; allowed: at least 0")
        check_sections(self, "task", "student", "teacher", "train", "loss", "controls", "cost")
        if self.task.num_teachers.high > len(self.teacher.num_samples):
            raise UserError(
                f"task.num_teachers: got high {self.task.num_teachers.high:g}; allowed: at most "
                f"{len(self.teacher.num_samples)}, the teachers that teacher.num_samples lists"
            )


def check_type(config: Any, what: str) -> None:
    """Raise UserError, whose message begins with `what`, for anything but an `EnvConfig`."""
    if not isinstance(config, EnvConfig):
        given = repr(config[:40]) if isinstance(config, str) else type(config).__name__
        raise UserError(
            f"{what}: got {given}; allowed: an rlkd.EnvConfig, whose fields are keywords, too, such as "
            "make_env(task={'dataset': 'digits'})"
        )


class EpisodeConfig(Protocol):
    """What an episode reads of its configuration."""

    @property
    def num_windows(self) -> int:
        """Decisions of one episode."""

    @property
    def task(self) -> TaskDistribution:
        """What tasks are drawn from."""

    @property
    def train(self) -> TrainConfig:
        """Steps of a window."""

    @property
    def controls(self) -> ControlConfig:
        """Ranges of the controls."""


class EpisodeScenario(Protocol):
    """What an episode needs of its scenario: `Scenario` for chains, `RealScenario` for real models."""

    @property
    def config(self) -> EpisodeConfig:
        """The environment's configuration."""

    @property
    def data(self) -> Labelled:
        """Labels and splits."""

    @property
    def signals(self) -> Signals:
        """Of all teachers."""

    @property
    def start(self) -> Tensor:
        """[12], the setting that actions change."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Of the student: inputs, then the units of every group."""

    def units_kept(self, unit_keep: Tensor) -> Tensor:
        """Return how many units every group keeps, [N, G - 1] floats, for shares [N]."""

    @property
    def num_exits(self) -> int:
        """Of the student, its end included."""

    def students(self, num_students: int) -> Students:
        """Return new students in training."""

    def warm_start(self, students: Students, tasks: Sequence[Task], rows: Tensor) -> None:
        """Give the students at `rows`, which were just reset to `tasks`, the weights that training starts from."""

    def references(self, tasks: Sequence[Task]) -> Tensor:
        """[M, 3], reference accuracy of every task on validation, test, and the samples that confirm a window."""

    def step_size(self, control: float) -> float:
        """Return the optimizer's step size under a value of the learning rate's control."""

    def cost(self, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor) -> Cost:
        """Cost of N students that keep `kept` [N, G] and whose samples leave at `exit_rates` [N, E]; threshold [N]."""


@dataclass(frozen=True)
class Scenario:
    """What all episodes share."""

    config: EnvConfig
    data: DataSet
    signals: Signals
    profile: CostProfile
    start: Tensor  # [12], the setting that actions change
    teacher_macs: float
    template: ChainStudent  # its structure is every student's; its parameters are unused
    known: References = field(default_factory=References)

    def __post_init__(self) -> None:
        """Begin with no references where those given are of dense students that were trained otherwise."""
        c = self.config
        # data and signals that are compared are alive: `known` came with a scenario that holds them
        parts = (id(self.data), id(self.signals), self.template.group_sizes)
        scope = repr((c.num_windows, c.warm_windows, c.train, c.loss, c.controls, parts))
        if self.known.scope not in ("", scope):
            object.__setattr__(self, "known", References())
        self.known.scope = scope

    def new_structure(self) -> ChainStudent:
        """Return a student of this scenario's architecture with untrained parameters."""
        return copy.deepcopy(self.template)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Inputs, then the units of every block."""
        return self.template.group_sizes

    def units_kept(self, unit_keep: Tensor) -> Tensor:
        """As `EpisodeScenario.units_kept`."""
        sizes = torch.tensor(self.group_sizes[1:], dtype=torch.float32)  # [G - 1]
        return num_kept(unit_keep[:, None], sizes, self.template.unit_multiple)

    @property
    def num_exits(self) -> int:
        """Early exits and the end."""
        return len(self.template.exits)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a training learns from: data and teachers' signals."""
        signals = {"logits": self.signals.logits, "features": self.signals.features, "maps": self.signals.maps}
        return {"inputs": self.data.inputs, "labels": self.data.labels, **signals, **self.signals.more}

    def step_size(self, control: float) -> float:
        """As `EpisodeScenario.step_size`: the control itself."""
        return control

    def cost(self, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor) -> Cost:
        """As `EpisodeScenario.cost`."""
        return self.profile.cost(self.template, kept, exit_rates, exit_threshold)

    def exit_cost(self, kept: Tensor) -> Tensor:
        """[N, E, 2], latency and energy ratio of N students that keep `kept` [N, G], were all to leave at one exit.

        Decisions on the way count. Real batches run a block as soon as one sample needs it; that fixed part is shared.
        """
        num_exits = len(self.template.exits)
        deciding = torch.full((len(kept),), 0.5 + 0.5 / self.data.num_classes)  # at neither end
        rates = torch.eye(num_exits)[:, None].expand(num_exits, len(kept), num_exits)
        costs = [self.profile.cost(self.template, kept, rate, deciding) for rate in rates]
        return torch.stack([torch.stack([c.latency_ratio, c.energy_ratio], dim=-1) for c in costs], dim=1)

    def warm_start(self, students: Students, tasks: Sequence[Task], rows: Tensor) -> None:
        """As `EpisodeScenario.warm_start`."""
        if self.config.warm_windows:
            self._train_references(self.known.missing(tasks, warm=True))
            load_warm_start(self.known, students, tasks, rows)

    def references(self, tasks: Sequence[Task]) -> Tensor:
        """As `EpisodeScenario.references`; dense students of tasks not seen before are trained here."""
        reference = self.config.task.reference
        stated = stated_reference(reference, len(tasks))
        if stated is not None:
            return stated
        if reference == "teacher":
            both = torch.stack([self._teacher_accuracy(task) for task in tasks])  # [M, 2]
            return both[:, [0, 1, 0]]
        self._train_references(self.known.missing(tasks, warm=False))
        return self.known.of(tasks)

    def _teacher_accuracy(self, task: Task) -> Tensor:
        """[2], of the mean answer of the task's teachers on validation and test."""
        columns = []
        for split in ("validation", "test"):
            index = self.data.splits[split]
            answers = self.signals.mean_logits(task.teachers, index).argmax(-1)  # [B]
            columns.append((answers == self.data.labels[index]).float().mean())
        return torch.stack(columns)

    def _train_references(self, tasks: Sequence[Task]) -> None:
        self.known.add(self.trained_references(tasks))

    def trained_references(self, tasks: Sequence[Task]) -> References:
        """Return references and warm starts of `tasks`, each once; dense students are trained for them here."""
        c, found = self.config, References()
        train_references(
            found,
            tasks,
            self.students,
            c.controls,
            num_classes=self.data.num_classes,
            num_windows=c.num_windows,
            warm_windows=c.warm_windows,
        )
        return found

    @property
    def needs_references(self) -> bool:
        """Whether episodes need a dense student of their task that was trained before."""
        return self.config.warm_windows > 0 or self.config.task.reference == "dense"

    def students(self, num_students: int) -> Students:
        """Return a lock-step population, or one plain student."""
        structure, c = self.new_structure(), self.config
        max_teachers = round(c.task.num_teachers.high)
        if num_students == 1:
            return SoloStudent(
                structure,
                self.data,
                self.signals,
                config=c.train,
                exit_cost=self.exit_cost,
                max_teachers=max_teachers,
                loss=c.loss,
            )
        return Population(
            structure,
            self.data,
            self.signals,
            num_students,
            c.train,
            self.exit_cost,
            max_teachers=max_teachers,
            loss=c.loss,
        )


def build_scenario(
    config: EnvConfig,
    start: Tensor | None = None,
    student: ChainStudent | None = None,
) -> Scenario:
    """Load the data, train or load the teachers, calibrate or load the cost profile.

    Args:
        config: checked here.
        start: [12], the setting that actions change; by default the published one.
        student: a structure of your own; by default the one that config.student describes.

    Raises:
        UserError: an argument of another type, an impossible value, or data that cannot be read.
    """
    check_type(config, "build_scenario")
    if not isinstance(student, ChainStudent | None):
        raise UserError(f"build_scenario: student: got {type(student).__name__}; allowed: an rlkd.models.ChainStudent")
    config = with_types(config, "build_scenario")
    config.check()
    data = load_dataset(config.task.dataset)
    teachers = load_teachers(config.teacher, data)
    signals = compute_signals(teachers, data, config.loss.needs)
    if student is None:
        student = build_student(config.student, data.input_shape, data.num_classes)
    if student.num_classes != data.num_classes or math.prod(student.input_shape) != math.prod(data.input_shape):
        raise UserError(
            f"student: {student.num_classes} classes for inputs of shape {list(student.input_shape)}; "
            f"{data.name} has {data.num_classes} for {list(data.input_shape)}"
        )
    chain_objective(config.loss, student, signals)  # before anything is timed: a term may lack a signal
    profile = load_or_calibrate(config.cost, student)
    if start is None:
        start = published_setting(config.controls)
    weights = sum(layer.weight.numel() for layer in (*teachers[0].layers, *teachers[0].heads))
    return Scenario(
        config=config,
        data=data,
        signals=signals,
        profile=profile,
        start=start,
        teacher_macs=float(weights),
        template=student,
    )
