"""Whether a teacher suits a student, before any distillation (`rlkd inspect-teacher`). It warns and never blocks."""

from dataclasses import dataclass

import torch

from rlkd.configs.knowledge import InspectConfig
from rlkd.data import DataSet, Range, TaskDistribution, draw_task, load_dataset
from rlkd.envs.action import ControlConfig, decode, published_setting
from rlkd.metrics import calibration_error
from rlkd.models import ChainStudent, build_student
from rlkd.students import Population
from rlkd.teachers import compute_signals, load_teachers

RATIOS = (5.0, 20.0)  # parameters of a teacher over a student's between which distillation is known to work well
POOR_CALIBRATION = 0.1


@dataclass(frozen=True)
class TeacherReport:
    """What is known of a teacher and a student of this size; accuracies are those of the validation split."""

    teacher_accuracy: float
    threshold: float
    chance: float  # share of the commonest class
    size_ratio: float  # parameters of the teacher over the student's
    teacher_kind: str
    student_kind: str
    teacher_ece: float
    expected_accuracy: float  # of a student of this size, mean over trials under the published setting
    expected_low: float  # lowest trial
    expected_high: float  # highest trial

    def warnings(self) -> list[str]:
        """Return one line for each thing that makes good distillation unlikely."""
        lines = []
        if self.teacher_accuracy <= self.chance:
            lines.append(f"the teacher, {self.teacher_accuracy:.3f}, is no better than the commonest class")
        elif self.teacher_accuracy < self.threshold:
            lines.append(
                f"the teacher is weak: {self.teacher_accuracy:.3f}, below {self.threshold:g}; give it more samples or "
                "steps"
            )
        low, high = RATIOS
        if self.size_ratio < low:
            lines.append(
                f"the teacher is only {self.size_ratio:.1f} times as large as the student; {low:g} to {high:g} times is"
                " usual"
            )
        if self.size_ratio > high:
            lines.append(
                f"the teacher is {self.size_ratio:.1f} times as large as the student; beyond {high:g} times, an "
                "assistant of middle size between them can help (Mirzadeh et al. 2020)"
            )
        if self.teacher_kind != self.student_kind:
            lines.append(
                f"a {self.teacher_kind} teaches a {self.student_kind}: attention maps cannot be compared, and hints "
                "compare means over positions"
            )
        if self.teacher_ece > POOR_CALIBRATION:
            lines.append(
                f"the teacher's confidence is off by {self.teacher_ece:.3f} on average (ECE); a higher temperature or "
                "standardised_kl makes up for it"
            )
        if self.expected_low > self.teacher_accuracy:
            lines.append("every trial of a student of this size beats the teacher: there is little to learn from it")
        return lines


def inspect_teacher(config: InspectConfig) -> TeacherReport:
    """Load or train the teacher, try students of this size, and report on both."""
    config.check()
    data = load_dataset(config.data)
    config.teacher.check_against(data)
    (teacher,) = load_teachers(config.teacher, data)
    student = build_student(config.student, data.input_shape, data.num_classes)
    validation = data.splits["validation"]
    labels = data.labels[validation]
    with torch.no_grad():
        logits = teacher(data.inputs[validation], teacher.full_masks()).logits[-1]
    trials = _trials(config, data, student, teacher)
    return TeacherReport(
        teacher_accuracy=float((logits.argmax(-1) == labels).double().mean()),
        threshold=config.threshold,
        chance=float(labels.bincount().max()) / len(labels),
        size_ratio=_num_parameters(teacher) / _num_parameters(student),
        teacher_kind="conv" if teacher.is_conv else "mlp",
        student_kind=config.student.kind,
        teacher_ece=calibration_error(logits, labels),
        expected_accuracy=sum(trials) / len(trials),
        expected_low=min(trials),
        expected_high=max(trials),
    )


def _num_parameters(model: ChainStudent) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trials(config: InspectConfig, data: DataSet, student: ChainStudent, teacher: ChainStudent) -> list[float]:
    """Return validation accuracies of students trained under the published setting, in lock-step."""
    everything = float(len(data.splits["train"]))
    tasks = TaskDistribution(config.data, label_noise=Range(0.0, 0.0), num_labels=Range(everything, everything))
    signals = compute_signals([teacher], data)
    population = Population(student, data, signals, config.num_students, config.train)
    population.reset([draw_task(seed, tasks, data, 1) for seed in range(config.num_students)])
    ranges = ControlConfig()
    setting = published_setting(ranges).expand(config.num_students, -1)
    for _ in range(config.num_windows):
        population.train_window(decode(setting, ranges, data.num_classes))
    return [float(a) for a in population.evaluate("validation").exit_accuracy[:, -1]]
