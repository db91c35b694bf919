"""Load a teacher and its student, each with the data as it takes them."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlkd.data.examples import PADDING_MASK, Examples
from rlkd.data.labels import class_names
from rlkd.data.loading import load_examples, load_table
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Table
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, Plan, bare_plan, make_plan
from rlkd.models.real.cutting import StudentCut, student_from_teacher
from rlkd.models.real.inputs import check_vocabulary, examples_for, fit_texts, not_taken
from rlkd.models.real.pretrained import (
    Kind,
    as_user_error,
    check_same_tokenizer,
    load_config,
    load_model,
    load_processor,
    new_model,
    on_meta,
    quiet,
    share_padding,
    vocabulary_differences,
)

logger = logging.getLogger(__name__)
NUM_ROWS = 16  # that the influence of a teacher's blocks is measured on


@dataclass(frozen=True)
class Sources:
    """What a user names: the models, the data, and how the student is made of them."""

    teacher: str
    student: str
    data: str
    columns: ColumnConfig
    cut: StudentCut
    attach: AttachConfig
    device_map: str | None
    allow_pickle: bool


@dataclass(frozen=True)
class Side:
    """One model with its data."""

    model: nn.Module
    data: Examples
    plan: Plan
    processor: Any  # tokenizer or image processor; None for arrays
    table: Table  # what `data` was made of
    columns: ColumnConfig  # how; its max_length is what the model takes
    is_absent: bool = False  # a teacher without weights, on the device `meta`, whose answers come from elsewhere


def load_teacher(sources: Sources, kind: Kind) -> Side:
    """Load the teacher and the data.

    Raises:
        UserError: a model or data that cannot be used, or do not belong together.
    """
    name = sources.teacher
    model = load_model(name, kind, sources.allow_pickle, device_map=sources.device_map)
    described = _named_classes(model.config, kind, name)
    table = load_table(sources.data, kind, sources.columns, name)
    processor = None if table.kind == "array" else load_processor(name, kind)
    share_padding(model, processor)
    data, columns = examples_for(model, described, table, processor, sources.columns, name=name)
    plan = _plan(model, data, AttachConfig(exits=()), name)
    _check_answers(name, plan, data)
    return Side(model, data, plan, processor, table, columns)


def absent_teacher(sources: Sources, kind: Kind) -> Side:
    """Load the data of a teacher whose weights are elsewhere, from its configuration and processor alone.

    Raises:
        UserError: a configuration, a processor or data that cannot be used.
    """
    name = sources.teacher
    described = _named_classes(load_config(name), kind, name)
    model = on_meta(described, kind)
    if model is None:
        raise UserError(f"{name}: no model can be made of its config.json")
    table = load_table(sources.data, kind, sources.columns, name)
    processor = None if table.kind == "array" else load_processor(name, kind)
    share_padding(model, processor)
    data = load_examples(table, processor, described, columns=sources.columns, model=name)
    if PADDING_MASK in data.inputs:
        check_vocabulary(name, model, data)
    plan = bare_plan(data.num_classes, kind == "causal_lm")
    return Side(model, data, plan, processor, table, sources.columns, is_absent=True)


def _named_classes(described: Any, kind: Kind, name: str) -> Any:
    """Give a configuration one spelling of its classes, which the student takes over."""
    if kind != "causal_lm" and described.id2label is None:  # some families keep the number of classes alone
        described.id2label = {i: f"LABEL_{i}" for i in range(int(described.num_labels))}
        described.label2id = {name: i for i, name in described.id2label.items()}
    if kind != "causal_lm":
        names = class_names(described, name)
        described.id2label, described.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return described


def load_student(sources: Sources, kind: Kind, teacher: Side, seed: int) -> tuple[Side, Side]:
    """Cut the student from the teacher, load it, or make it of a configuration.

    Returns:
        The student, with the teacher's inputs unless it has a tokenizer or image processor of its own; and the
        teacher, whose texts are cut shorter where the student takes fewer tokens.

    Raises:
        UserError: a student that cannot be made, or does not take the inputs.
    """
    name, described = sources.student or "student", teacher.model.config
    processor = teacher.processor
    if not sources.student and teacher.is_absent:
        raise UserError("student: got none with a teacher without weights, from which it cannot be cut; give --student")
    if not sources.student:
        model, _ = student_from_teacher(teacher.model, kind, sources.cut, few_rows(teacher.data))
    elif Path(sources.student).suffix == ".json":
        fresh = load_config(sources.student)
        _take_classes(fresh, described)
        with as_user_error(f"{name}: no model can be made of it"):
            model = new_model(fresh, kind, seed)
    else:
        is_causal = kind == "causal_lm"
        num_classes = None if is_causal else teacher.data.num_classes
        model = load_model(sources.student, kind, sources.allow_pickle, num_classes, seed)
        _take_classes(model.config, described)
        own = None if processor is None else _own_processor(sources.student, kind)
        if own is not None and is_causal:
            check_same_tokenizer(processor, own)
        elif own is not None and _differ(processor, own):
            processor = own
        elif own is None and is_causal:
            _check_same_size(name, model, teacher.data.num_classes)
    share_padding(model, processor)
    note = _cut_vocabulary(name, model, teacher.data.num_classes, processor) if kind == "causal_lm" else ""
    size = int(model.config.vocab_size) if note else teacher.data.num_classes  # type: ignore[union-attr, arg-type]

    def shared(data: Examples) -> Examples:
        return dataclasses.replace(data, num_classes=size, report=f"{data.report}{note}\n") if note else data

    if note:
        logger.warning(note)
        teacher = dataclasses.replace(teacher, data=shared(teacher.data))
    own_config: Any = model.config
    channels = [getattr(config, "num_channels", None) for config in (own_config, described)]
    if processor is not teacher.processor or channels[0] != channels[1]:
        data, columns = examples_for(model, described, teacher.table, processor, teacher.columns, name=name)
    else:  # one and the same: positions of the two models correspond

        def remake(shorter: ColumnConfig) -> Examples:
            return shared(load_examples(teacher.table, processor, described, columns=shorter, model=sources.teacher))

        data, columns = fit_texts(model, teacher.data, teacher.columns, remake, name=name)
        if data is not teacher.data:
            absent = teacher.is_absent
            plan = teacher.plan if absent else _plan(teacher.model, data, AttachConfig(exits=()), sources.teacher)
            teacher = dataclasses.replace(teacher, data=data, columns=columns, plan=plan)
    plan = _plan(model, data, sources.attach, name)
    _check_answers(name, plan, data)
    return Side(model, data, plan, processor, teacher.table, columns), teacher


def few_rows(data: Examples) -> dict[str, Tensor]:
    """Return training samples, evenly spread, that the influence of blocks is measured on: [NUM_ROWS, ...] each."""
    rows = data.splits["train"]
    return data.batch(rows[:: max(1, len(rows) // NUM_ROWS)][:NUM_ROWS])


def _check_same_size(name: str, model: nn.Module, size: int) -> None:
    """Raise UserError for a pretrained student whose tokens may differ from the teacher's."""
    own: Any = model.config
    if own.vocab_size != size:
        raise UserError(
            f"{name}: its vocabulary has {own.vocab_size} tokens, the teacher's {size}, and it has no tokenizer that "
            "tells whether they are the same; put the student's tokenizer into its folder"
        )


