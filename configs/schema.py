"""The configurations of the verbs; each field is a section with a dataclass of its own, or a plain value."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlkd.agents.algorithms import AgentConfig
from rlkd.agents.baselines.methods import METHODS, check_needs
from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.ppo.online import OnlineAgentConfig
from rlkd.agents.ppo.train import PPOConfig
from rlkd.cost import CostConfig
from rlkd.data import Goal, Preference, Range, TaskDistribution
from rlkd.data.datasets import check_dataset
from rlkd.envs.action import ControlConfig
from rlkd.envs.guard import GuardConfig
from rlkd.envs.scenario import EnvConfig, check_keep
from rlkd.errors import UserError, closest
from rlkd.hardware import load_hardware
from rlkd.io.numbers import check_finite
from rlkd.losses import LossConfig
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig


@dataclass(frozen=True)
class ComparisonConfig:
    """The comparison on held-out tasks that ends a run."""

    num_tasks: int = 128
    """Fresh tasks, the same for every method and goal."""
    keeps: tuple[float, ...] = (0.95, 0.98, 1.0)
    """Goals: accuracy floors as shares of the reference accuracy (task.reference)."""
    accuracy_weights: tuple[float, ...] = ()
    """Further goals: weights of accuracy without a floor; the first goal of all gives result.json's main entry."""

    def check(self) -> None:
        """Raise UserError for too few tasks, no goal or an impossible one."""
        if self.num_tasks < 2:
            raise UserError(f"comparison.num_tasks: got {self.num_tasks}; allowed: at least 2")
        if not all(0 < keep <= 2 for keep in self.keeps):
            raise UserError(f"comparison.keeps: got {list(self.keeps)}; allowed: above 0, at most 2")
        if not all(0 <= w <= 1 for w in self.accuracy_weights):
            raise UserError(f"comparison.accuracy_weights: got {list(self.accuracy_weights)}; allowed: 0 to 1")
        if not (self.keeps or self.accuracy_weights):
            raise UserError("comparison: got no goal; allowed: at least one of keeps or of accuracy_weights")
        for name in ("keeps", "accuracy_weights"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"comparison.{name}: got {list(values)}; allowed: each once")


@dataclass(frozen=True)
class ScenarioConfig:
    """A data set, a student structure, its teachers and cost, and how long and in which steps it trains."""

    dataset: str = "digits"
    """Name of the data set (`rlkd list`)."""
    student: StudentConfig = field(default_factory=StudentConfig)
    num_windows: int = 12
    """Decisions of one episode; each trains the student for train.steps_per_window steps."""
    warm_windows: int = 0
    """Windows of dense training under the published setting before the episode; 0 starts from fresh weights."""
    label_noise: Range | None = None
    """Share of wrong labels, in place of task.label_noise. Of two classes, more than a half turns the labels round."""
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cost: CostConfig = field(default_factory=CostConfig)


def check_chunk(chunk_students: int) -> None:
    """Raise UserError for less than one student."""
    if chunk_students < 1:
        raise UserError(f"chunk_students: got {chunk_students}; allowed: at least 1")


def _goals() -> TaskDistribution:
    return TaskDistribution(
        floor_share=0.7, limit_share=0.3, num_labels=Range(60.0, 2000.0), accuracy_weight=Range(0.3, 0.98)
    )


