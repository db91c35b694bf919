"""The configurations of the verbs; each field is a section with a dataclass of its own, or a plain value."""

import difflib
from dataclasses import dataclass, field, fields, replace

from rlkd.agents.baselines.methods import METHODS, NEED_POLICY, WEIGH_TEACHERS
from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.planner.planning import PlanningConfig
from rlkd.agents.ppo.online import OnlineAgentConfig
from rlkd.agents.ppo.train import PPOConfig
from rlkd.cost import CostConfig
from rlkd.data import Preference, Range, TaskDistribution, check_dataset
from rlkd.envs.action import ControlConfig
from rlkd.envs.scenario import EnvConfig, check_keep
from rlkd.errors import UserError
from rlkd.io.numbers import check_finite
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
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
class ScenarioConfig:
    """A data set and a student structure."""

    dataset: str
    """Name of the data set (`rlkd list`)."""
    student: StudentConfig = field(default_factory=StudentConfig)


@dataclass(frozen=True)
class ExperimentConfig(EnvConfig):
    """`rlkd train`: learn a policy over a population and compare it on held-out tasks."""

    also: tuple[ScenarioConfig, ...] = ()
    """Data sets and students that the policy is trained on besides task.dataset and student. PPO's students
    are shared evenly, and planning's as planning.main_share says."""
    task: TaskDistribution = field(default_factory=lambda: TaskDistribution(accuracy_weight=Range(0.3, 0.98)))
    controls: ControlConfig = field(default_factory=lambda: ControlConfig(step=0.15))
    search: SearchConfig = field(default_factory=SearchConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    keep_checkpoints: int = 2
    """States of PPO that stay on the disk; with --resume it goes on from the last one that is whole."""

    def check(self) -> None:
        """Raises UserError for the first impossible value."""
        super().check()
        check_keep(self.keep_checkpoints)
        for part in (self.search, self.planning, self.ppo, self.comparison):
            part.check()
        if self.ppo.num_students * self.num_windows < 2:
            raise UserError("ppo.num_students: got 1 with num_windows 1; allowed: at least 2 of either, to learn from")
        shares = (len(self.also) + 1) * self.ppo.group_size
        if self.ppo.num_students % shares:
            raise UserError(
                f"ppo.num_students: got {self.ppo.num_students} for {len(self.also) + 1} scenarios and groups of "
                f"{self.ppo.group_size}; allowed: multiples of {shares}"
            )
        for scenario in self.also:
            check_dataset(scenario.dataset)
            scenario.student.check()

    def scenarios(self) -> list[EnvConfig]:
        """What the policy is trained on: the main data set and student, then those of `also`."""
        shared = {f.name: getattr(self, f.name) for f in fields(EnvConfig)}
        return [
            EnvConfig(**shared | {"task": replace(self.task, dataset=scenario.dataset), "student": scenario.student})
            for scenario in (ScenarioConfig(self.task.dataset, self.student), *self.also)
        ]


def _clean_task() -> TaskDistribution:
    return TaskDistribution(label_noise=Range(0.0, 0.0), num_labels=Range(897.0, 897.0))


@dataclass(frozen=True)
class ReplayConfig:
    """`rlkd replay`: distil one new student under a learned policy. Control ranges come from the policy."""

    num_windows: int = 12
    """Decisions; each trains the student for train.steps_per_window steps."""
    task: TaskDistribution = field(default_factory=_clean_task)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(num_samples=(0,)))
    train: TrainConfig = field(default_factory=TrainConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    preference: Preference = field(default_factory=Preference)
    keep_checkpoints: int = 2
    """States of the training that stay on the disk; with --resume it goes on from the last one that is whole."""

    def env(self, controls: ControlConfig) -> EnvConfig:
        """The environment's part, the preference put into its tasks."""
        task = self.task.with_preference(self.preference)
        return EnvConfig(self.num_windows, task, self.student, self.teacher, self.train, controls, self.cost)

    def check(self) -> None:
        """Raises UserError for the first impossible value."""
        check_finite(self)
        self.env(ControlConfig()).check()
        check_keep(self.keep_checkpoints)


@dataclass(frozen=True)
class OnlineConfig:
    """`rlkd train --mode online`: one long training, from which the agent learns while it goes on."""

    num_windows: int = 96
    """Decisions; each trains the student for train.steps_per_window steps."""
    task: TaskDistribution = field(default_factory=_clean_task)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(num_samples=(0,)))
    train: TrainConfig = field(default_factory=TrainConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    preference: Preference = field(default_factory=Preference)
    agent: OnlineAgentConfig = field(default_factory=OnlineAgentConfig)
    keep_every: int = 12
    """Windows between two students that are kept on the disk."""

    def env(self, controls: ControlConfig) -> EnvConfig:
        """The environment's part, the preference put into its tasks."""
        task = self.task.with_preference(self.preference)
        return EnvConfig(self.num_windows, task, self.student, self.teacher, self.train, controls, self.cost)

    def check(self) -> None:
        """Raises UserError for the first impossible value."""
        check_finite(self)
        self.env(ControlConfig()).check()
        self.agent.check(self.num_windows)
        if self.keep_every < 1:
            raise UserError(f"keep_every: got {self.keep_every}; allowed: at least 1")


@dataclass(frozen=True)
class CompareConfig(ExperimentConfig):
    """`rlkd compare`: the same tasks under several controllers. Without a policy a search gives the static settings."""

    methods: str = "static,published,annealed"
    """Comma-separated (`rlkd list`); the others are paired with the policy, or with the first."""
    num_seeds: int = 1
    """Sets of comparison.num_tasks fresh tasks."""
    policy: str | None = None
    """Folder of the policy that method `policy` replays; its static settings then serve `static`, with no search."""
    tune_exit: bool = False
    """Tune every student's exit threshold on validation after its training, whatever the method."""
    front_trials: int = 0
    """Trainings a task of a multi-objective search that the policy's front is compared with; 0: no such comparison."""
    front_weights: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    """Accuracy weights that make up the policy's front."""

    def method_names(self) -> list[str]:
        """`methods` as a list, each once."""
        return list(dict.fromkeys(name.strip() for name in self.methods.split(",")))

    def check(self) -> None:
        """Raises UserError for the first impossible value."""
        super().check()
        for name in self.method_names():
            if name not in METHODS:
                close = difflib.get_close_matches(name, METHODS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"methods: got {name!r}; allowed: {', '.join(METHODS)}{hint}")
            if self.policy is None and name in NEED_POLICY:
                raise UserError(f"methods: {name} needs a policy; give its folder with --policy")
        weighing = [name for name in self.method_names() if name in WEIGH_TEACHERS]
        if weighing and self.task.num_teachers.high < 2:
            raise UserError(
                f"methods: {weighing[0]} weighs several teachers, and task.num_teachers gives a task one; allowed with "
                "task.num_teachers.high of 2 or more"
            )
        if self.num_seeds < 1:
            raise UserError(f"num_seeds: got {self.num_seeds}; allowed: at least 1")
        if self.front_trials < 0 or (self.front_trials and self.policy is None):
            raise UserError(f"front_trials: got {self.front_trials}; allowed: 0, or more with --policy")
        if not self.front_weights or not all(0 <= w <= 1 for w in self.front_weights):
            raise UserError(f"front_weights: got {list(self.front_weights)}; allowed: one or more from 0 to 1")
