"""The scenario of a real model: teacher, data, student with its attachments, signals and cost, for one student."""

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.compression.real.trial import try_out
from rlkd.cost import Cost
from rlkd.cost.real import ModuleProfile, load_speed
from rlkd.cost.real_timing import BATCHES, load_or_measure
from rlkd.cost.real_work import ModuleWork, count_work
from rlkd.data import Goal, Preference, Range, Split, Task, TaskDistribution
from rlkd.data.examples import PADDING_MASK, Examples, TokenExamples
from rlkd.data.layout import split_named
from rlkd.data.rows import ColumnConfig
from rlkd.envs.action import ControlConfig, decode, published_setting
from rlkd.envs.guard import GuardConfig
from rlkd.envs.rate import with_learning_rate
from rlkd.envs.references import References, key_of, stated_reference
from rlkd.envs.scenario import check_keep, check_sections
from rlkd.errors import UserError
from rlkd.hardware import load_hardware
from rlkd.losses import LossConfig
from rlkd.models.real.attachment import AttachConfig, Plan, control_table
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.hooks import Link, link_places, link_table
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import (
    Kind,
    as_user_error,
    kind_of,
    load_config,
)
from rlkd.models.real.sides import Side, Sources, absent_teacher, load_student, load_teacher
from rlkd.students import Students
from rlkd.students.real.causal import CausalStudent, TokenConfig
from rlkd.students.real.module import ModuleStudent
from rlkd.students.real.processes import first_alone, from_first
from rlkd.students.real.train_config import ModuleTrainConfig, confirming_samples, evaluated_samples
from rlkd.teachers import Signals
from rlkd.teachers.real.answering import asked_folder, class_names_of
from rlkd.teachers.real.module_signals import describe_quality, module_signals
from rlkd.teachers.real.server import Server
from rlkd.teachers.real.several import Weighting, combine_teachers, further_answers
from rlkd.teachers.real.shards import names_digest
from rlkd.teachers.real.stored import stored_signals
from rlkd.teachers.real.token_signals import TokenSignals, token_signals

logger = logging.getLogger(__name__)

MAY_BE_SEEN = (
    "WARNING: rlkd cut the test split itself: if the teacher was trained on these data, its accuracy and the floor are "
    "too high; name the splits to be sure"
)
SPLITS: tuple[Split, Split] = ("validation", "test")
RESPONSES = {"forward": "the forward KL", "reverse": "the reverse KL", "js": "the Jensen-Shannon divergence"}
NUM_LINES = 20  # of the report on the data that are printed


@dataclass(frozen=True)
class RealCostConfig:
    """Where costs come from."""

    batch_size: int = 8
    """Samples that one inference answers together: the latency that the reward reads."""
    threads: int = 1
    """CPU threads of one inference."""
    batches: tuple[int, ...] = BATCHES
    """Further batch sizes that smaller copies of the student are timed at; more of them make a better fit."""
    profile: str | None = None
    """cost_profile.json of an earlier run of the same student: its speed is taken and nothing is timed."""

    def check(self) -> None:
        """Raise UserError for a batch without a sample, or no thread."""
        if self.batch_size < 1 or any(size < 1 for size in self.batches):
            raise UserError(
                f"cost: got batch_size {self.batch_size} and batches {list(self.batches)}; allowed: at least 1 each"
            )
        if self.threads < 1:
            raise UserError(f"cost.threads: got {self.threads}; allowed: at least 1")