@dataclass(frozen=True)
class ExperimentConfig:
    """`rlkd train`: learn a policy over scenarios, choose it on others, compare it on held-out tasks of the first."""

    scenarios: tuple[ScenarioConfig, ...] = (ScenarioConfig(),)
    """What the policy is trained on, in turns; the first one gives the tasks of the comparison."""
    validation: tuple[ScenarioConfig, ...] = ()
    """Scenarios that the policy is neither trained nor reported on: the iteration that does best on them ships. Without
    any, the last iteration ships."""
    task: TaskDistribution = field(default_factory=_goals)
    """Of every scenario, each with its own data set in place of task.dataset."""
    controls: ControlConfig = field(default_factory=ControlConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    chunk_students: int = 128
    """Most students that train in lock-step as one piece of work (--workers). It belongs to the configuration because
    results depend on it by float rounding; they do not depend on the workers."""
    keep_checkpoints: int = 2
    """States of PPO that stay on the disk; with --resume it goes on from the last one that is whole."""

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        if not self.scenarios:
            raise UserError("scenarios: got none; allowed: one or more, the first for the comparison")
        for scenario in (*self.scenarios, *self.validation):
            check_dataset(scenario.dataset, "scenarios: dataset")
        check_dataset(self.task.dataset)
        if self.task.dataset != self.scenarios[0].dataset:
            raise UserError(
                f"task.dataset: got {self.task.dataset!r}, but the first scenario has {self.scenarios[0].dataset!r}; "
                "give the data sets in scenarios, and task.dataset as the first scenario's or not at all"
            )
        check_keep(self.keep_checkpoints)
        check_chunk(self.chunk_students)
        for env in (*self.envs(self.scenarios), *self.envs(self.validation)):
            env.check()
        self.search.check()
        self.ppo.check()
        self.agent.check()
        self.comparison.check()
        for scenario in self.validation:
            if scenario in self.scenarios:
                raise UserError(
                    f"validation: {scenario.dataset} with the student {list(scenario.student.widths)} is one of "
                    "scenarios, too; allowed: scenarios that the policy is not trained on"
                )
        if self.ppo.num_students * sum(scenario.num_windows for scenario in self.scenarios) < 2:
            raise UserError(
                "ppo.num_students: got 1 with one scenario of num_windows 1; allowed: at least 2 of either, to learn "
                "from"
            )

    @property
    def steps_per_window(self) -> int:
        """Optimizer steps of a window, in the mean over those of a rollout."""
        windows = sum(scenario.num_windows for scenario in self.scenarios)
        return round(sum(s.num_windows * s.train.steps_per_window for s in self.scenarios) / windows)

    def envs(self, scenarios: Sequence[ScenarioConfig]) -> list[EnvConfig]:
        """Environments of `scenarios`, which share tasks and ranges of the controls."""
        return [
            EnvConfig(
                num_windows=scenario.num_windows,
                warm_windows=scenario.warm_windows,
                task=replace(
                    self.task, dataset=scenario.dataset, label_noise=scenario.label_noise or self.task.label_noise
                ),
                student=scenario.student,
                teacher=scenario.teacher,
                train=scenario.train,
                loss=scenario.loss,
                controls=self.controls,
                cost=scenario.cost,
            )
            for scenario in scenarios
        ]


def _clean_task() -> TaskDistribution:
    return TaskDistribution(label_noise=Range(0.0, 0.0), num_labels=Range(897.0, 897.0), reference="teacher")


@dataclass(frozen=True)
class OneStudentConfig:
    """The training of one new student. Control ranges come from the policy."""

    num_windows: int = 12
    """Decisions; each trains the student for train.steps_per_window steps."""
    task: TaskDistribution = field(default_factory=_clean_task)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(num_samples=(0,)))
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    preference: Preference = field(default_factory=Preference)

    def env(self, controls: ControlConfig) -> EnvConfig:
        """Return the environment's part with the preference in its tasks."""
        return EnvConfig(
            num_windows=self.num_windows,
            task=self.task.with_preference(self.preference),
            student=self.student,
            teacher=self.teacher,
            train=self.train,
            loss=self.loss,
            controls=controls,
            cost=self.cost,
        )

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        check_finite(self)
        self.env(ControlConfig()).check()


