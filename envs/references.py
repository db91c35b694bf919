"""Reference accuracies that floors are shares of: the dense student's of the same task, the teacher's, or a number.

The dense student is trained once a task under the published setting, on the task's own labels, first weights and
batches. Its accuracies, and its parameters after `warm_windows` for students that start from trained weights, are kept.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkd.data import Task
from rlkd.data.distribution import reference_accuracy
from rlkd.envs.action import ControlConfig, decode, published_setting
from rlkd.students import Population, SoloStudent, Students

NUM_PARALLEL = 128


Key = tuple[int, int]


def key_of(task: Task) -> Key:
    """Return what tells tasks of a scenario apart: the seed, and a checksum of samples, labels and teachers.

    The same seed gives other labels under another distribution of tasks.
    """
    parts = (task.samples.numpy().tobytes(), task.labels.numpy().tobytes(), repr(task.teachers).encode())
    return task.seed, zlib.crc32(b"".join(parts))


@dataclass
class References:
    """Reference accuracies by task; `scope` says what the dense student was trained with."""

    scope: str = ""
    accuracy: dict[Key, tuple[float, float, float]] = field(default_factory=dict)  # in the order of `of`
    parameters: dict[Key, dict[str, Tensor]] = field(default_factory=dict)  # of the warm start

    def missing(self, tasks: Sequence[Task], warm: bool) -> list[Task]:
        """Return the tasks, each once, whose reference or warm start is missing."""
        known = self.parameters if warm else self.accuracy
        keyed = {key_of(task): task for task in tasks}
        return [task for key, task in keyed.items() if key not in known]

    def add(self, others: "References") -> None:
        """Take over what `others` holds."""
        self.accuracy.update(others.accuracy)
        self.parameters.update(others.parameters)

    def some(self, tasks: Sequence[Task]) -> "References":
        """Return those of `tasks` alone, where there are any, without a scope."""
        keys = [key_of(task) for task in tasks]
        accuracy = {key: self.accuracy[key] for key in keys if key in self.accuracy}
        return References("", accuracy, {key: self.parameters[key] for key in keys if key in self.parameters})

    def of(self, tasks: Sequence[Task]) -> Tensor:
        """[M, 3] float32, accuracy on validation, test, and the validation samples that confirm a window."""
        return torch.tensor([self.accuracy[key_of(task)] for task in tasks])


def train_references(
    references: References,
    tasks: Sequence[Task],
    students: Callable[[int], Students],
    controls: ControlConfig,
    *,
    num_classes: int,
    num_windows: int,
    warm_windows: int,
) -> None:
    """Train the dense student of every task in `tasks` and keep its accuracies.

    Args:
        references: filled here.
        tasks: each seed once.
        students: makes so many new students.
        controls: ranges of the controls.
        num_classes: C.
        num_windows: of an episode.
        warm_windows: windows before the episode; the parameters after them are kept if there are any.
    """
    for begin in range(0, len(tasks), NUM_PARALLEL):
        chunk = list(tasks[begin : begin + NUM_PARALLEL])
        # rows are independent, so one task beside a copy of itself trains in lock-step like many
        batch = chunk if len(chunk) > 1 else chunk * 2
        group = students(len(batch))
        group.reset(batch)
        setting = decode(published_setting(controls).expand(len(batch), -1), controls, num_classes)
        for window in range(warm_windows + num_windows):
            if warm_windows and window == warm_windows:
                state = group.state_dict()
                for row, task in enumerate(chunk):
                    references.parameters[key_of(task)] = {name: t[row].clone() for name, t in state.items()}
            group.train_window(setting)
        reached = [group.evaluate(split).accuracy.tolist() for split in ("validation", "test")]
        for row, task in enumerate(chunk):
            references.accuracy[key_of(task)] = (reached[0][row], reached[1][row], reached[0][row])


def stated_reference(reference: str, num_tasks: int) -> Tensor | None:
    """[M, 3] of a reference given as a number, else None."""
    value = reference_accuracy(reference)
    return None if value is None else torch.full((num_tasks, 3), value)


def load_warm_start(references: References, students: Students, tasks: Sequence[Task], rows: Tensor) -> None:
    """Give the students at `rows` the kept parameters of their tasks; optimizer state stays fresh."""
    if not isinstance(students, Population | SoloStudent):
        raise ValueError(f"load_warm_start: got {type(students).__name__}; allowed: students that are chains")
    names = list(references.parameters[key_of(tasks[0])])
    stacked = {n: torch.stack([references.parameters[key_of(task)][n] for task in tasks]) for n in names}
    students.load_parameters(stacked, rows)