@dataclass(frozen=True)
class RealConfig:
    """`rlkd distil --data ...`: distil a real model. Control ranges come from the policy."""

    teacher: str
    """Folder of a transformers classifier or causal language model (config.json, safetensors, tokenizer or image
    processor), or a hub id."""
    data: str
    """A CSV, TSV, JSON lines, Parquet or .npz file, or a folder of such files named by split, or of images; for a
    language model .txt files, too. docs/data.md has the table of what is accepted."""
    student: str = ""
    """Folder or hub id of a model, or a JSON configuration (fresh weights); by default it is cut from the teacher."""
    teacher_device_map: str | None = None
    """Spread a teacher that fits on no single device: auto or balanced (accelerate), or a JSON file of module paths and
    devices, among them cpu and disk. Its signals are computed once, before any training."""
    teacher_signals: str | None = None
    """Folder of rlkd signals with the teacher's answers; of `teacher`, its configuration and its tokenizer or image
    processor alone are read."""
    teacher_url: str | None = None
    """A completion server with log-probabilities of prompts that answers for a language model, such as vLLM's
    http://localhost:8000/v1; of `teacher`, its configuration and tokenizer alone are read. The environment variable
    RLKD_TEACHER_KEY may hold the server's key."""
    teacher_served: str = ""
    """Name of the model at teacher_url; by default the only one that it serves."""
    more_teachers: tuple[str, ...] = ()
    """Folders or hub ids of further classifiers of the same classes, of any architecture. Their answers are combined
    with those of `teacher` once, before any training; hidden features and attention come from `teacher`."""
    teacher_weights: Weighting = "mean"
    """mean; confidence: by how sure each teacher is of a training sample's label; gate: learned on the train split."""
    num_windows: int = 12
    """Decisions; each trains the student for train.steps_per_window steps."""
    cut: StudentCut = field(default_factory=StudentCut)
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    attach: AttachConfig = field(default_factory=AttachConfig)
    train: ModuleTrainConfig = field(default_factory=ModuleTrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    cost: RealCostConfig = field(default_factory=RealCostConfig)
    hardware: str = ""
    """Hardware profile (cpu, gpu, edge, or a YAML file): kept units are rounded up, so that layers have multiples of
    its channel_multiple; by default they are not rounded."""
    goal: Goal = field(default_factory=Goal)
    preference: Preference = field(default_factory=Preference)
    guard: GuardConfig = field(default_factory=GuardConfig)
    keep_checkpoints: int = 2
    """States of the training that stay on the disk; with --resume it goes on from the last one that is whole."""
    allow_pickle: bool = False
    """Read weight files that are pickles, too; they can run code."""

    def sources(self) -> Sources:
        """Return the models, the data, and how the student is made of them."""
        return Sources(
            teacher=self.teacher,
            student=self.student,
            data=self.data,
            columns=self.columns,
            cut=self.cut,
            attach=self.attach,
            device_map=self.teacher_device_map,
            allow_pickle=self.allow_pickle,
        )

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        check_keep(self.keep_checkpoints)
        check_sections(self, "cut", "columns", "attach", "train", "loss", "tokens", "cost", "goal", "guard")
        self.goal.weights(self.preference)
        self.channel_multiple()
        if self.is_absent and (self.more_teachers or self.teacher_device_map or self.tokens.teacher_in_memory):
            raise UserError(
                "teacher_signals, teacher_url: got more_teachers, teacher_device_map or tokens.teacher_in_memory, "
                "which need the teacher's weights; leave them out"
            )
        if self.teacher_signals is not None and self.teacher_url is not None:
            raise UserError("teacher_signals, teacher_url: got both; allowed: one, where the answers come from")
        if self.tokens.teacher_in_memory and self.teacher_device_map is not None:
            raise UserError(
                "tokens.teacher_in_memory: got a teacher with teacher_device_map, which answers once; leave one out"
            )

    @property
    def is_absent(self) -> bool:
        """Whether the teacher's answers come from elsewhere, so that its weights are not read."""
        return self.teacher_signals is not None or self.teacher_url is not None

    def channel_multiple(self) -> int:
        """Return the number of channels that layers of the target should have multiples of.

        Raises:
            UserError: there is no such profile.
        """
        return load_hardware(self.hardware).channel_multiple if self.hardware else 1


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
    teacher: nn.Module | None = None  # to be timed beside the student; None where it is spread over devices
    teacher_data: Examples | None = None  # the samples with the teacher's own inputs
    known: References = field(default_factory=References)
    has_given_splits: bool = True  # else rlkd cut them, and the teacher may have learned from test samples
    channel_multiple: int = 1  # kept units are rounded up, so that layers have multiples of so many channels

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Token positions, then the units of every group."""
        return self.student.plan.group_sizes

    @property
    def unit_multiple(self) -> int | Tensor:
        """As in `EpisodeScenario`: one number a group, because heads are several channels wide."""
        groups = self.student.plan.groups
        return torch.tensor([float(group.multiple(self.channel_multiple)) for group in groups]) if groups else 1

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


def build_real_scenario(
    config: RealConfig,
    controls: ControlConfig,
    start: Tensor | None = None,
    seed: int = 0,
) -> RealScenario:
    """Load teacher and data, make the student, attach what it takes, get the teacher's signals, count and time.

    Args:
        config: checked here.
        controls: ranges of the controls.
        start: [12], the setting that actions change; by default the published one.
        seed: of a fresh student's weights.

    Raises:
        UserError: a model or data that cannot be used.
    """
    config.check()
    kind = kind_of(load_config(config.teacher), config.teacher)
    sources = config.sources()
    teacher = absent_teacher(sources, kind) if config.is_absent else load_teacher(sources, kind)
    logger.info(_beginning(teacher.data.report))
    student, teacher = load_student(sources, kind, teacher, seed)
    _check_smaller(config, student, teacher)
    return scenario_of_sides(config, kind, student, teacher, controls=controls, start=start, seed=seed)


def scenario_of_sides(
    config: RealConfig,
    kind: Kind,
    student: Side,
    teacher: Side,
    *,
    controls: ControlConfig,
    start: Tensor | None = None,
    seed: int = 0,
) -> RealScenario:
    """Attach what the student takes, get the teacher's signals, count and time.

    Args:
        config: names of models and data are for messages alone.
        kind: what the models are for.
        student: its model is trained, so it must not be the user's.
        teacher: its model is in evaluation mode afterwards.
        controls: ranges of the controls.
        start: [12], the setting that actions change; by default the published one.
        seed: of the range test for the step size.

    Raises:
        UserError: models that cannot be used together.
    """
    has_given_splits = any(split_named(name) == "test" for name in set(teacher.table.splits or ()))
    if not has_given_splits:
        logger.warning(MAY_BE_SEEN)
    device = config.train.torch_device()
    blocks = student.plan.blocks if config.attach.hints == "all" else student.plan.blocks[-1:]
    few = student.data.few()
    links = (
        link_places(
            student.model, teacher.model, blocks, teacher.plan.blocks, student.data.batch(few), teacher.data.batch(few)
        )
        if student.plan.has_features and teacher.plan.has_features
        else []
    )
    student = dataclasses.replace(student, plan=from_first(lambda: _rehearsed(student, links, kind)))
    places = [link.teacher for link in links]
    is_whole = config.teacher_device_map is None and not teacher.is_absent
    if is_whole:
        teacher.model.to(device)
    with first_alone():
        signals = _stored(config, teacher, kind) if teacher.is_absent else _signals(config, teacher, places)
    if is_whole:
        teacher.model.cpu()
    quality = describe_quality(signals, teacher.data)
    if quality:
        logger.log(logging.WARNING if "WARNING: " in quality else logging.INFO, quality)
    if student.data is not teacher.data:  # other tokens or pixels: positions do not correspond
        signals = dataclasses.replace(signals, maps=signals.maps[..., :0])
    one = _typical(student.data)
    profile = from_first(lambda: _profile(config, student, one, kind))  # observations and limits follow from it
    teacher_work = _teacher_work(teacher)
    task = TaskDistribution(
        dataset=student.data.name,
        label_noise=Range(0.0, 0.0),
        num_labels=Range(len(student.data.splits["train"]), len(student.data.splits["train"])),
    )
    scenario = RealScenario(
        RealEpisodeConfig(config.num_windows, task, config.train, controls, config.loss),
        student.data,
        signals,
        profile,
        published_setting(controls) if start is None else start,
        teacher_work,
        Instrumented(student.model, student.plan, links),
        {name: value.clone() for name, value in student.model.state_dict().items()},
        kind,
        student.processor,
        f"{link_table(links)}\n\n{control_table(student.plan)}\n{_about_tokens(config, signals)}",
        f"{student.data.report}{quality}",
        config.tokens,
        teacher.model if is_whole else None,
        teacher.data if is_whole else None,
        has_given_splits=has_given_splits,
        channel_multiple=config.channel_multiple(),
    )
    return with_learning_rate(scenario, seed)


def _check_smaller(config: RealConfig, student: Side, teacher: Side) -> None:
    """Raise UserError where the default cut leaves the whole teacher."""
    if config.student or config.cut.is_given or config.cut.width < 1.0:
        return
    macs, teacher_macs = (count_work(s.model, _typical(s.data), s.plan).dense_macs for s in (student, teacher))
    if macs >= teacher_macs:
        raise UserError(
            f"cut: the student of {config.teacher} would be as large as the teacher; give --cut.width below 1, or the "
            "student's config with --student"
        )


def _rehearsed(student: Side, links: list[Link], kind: Kind) -> Plan:
    """Return the student's plan with the controls that work in a dry run on a few samples."""
    few = student.data.few()
    batches = [student.data.batch(rows) for rows in (few, few[:1], few[1:2])]
    return try_out(student.model, student.plan, links, kind, batches, processor=student.processor)


def _signals(config: RealConfig, teacher: Side, places: list[str]) -> Signals:
    model, plan, data, size = teacher.model, teacher.plan, teacher.data, config.train.evaluation_batch_size
    if not isinstance(data, TokenExamples):
        signals = module_signals(model, plan, places, data, size)
        device, sources = config.train.torch_device(), config.sources()
        more = [further_answers(sources, name, teacher, device, size) for name in config.more_teachers]
        return combine_teachers(signals, more, data, config.teacher_weights) if more else signals
    if config.more_teachers:
        raise UserError("more_teachers: got a language model; allowed: with classifiers")
    anchors = config.tokens.anchors(data.num_classes)
    return token_signals(model, plan, places, data, config.tokens.top_k, anchors, size)


def _stored(config: RealConfig, teacher: Side, kind: Kind) -> Signals:
    """Return the signals of a teacher without weights, from a folder or a server."""
    if config.teacher_url is not None:
        server = Server(config.teacher_url, config.teacher_served, batch_size=config.train.evaluation_batch_size)
        folder = asked_folder(teacher, kind, config.teacher, config.tokens.top_k, server)
    else:
        folder = Path(str(config.teacher_signals))
    anchors = config.tokens.anchors(teacher.data.num_classes) if kind == "causal_lm" else None
    return stored_signals(
        folder, teacher.data, kind, names_digest(teacher.processor, class_names_of(teacher, kind)), anchors
    )


def _teacher_work(teacher: Side) -> ModuleWork:
    """Count the work of a teacher, whose weights may be elsewhere: shapes are enough."""
    one = _typical(teacher.data)
    if not teacher.is_absent:
        return count_work(teacher.model, one, teacher.plan)
    inputs = {name: values.to("meta") for name, values in one.items() if name != PADDING_MASK}
    if teacher.plan.per_token:  # a mask that is ready, for one that is made would read values
        length = one["input_ids"].shape[1]
        inputs[PADDING_MASK] = torch.empty(1, 1, length, length, device="meta")
    with as_user_error("teacher: its work cannot be counted without its weights"):
        return count_work(teacher.model, inputs, teacher.plan)


def _about_tokens(config: RealConfig, signals: Signals) -> str:
    """How a language model is scored and taught; "" for a classifier."""
    if not isinstance(signals, TokenSignals):
        return ""
    a, k = signals.anchors, signals.tokens.values.shape[-1]
    beside = config.tokens.teacher_in_memory
    compared = "whole vocabulary" if beside else f"{k} likeliest tokens and all others as one"
    return (
        f"\naccuracy is (log {a.worst:g} - cross entropy) / (log {a.worst:g} - log {a.best:g}) of the next token: "
        f"perplexity {a.worst:g} counts as 0, {a.best:g} as 1\n"
        f"response is {RESPONSES[config.tokens.divergence]} over the teacher's {compared}\n"
    )


def _beginning(report: str) -> str:
    """Return the first lines of a report on data; the file has the table of many classes."""
    lines = report.splitlines()
    more = len(lines) - NUM_LINES
    return "\n".join(lines[:NUM_LINES]) + (f"\n... ({more} more lines in mapping.txt)" if more > 0 else "")


def _typical(data: Examples) -> dict[str, Tensor]:
    """Return the training sample of median length, without padding: [1, ...] each."""
    train = data.splits["train"]
    mask = data.inputs.get(PADDING_MASK)
    if mask is None:
        return data.batch(train[:1])
    lengths = mask[train].sum(1).tolist()
    where = lengths.index(statistics.median_low(lengths))
    return data.batch(train[where : where + 1])


def _profile(config: RealConfig, student: Side, one: dict[str, Tensor], kind: Kind) -> ModuleProfile:
    cost = config.cost
    if cost.profile is not None:
        work = count_work(student.model, one, student.plan)
        return load_speed(Path(cost.profile), student.plan, work, cost.batch_size)
    return load_or_measure(
        student.model,
        one,
        student.plan,
        kind,
        batch_size=cost.batch_size,
        batches=cost.batches,
        threads=cost.threads,
    )
