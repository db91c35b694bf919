"""Build the scenario of a real model: load both models and the data, get the teacher's signals, count and time."""

import contextlib
import dataclasses
import logging
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

from rlkd.compression.real.trial import try_out
from rlkd.cost.real import ModuleProfile, load_speed
from rlkd.cost.real_timing import load_or_measure
from rlkd.cost.real_work import ModuleWork, count_work
from rlkd.data import Range, TaskDistribution
from rlkd.data.examples import PADDING_MASK, Examples, TokenExamples
from rlkd.data.layout import split_named
from rlkd.envs.action import ControlConfig, published_setting
from rlkd.envs.rate import with_learning_rate
from rlkd.envs.real import RealEpisodeConfig, RealScenario
from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError
from rlkd.hardware import load_hardware
from rlkd.io.processes import first_alone, from_first, num_processes
from rlkd.models.real.attachment import Plan, control_table
from rlkd.models.real.hooks import Link, link_places, link_table
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind, as_user_error, kind_of, load_config
from rlkd.models.real.sharding import is_sharded
from rlkd.models.real.sides import Side, absent_teacher, load_student, load_teacher
from rlkd.students.real.sharded import check_sharding
from rlkd.teachers import Signals
from rlkd.teachers.real.answering import asked_folder, class_names_of
from rlkd.teachers.real.module_signals import describe_quality, module_signals
from rlkd.teachers.real.server import Server
from rlkd.teachers.real.several import combine_teachers, further_answers
from rlkd.teachers.real.sharded import shard_teacher
from rlkd.teachers.real.shards import names_digest
from rlkd.teachers.real.stored import stored_signals
from rlkd.teachers.real.token_signals import TokenSignals, token_signals

logger = logging.getLogger(__name__)
MAY_BE_SEEN = (
    "WARNING: rlkd cut the test split itself: if the teacher was trained on these data, its accuracy and the floor are "
    "too high; name the splits to be sure"
)
ALONE = "train.shard, teacher_shard: there is one process, which holds everything; torchrun starts several"
RESPONSES = {"forward": "the forward KL", "reverse": "the reverse KL", "js": "the Jensen-Shannon divergence"}
NUM_LINES = 20  # of the report on the data that are printed
SHORT, USEFUL = 2, 3  # epochs; docs/results/real/fashion_99.md has what more than one brings


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
    if (config.train.shard or config.teacher_shard) and num_processes() == 1:
        logger.warning(ALONE)
    if config.train.shard and num_processes() > 1:
        with Instrumented(student.model, student.plan, links) as attached:
            check_sharding(attached, student.data.batch(few), device)
    teacher_work = _teacher_work(teacher)
    shards = config.teacher_shard and num_processes() > 1
    is_whole = config.teacher_device_map is None and not teacher.is_absent and not shards
    if shards:
        shard_teacher(teacher.model, teacher.plan.blocks, teacher.data.batch(few), device)
    elif is_whole:
        teacher.model.to(device)
    with contextlib.nullcontext() if shards else first_alone():
        signals = _stored(config, teacher, kind) if teacher.is_absent else teacher_signals(config, teacher, places)
    if is_whole:
        teacher.model.cpu()
    quality = describe_quality(signals, teacher.data)
    if quality:
        logger.log(logging.WARNING if "WARNING: " in quality else logging.INFO, quality)
    if student.data is not teacher.data:  # other tokens or pixels: positions do not correspond
        signals = dataclasses.replace(signals, maps=signals.maps[..., :0])
    one = typical_sample(student.data)
    profile = from_first(lambda: _profile(config, student, one, kind))  # observations and limits follow from it
    logger.info(describe_length(config, len(student.data.splits["train"])))
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
        teacher.model if is_whole or (shards and config.tokens.teacher_in_memory) else None,
        teacher.data if is_whole else None,
        has_given_splits=has_given_splits,
        channel_multiple=config.channel_multiple(),
    )
    return with_learning_rate(scenario, seed)


def _check_smaller(config: RealConfig, student: Side, teacher: Side) -> None:
    """Raise UserError where the default cut leaves the whole teacher."""
    if config.student or config.cut.is_given or config.cut.width < 1.0:
        return
    macs, teacher_macs = (count_work(s.model, typical_sample(s.data), s.plan).dense_macs for s in (student, teacher))
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


def teacher_signals(config: RealConfig, teacher: Side, places: list[str]) -> Signals:
    """Return the answers of a teacher, which is on its device, and its features at `places`."""
    model, plan, data, size = teacher.model, teacher.plan, teacher.data, config.train.evaluation_batch_size
    if not isinstance(data, TokenExamples):
        signals = module_signals(model, plan, places, data, size)
        device, sources = config.train.torch_device(), config.sources()
        shard = is_sharded(model)
        more = [further_answers(sources, name, teacher, device, size, shard=shard) for name in config.more_teachers]
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
    one = typical_sample(teacher.data)
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


def describe_length(config: RealConfig, num_samples: int) -> str:
    """How long the training is, and what to change where it is short."""
    train = config.train
    per_step = config.num_windows * train.batch_size  # samples that one step more in every window adds
    num_epochs = per_step * train.steps_per_window / num_samples
    line = (
        f"training: {config.num_windows} windows of {train.steps_per_window} steps of {train.batch_size} samples, "
        f"{num_epochs:.2f} epochs of {num_samples:,} samples"
    )
    if num_epochs < SHORT:
        steps = math.ceil(USEFUL * num_samples / per_step)
        line += f"; a floor close to the teacher may need more: --train.steps_per_window {steps} makes {USEFUL} epochs"
    return line


def _beginning(report: str) -> str:
    """Return the first lines of a report on data; the file has the table of many classes."""
    lines = report.splitlines()
    more = len(lines) - NUM_LINES
    return "\n".join(lines[:NUM_LINES]) + (f"\n... ({more} more lines in mapping.txt)" if more > 0 else "")


def typical_sample(data: Examples) -> dict[str, Tensor]:
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
    threads, batches = config.timed()
    if config.hardware and load_hardware(config.hardware).device != "cpu":
        logger.warning(
            f"hardware: {config.hardware} is no CPU; the student's latencies are timed on this machine's CPU"
        )
    return load_or_measure(
        student.model, one, student.plan, kind, batch_size=cost.batch_size, batches=batches, threads=threads
    )