@dataclass(frozen=True)
class DistilConfig(OneStudentConfig):
    """`rlkd distil`: distil one new student under a learned policy. Control ranges come from the policy."""

    hardware: str = ""
    """Hardware profile (cpu, gpu, edge, or a YAML file) whose channel_multiple takes the place of
    student.unit_multiple; by default none."""
    goal: Goal = field(default_factory=Goal)
    guard: GuardConfig = field(default_factory=GuardConfig)
    keep_checkpoints: int = 2
    """States of the training that stay on the disk; with --resume it goes on from the last one that is whole."""

    def env(self, controls: ControlConfig) -> EnvConfig:
        """Return the environment's part; its tasks have the goal's weights, and `with_goal` adds the rest of the goal.

        A limit in seconds needs the cost profile (`rlkd.runs.goals.with_goal`).
        """
        task = self.task.with_preference(Preference(*self.goal.weights(self.preference)))
        return replace(super().env(controls), task=task, student=self.structure())

    def structure(self) -> StudentConfig:
        """Return the student, whose kept units are rounded as the hardware profile says.

        Raises:
            UserError: there is no such profile.
        """
        if not self.hardware:
            return self.student
        return replace(self.student, unit_multiple=load_hardware(self.hardware).channel_multiple)

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        self.goal.check()
        self.guard.check()
        for name in ("floor_share", "limit_share"):
            if getattr(self.task, name):
                raise UserError(f"task.{name}: got {getattr(self.task, name):g}; allowed: 0; state a goal with --goal")
        super().check()
        check_keep(self.keep_checkpoints)


@dataclass(frozen=True)
class OnlineConfig(OneStudentConfig):
    """`rlkd train --mode online`: one long training, from which the agent learns while it goes on."""

    num_windows: int = 96
    """Decisions; each trains the student for train.steps_per_window steps."""
    agent: OnlineAgentConfig = field(default_factory=OnlineAgentConfig)
    keep_every: int = 12
    """Windows between two students that are kept on the disk."""

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        super().check()
        self.agent.check(self.num_windows)
        if self.keep_every < 1:
            raise UserError(f"keep_every: got {self.keep_every}; allowed: at least 1")


@dataclass(frozen=True)
class CompareConfig(EnvConfig):
    """`rlkd compare`: the same tasks under several controllers. What is tuned is tuned for each goal."""

    search: SearchConfig = field(default_factory=SearchConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    chunk_students: int = 128
    """Most students that train in lock-step as one piece of work (--workers). It belongs to the configuration because
    results depend on it by float rounding; they do not depend on the workers."""
    keep_checkpoints: int = 2
    """States that stay on the disk."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    methods: str = "constant,nncf,cubic"
    """Comma-separated (`rlkd list`); the others are paired with the policy, or with the first. `dense` always joins."""
    num_seeds: int = 1
    """Sets of comparison.num_tasks fresh tasks."""
    policy: str | None = None
    """Folder of the policy that method `policy` replays; its control ranges and start replace the config's."""
    blind: str | None = None
    """Folder of a second policy, for method `blind`: one that sees only what is known beforehand."""
    tune_exit: bool = False
    """Tune every student's exit threshold on validation after its training, whatever the method."""
    front_trials: int = 0
    """Trainings a task of a multi-objective search that the policy's front is compared with; 0: no such comparison."""
    front_weights: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    """Accuracy weights that make up the policy's front."""

    def method_names(self) -> list[str]:
        """`methods` as a list, each once, and `dense`, which tells what is feasible."""
        return list(dict.fromkeys([*(name.strip() for name in self.methods.split(",")), "dense"]))

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        super().check()
        check_keep(self.keep_checkpoints)
        check_chunk(self.chunk_students)
        self.search.check()
        self.comparison.check()
        self.guard.check()
        for name in self.method_names():
            if name not in METHODS:
                raise UserError(f"methods: got {name!r}; allowed: {', '.join(METHODS)}{closest(name, METHODS)}")
        check_needs(
            self.method_names(),
            has_policy=self.policy is not None,
            has_blind=self.blind is not None,
            has_teachers=self.task.num_teachers.high >= 2,
        )
        if self.num_seeds < 1:
            raise UserError(f"num_seeds: got {self.num_seeds}; allowed: at least 1")
        if self.front_trials < 0 or (self.front_trials and self.policy is None):
            raise UserError(f"front_trials: got {self.front_trials}; allowed: 0, or more with --policy")
        if not self.front_weights or not all(0 <= w <= 1 for w in self.front_weights):
            raise UserError(f"front_weights: got {list(self.front_weights)}; allowed: one or more from 0 to 1")