def _cut_vocabulary(name: str, model: nn.Module, size: int, tokenizer: Any) -> str:
    """Cut a student's vocabulary to the teacher's, where it is larger: models of one family pad theirs differently.

    Args:
        name: of the student, for messages.
        model: its vocabulary may shrink.
        size: of the teacher's vocabulary.
        tokenizer: of both.

    Returns:
        One line that says what is distilled; "" where the sizes are equal.

    Raises:
        UserError: the tokenizer has tokens beyond the common part.
    """
    own: Any = model.config
    theirs, common = int(own.vocab_size), min(int(own.vocab_size), size)
    if theirs == size:
        return ""
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if num_tokens > common:
        raise UserError(
            f"{name}: its vocabulary has {theirs} tokens, the teacher's {size}, the tokenizer {num_tokens}; give the "
            f"student a vocab_size of {size}"
        )
    if theirs > common:
        resized: Any = model
        with quiet(), as_user_error(f"{name}: its vocabulary cannot be cut to {common} tokens"):
            resized.resize_token_embeddings(common)
    return (
        f"{name}: its vocabulary has {theirs} tokens, the teacher's {size}, their tokenizer {num_tokens}; the first "
        f"{common} are distilled, the others are padding that no text has"
    )


def _plan(model: nn.Module, data: Examples, attach: AttachConfig, name: str) -> Plan:
    with as_user_error(not_taken(model, data, name)):
        return make_plan(model, data.batch(data.few()), attach, data.num_positions, samples=few_rows(data))


def _check_answers(name: str, plan: Plan, data: Examples) -> None:
    if plan.num_classes != data.num_classes:
        raise UserError(f"{name}: gives {plan.num_classes} answers; the data have {data.num_classes} classes")


def _take_classes(config: Any, teacher: Any) -> None:
    """Give a student's configuration the names of the teacher's classes; a language model's may have none."""
    config.id2label, config.label2id = dict(teacher.id2label or {}), dict(teacher.label2id or {})


def _own_processor(source: str, kind: Kind) -> Any:
    """Load the student's own tokenizer or image processor; None where its folder has none."""
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "preprocessor_config.json")
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in names):
        return None
    return load_processor(source, kind)


def _differ(ours: Any, theirs: Any) -> bool:
    if hasattr(ours, "get_vocab"):
        return vocabulary_differences(ours, theirs) is not None
    return bool(ours.to_dict() != theirs.to_dict())
