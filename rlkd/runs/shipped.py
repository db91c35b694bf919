"""Open what a run shipped: the student with the data that it answers, for export and measurement."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.compression import load_student
from rlkd.configs import DistilConfig
from rlkd.data import DataSet, Split, load_dataset
from rlkd.data.examples import PADDING_MASK, Examples, TokenExamples
from rlkd.errors import UserError
from rlkd.export.flat import Student
from rlkd.io.files import inside, read_json, whole
from rlkd.teachers import compute_signals, load_teachers

logger = logging.getLogger(__name__)

CHAIN_INPUT = "inputs"
MAX_SAMPLES = 512  # of a real model, of which each costs some milliseconds
LONGEST_TEXT = 2**20  # tokens


@dataclass(frozen=True)
class ShippedData:
    """A shipped student with its data."""

    folder: Path  # has student.json
    student: Student
    kind: str  # "chain", or the kind of a real model
    data_name: str
    batch: Callable[[Tensor], dict[str, Tensor]]  # inputs by name of the samples at [B] int64
    labels: Tensor  # [S] int64; zeros for a language model
    splits: dict[Split, Tensor]
    has_length: bool  # whether the second dimension of the inputs is a length that may change
    card: dict[str, Any]  # student.json
    counted: Callable[[Tensor, int], Tensor] | None = None  # of a language model
    data: DataSet | None = None  # of a chain
    teacher_logits: Callable[[], Tensor] | None = None  # [S, C] of a chain whose run names its teacher
    open_teacher: Callable[[], Callable[[Tensor], Tensor]] | None = None
    """Loads the teacher of a real student whose run names it: a function from samples [B] to logits [B, C]."""

    @property
    def is_causal(self) -> bool:
        """Whether it answers every token."""
        return self.kind == "causal_lm"

    def few(self, split: Split, most: int | None = None) -> Tensor:
        """Return the samples of a split, or the first of them where all would take too long."""
        limit = most or (len(self.splits[split]) if self.kind == "chain" else MAX_SAMPLES)
        return self.splits[split][:limit]

    def accuracy(self, run: Callable[[Mapping[str, Tensor]], Tensor], index: Tensor, batch_size: int = 32) -> float:
        """Return the share of right answers; of a language model, of right next tokens."""
        right, total = 0, 0
        for rows in torch.split(index, batch_size):
            inputs = self.batch(rows)
            answer = run(inputs).argmax(-1)  # [B] or [B, L]
            if self.counted is None:
                right, total = right + int((answer == self.labels[rows]).sum()), total + len(rows)
                continue
            ids = inputs["input_ids"]
            counts = self.counted(rows, ids.shape[1])  # [B, L - 1]
            right, total = right + int((answer[:, :-1] == ids[:, 1:])[counts].sum()), total + int(counts.sum())
        return right / total

    def with_student(self, student: Student) -> "ShippedData":
        """Return the same data with another student."""
        return dataclasses.replace(self, student=student)


def open_shipped(given: Path, config_of: Callable[[Path, type[Any]], tuple[Any, int]], data: str | None) -> ShippedData:
    """Open a run folder of `rlkd distil`, or the folder of a student.

    Args:
        given: a folder with student.json, or with `student/student.json`.
        config_of: reads the config of a run folder as a given class; returns it with the seed.
        data: name of a data set, or path of data; by default what the run's config names.

    Raises:
        UserError: there is no student, or its data cannot be had.
    """
    folder = given if (given / "student.json").exists() else given / "student"
    if not (folder / "student.json").exists():
        raise UserError(f"{given}: holds no student.json and no student/student.json; give a run of `rlkd distil`")
    run = folder.parent if (folder.parent / "config.yaml").exists() else None
    if run is None and data is None:
        raise UserError(f"{given}: has no config.yaml beside it that names its data; name the data with --data")
    if (folder / "student.safetensors").exists():
        config = None if run is None else _config_of_run(run, config_of, DistilConfig)
        return _open_chain(folder, config, data)
    return _open_real(folder, run, config_of, data)


def _config_of_run(run: Path | None, config_of: Any, kind: type[Any]) -> Any:
    assert run is not None
    return config_of(run, kind)[0]


def _open_chain(folder: Path, config: DistilConfig | None, given: str | None) -> ShippedData:
    student = load_student(folder).eval()
    name = given or (config.task.dataset if config else "")
    data = load_dataset(name)

    def teacher_logits() -> Tensor:
        assert config is not None
        return compute_signals(load_teachers(config.teacher, data)[-1:], data).logits[0]

    num_values, num_classes = torch.Size(student.input_shape).numel(), student.architecture()["num_classes"]
    if data.inputs[0].numel() != num_values or data.num_classes != num_classes:
        raise UserError(
            f"{folder}: answers {num_classes} classes of {num_values} values; {name} has {data.num_classes} of "
            f"{data.inputs[0].numel()}; name its data with --data"
        )
    inputs = data.inputs.reshape(len(data.inputs), *student.input_shape)
    card = read_json(inside(folder, "student.json"), "a student's card")
    return ShippedData(
        folder=folder,
        student=student,
        kind="chain",
        data_name=data.name,
        batch=lambda rows: {CHAIN_INPUT: inputs[rows]},
        labels=data.labels,
        splits=data.splits,
        has_length=False,
        card=card,
        data=data,
        teacher_logits=teacher_logits if config is not None and config.task.dataset == name else None,
    )


def _open_real(folder: Path, run: Path | None, config_of: Any, data: str | None) -> ShippedData:
    from rlkd.compression.real.student_folder import load_module_student
    from rlkd.envs.real_config import RealConfig  # the extra hf

    student = load_module_student(folder)
    columns, where = _columns_of(run, config_of, data, RealConfig)
    card = read_json(inside(folder, "student.json"), "a student's card")
    examples = examples_of(student, folder / "model", columns, where, card)
    opened = opened_examples(folder, student, examples, card)
    if run is None:
        return opened
    config = _config_of_run(run, config_of, RealConfig)
    if config.is_absent:
        return opened

    def open_teacher() -> Callable[[Tensor], Tensor]:
        if config.more_teachers:
            logger.warning(f"{config.teacher} alone teaches on the grid, without {', '.join(config.more_teachers)}")
        return teacher_answers(opened, config.teacher, columns, where, config.allow_pickle)

    return dataclasses.replace(opened, open_teacher=open_teacher)


def open_real_teacher(
    opened: ShippedData, source: str, columns: Any, data: Path, allow_pickle: bool = False
) -> ShippedData:
    """Return a model of transformers as a student without exits, on the data of a real student.

    Args:
        opened: the student.
        source: name or folder of the model.
        columns: how the table is read.
        data: file or folder.
        allow_pickle: whether weights may be pickled.

    Raises:
        UserError: the model or the data cannot be read.
    """
    from rlkd.compression.real.shipped import Shipment, ShippedStudent, shipped_student
    from rlkd.models.real.pretrained import load_model

    student: Any = opened.student
    assert isinstance(student, ShippedStudent)
    kind, num_classes = student.shipment.kind, student.shipment.num_classes
    model = load_model(source, kind, allow_pickle)
    shipment = Shipment(kind, (), (), (), 0, 1.0, None, 1.0, num_classes, False)
    teacher = shipped_student(model, torch.nn.ModuleList(), shipment)
    examples = examples_of(teacher, Path(source), columns, data, opened.card)
    return opened_examples(Path(source) / "student", teacher, examples, {})


def teacher_answers(
    opened: ShippedData, source: str, columns: Any, data: Path, allow_pickle: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the function from samples [B] to the logits [B, C] of a real student's teacher.

    Args:
        opened, source, columns, data, allow_pickle: as in `open_real_teacher`.

    Raises:
        UserError: the model or the data cannot be read, or its classes have another order than the student's.
    """
    teacher = open_real_teacher(opened, source, columns, data, allow_pickle)
    if not torch.equal(teacher.labels, opened.labels):
        raise UserError(f"{source}: orders its classes in another way than its student; allowed: the same order")

    @torch.no_grad()
    def answers(rows: Tensor) -> Tensor:
        logits: Tensor = teacher.student(**teacher.batch(rows))
        return logits

    return answers


