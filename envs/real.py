"""The scenario of one real student: its data, signals, cost and references."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.compression.real.choice import units_kept
from rlkd.cost import Cost
from rlkd.cost.real import ModuleProfile
from rlkd.cost.real_work import ModuleWork
from rlkd.data import Split, Task, TaskDistribution
from rlkd.data.examples import Examples, TokenExamples
from rlkd.envs.action import ControlConfig, decode, published_setting
from rlkd.envs.references import References, key_of, stated_reference
from rlkd.losses import LossConfig
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind
from rlkd.students import Students
from rlkd.students.real.causal import CausalStudent, TokenConfig
from rlkd.students.real.module import ModuleStudent
from rlkd.students.real.train_config import ModuleTrainConfig, confirming_samples, evaluated_samples
from rlkd.teachers import Signals
from rlkd.teachers.real.token_signals import TokenSignals

SPLITS: tuple[Split, Split] = ("validation", "test")


@dataclass(frozen=True)
class RealEpisodeConfig:
    """What an episode reads: `EpisodeConfig`."""

    num_windows: int
    task: TaskDistribution
    train: ModuleTrainConfig
    controls: ControlConfig
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class RealScenario:
    """`EpisodeScenario` of one real student."""

    config: RealEpisodeConfig
    data: Examples
    signals: Signals
    profile: ModuleProfile
    start: Tensor  # [12], the setting that actions change
    teacher_work: ModuleWork
    student: Instrumented  # holds the weights that training starts from
    initial: dict[str, Tensor]  # a copy of the model's weights before any training
    kind: Kind
    processor: Any  # tokenizer or image processor of the student; None for arrays
    tables: str  # what was mapped to what, and which controls there are
    report: str  # of the data: what was used, and the class that each label means
    tokens: TokenConfig = field(default_factory=TokenConfig)  # of a language model
    teacher: nn.Module | None = None  # beside the student; None where it is spread over devices
    teacher_data: Examples | None = None  # the samples with the inputs of a teacher that is timed, which is whole
    known: References = field(default_factory=References)
    has_given_splits: bool = True  # else rlkd cut them, and the teacher may have learned from test samples
    channel_multiple: int = 1  # kept units are rounded up, so that layers have multiples of so many channels

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Token positions, then the units of every group."""
        return self.student.plan.group_sizes

    def units_kept(self, unit_keep: Tensor) -> Tensor:
        """As `EpisodeScenario.units_kept`."""
        return units_kept(self.student.plan, unit_keep, self.channel_multiple)

    @property
    def num_exits(self) -> int:
        """Early exits and the end."""
        return len(self.student.plan.exits) + 1

    @property
    def class_names(self) -> list[str]:
        """The classes as the student's configuration calls them, in their order."""
        names: Any = getattr(getattr(self.student.model, "config", None), "id2label", None)
        return [str(names[i] if names else i) for i in range(self.data.num_classes)]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a training learns from: data, teacher's signals, first weights."""
        signals = self.signals
        told = {"logits": signals.logits, "features": signals.features, "maps": signals.maps}
        if isinstance(signals, TokenSignals):
            told |= {**signals.tokens._asdict(), "losses": signals.losses, "counted": signals.counted}
        splits = {f"split {name}": index for name, index in self.data.splits.items()}
        return {**self.data.inputs, "labels": self.data.labels, **splits, **told, **self.initial}

    def cost(self, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor) -> Cost:
        """As `EpisodeScenario.cost`, for N = 1."""
        return self.profile.cost(kept, exit_rates, exit_threshold)

    def warm_start(self, students: Students, tasks: Sequence[Task], rows: Tensor) -> None:
        """As `EpisodeScenario.warm_start`: nothing is left to do, a real student is made with its starting weights."""

    def references(self, tasks: Sequence[Task]) -> Tensor:
        """As `EpisodeScenario.references`; a dense student that was not trained yet is trained here."""
        reference = self.config.task.reference
        stated = stated_reference(reference, len(tasks))
        if stated is not None:
            return stated
        if reference == "teacher":
            splits, train = self.data.splits, self.config.train
            read = [evaluated_samples(splits[split], split, train) for split in SPLITS]
            read.append(confirming_samples(splits["validation"], train))
            return torch.tensor([self._teacher_accuracy(index) for index in read]).expand(len(tasks), 3)
        for task in self.known.missing(tasks, warm=False):
            self.known.accuracy[key_of(task)] = self._dense_accuracy(task)
        return self.known.of(tasks)

    def _teacher_accuracy(self, index: Tensor) -> float:
        """On the samples at `index` [S]."""
        if isinstance(self.signals, TokenSignals):
            return float(self.signals.anchors.quality(self.signals.mean(self.signals.losses, index)))
        return float((self.signals.logits[0, index].argmax(-1) == self.data.labels[index]).float().mean())

    def _dense_accuracy(self, task: Task) -> tuple[float, float, float]:
        """Return accuracies of the dense student, trained under the published setting, as `references` orders them.

        It trains in the place of the student, whose weights and attachments are put back.
        """
        before = {name: value.detach().clone() for name, value in self.student.state_dict().items()}
        start = published_setting(self.config.controls)
        dense = dataclasses.replace(self, start=start).students(1)
        dense.reset([task])
        setting = decode(start[None], self.config.controls, self.data.num_classes)
        for _ in range(self.config.num_windows):
            dense.train_window(setting)
        validation, test = (float(dense.evaluate(split).accuracy) for split in SPLITS)
        confirmed = dense.confirm()
        reached = (validation, test, float(confirmed[0].accuracy) if confirmed else validation)
        self.student.load_state_dict(before)
        return reached

    @property
    def _start_rate(self) -> float:
        """The control of the learning rate at which the step size is `train.learning_rate`."""
        return float(decode(self.start[None], self.config.controls, self.data.num_classes).learning_rate[0])

    def step_size(self, control: float) -> float:
        """As `EpisodeScenario.step_size`; within the training, warm-up and cosine lower it."""
        train = self.config.train
        return float(train.learning_rate * (control / self._start_rate) ** train.rate_exponent)

    def students(self, num_students: int) -> Students:
        """Return the student at its starting weights; the step size of its training begins at `train.learning_rate`."""
        if num_students != 1:
            raise ValueError(f"students: got {num_students}; allowed: 1, real models train one at a time")
        self.student.model.load_state_dict(self.initial)
        c = self.config
        if isinstance(self.signals, TokenSignals):
            assert isinstance(self.data, TokenExamples)
            beside = self.teacher if self.tokens.teacher_in_memory else None
            return CausalStudent(
                self.student,
                self.data,
                self.signals,
                c.train,
                c.num_windows,
                self.tokens.divergence,
                c.loss,
                teacher=beside,
                channel_multiple=self.channel_multiple,
                start_rate=self._start_rate,
            )
        return ModuleStudent(
            self.student,
            self.data,
            self.signals,
            c.train,
            c.num_windows,
            c.loss,
            channel_multiple=self.channel_multiple,
            start_rate=self._start_rate,
        )
