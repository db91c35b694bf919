"""The configurations of the verbs; each field is a section with a dataclass of its own, or a plain value."""

from dataclasses import dataclass, field

from rlkd.agents.ppo import PPOConfig
from rlkd.agents.search import SearchConfig
from rlkd.cost import CostConfig
from rlkd.envs.action import ControlConfig
from rlkd.envs.world import EnvConfig
from rlkd.errors import UserError
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
from rlkd.tasks import Preference, Range, TaskDistribution
from rlkd.teachers import TeacherConfig


@dataclass(frozen=True)
class ComparisonConfig:
    """The comparison on held-out tasks that ends a run."""

    num_tasks: int = 128
    """Fresh tasks, the same for every method and preference."""
    accuracy_weights: tuple[float, ...] = (0.6, 0.4, 0.9)
    """Accuracy weights of the preferences that are compared; the first one gives result.json's main figures."""

    def check(self) -> None:
        """Raises UserError for too few tasks or an impossible weight."""
        if self.num_tasks < 2:
            raise UserError(f"comparison.num_tasks: got {self.num_tasks}; allowed: at least 2")
        if not self.accuracy_weights or not all(0 <= w <= 1 for w in self.accuracy_weights):
            raise UserError(
                f"comparison.accuracy_weights: got {list(self.accuracy_weights)}; allowed: one or more from 0 to 1"
            )


@dataclass(frozen=True)
class ExperimentConfig(EnvConfig):
    """`rlkd train`: learn a policy over a population and compare it on held-out tasks."""

    search: SearchConfig = field(default_factory=SearchConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)

    def check(self) -> None:
        """Raises UserError for the first impossible value."""
        super().check()
        for part in (self.search, self.ppo, self.comparison):
            part.check()
        if self.ppo.num_students * self.num_windows < 2:
            raise UserError("ppo.num_students: got 1 with num_windows 1; allowed: at least 2 of either, to learn from")


def _clean_task() -> TaskDistribution:
    return TaskDistribution(label_noise=Range(0.0, 0.0), num_labels=Range(897, 897))


@dataclass(frozen=True)
class ReplayConfig:
    """`rlkd replay`: distil one new student under a learned policy. Control ranges come from the policy."""

    num_windows: int = 12
    """Decisions; each trains the student for train.steps_per_window steps."""
    task: TaskDistribution = field(default_factory=_clean_task)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(num_samples=(897,)))
    train: TrainConfig = field(default_factory=TrainConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    preference: Preference = field(default_factory=Preference)

    def env(self, controls: ControlConfig) -> EnvConfig:
        """The environment's part, the preference put into its tasks."""
        task = self.task.with_preference(self.preference)
        return EnvConfig(self.num_windows, task, self.student, self.teacher, self.train, controls, self.cost)

    def check(self) -> None:
        """Raises UserError for the first impossible value."""
        self.env(ControlConfig()).check()


@dataclass(frozen=True)
class CompareConfig(ExperimentConfig):
    """`rlkd compare`: the same tasks under several controllers. The search gives the static settings."""

    policy: str | None = None
    """Folder of the policy that method `policy` replays; its start settings then serve `static`, with no search."""