def opened_examples(folder: Path, student: Any, examples: Examples, card: dict[str, Any]) -> ShippedData:
    """Return a real student with its data."""
    counted = examples.counted_of if isinstance(examples, TokenExamples) else None
    return ShippedData(
        folder=folder,
        student=student,
        kind=student.shipment.kind,
        data_name=examples.name,
        batch=examples.batch,
        labels=examples.labels,
        splits=examples.splits,
        has_length=PADDING_MASK in examples.inputs and not examples.fixed_length,
        card=card,
        counted=counted,
    )


def _columns_of(run: Path | None, config_of: Any, data: str | None, real_config: Any) -> tuple[Any, Path]:
    """Return how the data are read, and where they are."""
    from rlkd.data.rows import ColumnConfig

    if run is None:
        assert data is not None
        return ColumnConfig(), Path(data)
    config = _config_of_run(run, config_of, real_config)
    return config.columns, Path(data or config.data)


def examples_of(student: Any, model: Path, columns: Any, data: Path, card: Mapping[str, Any]) -> Examples:
    """Read data as a shipped real student takes them.

    Args:
        student: of `load_module_student`.
        model: folder with its tokenizer or image processor.
        columns: how the table is read.
        data: file or folder.
        card: the student's; it says to which length texts were cut.

    Raises:
        UserError: the data cannot be read.
    """
    from rlkd.data.loading import load_table
    from rlkd.models.real.inputs import examples_for
    from rlkd.models.real.pretrained import load_processor

    kind, name = student.shipment.kind, str(model)
    table = load_table(data, kind, columns, name)
    processor = None if table.kind == "array" else load_processor(name, kind)
    given = card.get("inputs") or {}
    length = whole(given.get("max_length", columns.max_length), "inputs.max_length", 2, LONGEST_TEXT)
    cut = dataclasses.replace(columns, max_length=length)
    examples, _ = examples_for(student, student.config, table, processor, cut, name=name)
    return dataclasses.replace(examples, fixed_length=bool(given.get("fixed_length", False)))
