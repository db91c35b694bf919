"""The configurations of `rlkd evaluate` and `rlkd inspect-teacher`."""

from dataclasses import dataclass, field

from rlkd.data.datasets import check_dataset
from rlkd.data.rows import ColumnConfig
from rlkd.errors import UserError
from rlkd.io.numbers import check_finite
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig


def _one_teacher() -> TeacherConfig:
    return TeacherConfig(num_samples=(0,))


def _check_teacher(teacher: TeacherConfig) -> None:
    teacher.check()
    if len(teacher.num_samples) != 1:
        raise UserError(f"teacher.num_samples: got {list(teacher.num_samples)}; allowed: one number, for one teacher")


@dataclass(frozen=True)
class EvaluateConfig:
    """`rlkd evaluate`: metrics of a student beside its teacher, on test data."""

    data: str = "digits"
    """Name of the data set (`rlkd list`)."""
    teacher: TeacherConfig = field(default_factory=_one_teacher)
    """The teacher that the student is compared with; it is trained, or taken from the cache."""
    epsilon: float = 0.1
    """Largest change of an input by FGSM and PGD, as a share of the inputs' range (of a table: of their deviation)."""
    transfer: str | None = None
    """Data set of the same input shape, on which a linear classifier reads the student's features."""

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        check_finite(self)
        for key, name in (("data", self.data), ("transfer", self.transfer)):
            if name is not None:
                check_dataset(name, key)
        _check_teacher(self.teacher)
        if not 0 < self.epsilon <= 1:
            raise UserError(f"epsilon: got {self.epsilon:g}; allowed: above 0, at most 1")


@dataclass(frozen=True)
class RealEvaluateConfig:
    """`rlkd evaluate` of a real student: metrics beside its teacher, on the test split of its data."""

    data: str
    """What the student was distilled on, as for `rlkd distil --data`."""
    teacher: str
    """Folder of a transformers classifier, or a hub id."""
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    epsilon: float = 0.1
    """Largest change of a pixel by FGSM and PGD, as a share of the deviation of the pixels; texts are not attacked."""
    batch_size: int = 64
    """Samples that are answered together."""

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        check_finite(self)
        self.columns.check()
        if self.batch_size < 1 or not 0 < self.epsilon <= 1:
            raise UserError(
                f"evaluate: got batch_size {self.batch_size}, epsilon {self.epsilon:g}; allowed: at least 1, "
                "above 0 to 1"
            )


@dataclass(frozen=True)
class InspectConfig:
    """`rlkd inspect-teacher`: whether a teacher suits a student, before any distillation."""

    data: str = "digits"
    """Name of the data set (`rlkd list`)."""
    teacher: TeacherConfig = field(default_factory=_one_teacher)
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    num_windows: int = 12
    """Windows of train.steps_per_window steps that a student of this size is tried for."""
    num_students: int = 4
    """Students that are tried, each with other first weights and batches."""
    threshold: float = 0.9
    """Validation accuracy below which a teacher is called weak."""

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        check_finite(self)
        check_dataset(self.data, "data")
        _check_teacher(self.teacher)
        self.student.check()
        self.train.check()
        if self.num_windows < 1 or self.num_students < 2:
            raise UserError(
                f"inspect-teacher: got num_windows {self.num_windows}, num_students {self.num_students}; allowed: at "
                "least 1, at least 2"
            )
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold: got {self.threshold:g}; allowed: above 0, at most 1")
