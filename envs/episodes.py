"""N episodes side by side: the one place where controls meet students and become observations and rewards.

The single and the vector environment and every baseline controller go through here, so all of them train the
same students on the same batches and are scored alike. Setting a control is by position (`rlkd.envs.action`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkd.cost import Cost
from rlkd.data import Split, Task, TaskDistribution, draw_task
from rlkd.envs.action import CONTROLS, NUM_CONTROLS, decode
from rlkd.envs.observation import REFERENCES, TaskFeatures, observe
from rlkd.envs.reward import DIVERGED_SCORE, score
from rlkd.envs.scenario import EpisodeScenario
from rlkd.errors import UserError
from rlkd.students import Metrics, Population, Students, Telemetry
from rlkd.teachers.landmarks import LANDMARKS

LARGEST_SEED = 2**61  # below what torch's generators take once a purpose is added


@dataclass(frozen=True)
class Outcome:
    """What one window brought. Fields [N] unless said otherwise."""

    observation: Tensor  # [N, O]
    reward: Tensor
    terminated: Tensor  # bool, the horizon is reached or the student diverged
    diverged: Tensor  # bool
    score: Tensor
    metrics: Metrics  # on validation
    cost: Cost
    telemetry: Telemetry


class Episodes:
    """N students in training, each with its own task, controls and clock."""

    def __init__(self, scenario: EpisodeScenario, num_students: int, tasks: TaskDistribution | None = None) -> None:
        self.scenario = scenario
        self.num_students = num_students
        self.students: Students = scenario.students(num_students)
        self.tasks: list[Task] = []
        self.position = torch.zeros(num_students, NUM_CONTROLS)
        self._distribution = tasks or scenario.config.task
        self._held = scenario.plan.begin(num_students)  # [N, K, 9], every student's plan as far as it is decided
        self._window = torch.zeros(num_students)
        self._score = torch.zeros(num_students)
        self._landmarks = torch.zeros(num_students, len(LANDMARKS))
        self._capacity, self._savings = scenario.capacity, reference_savings(scenario)

    def reset(self, seeds: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """Begin the episodes of `seeds` and return the observation [N, O], which is meant for those episodes alone.

        Args:
            seeds: one task a student, for all N or for those at `rows`.
            rows: [len(seeds)] int64.
        """
        where = torch.arange(self.num_students) if rows is None else rows
        num_teachers = len(self.scenario.signals.accuracy)
        fresh = [draw_task(seed, self._distribution, self.scenario.data, num_teachers) for seed in seeds]
        self.students.reset(fresh, where)
        tasks = dict(zip(where.tolist(), fresh, strict=True))
        self.tasks = [tasks.get(i) or self.tasks[i] for i in range(self.num_students)]
        self._window[where] = 0.0
        self._held[where] = self.scenario.plan.begin(len(where))
        self.position[where] = self.start[where]
        self._landmarks[where] = self.scenario.signals.landmarks(self.scenario.data, fresh)
        self._features = self._task_features()
        self.students.set_controls(decode(self.position, self.scenario.config.controls, self.scenario.data.num_classes))
        metrics, cost, now = self.evaluate("validation")
        self._score = self._score.clone()
        self._score[where] = now[where]  # the others keep theirs: their next reward begins where their last one ended
        observation = self._observe(metrics, cost, torch.zeros(self.num_students), None)
        # not those of the others, who may stand at a phase that was decided on what they really looked like then
        self._held[where] = self._revised(observation)[where]
        return observation

    @property
    def start(self) -> Tensor:
        """[N, 9], what the scenario's plan has for each student's next window; what its action changes."""
        return self.scenario.plan.now(self._held, self._window, self.scenario.config.num_windows)

    def _revised(self, observation: Tensor) -> Tensor:
        return self.scenario.plan.revise(self._held, observation, self._window, self.scenario.config.num_windows)

    def step(self, position: Tensor) -> Outcome:
        """Train one window with the controls at `position` [N, 9]; the reward is what that window changed."""
        controls = decode(position, self.scenario.config.controls, self.scenario.data.num_classes)
        telemetry = self.students.train_window(controls)
        self.position = position.clone()
        self._window += 1
        metrics, cost, now = self.evaluate("validation")
        now = torch.where(telemetry.diverged, torch.full_like(now, DIVERGED_SCORE), now)
        reward = now - self._score
        self._score = now
        done = (self._window >= self.scenario.config.num_windows) | telemetry.diverged
        observation = self._observe(metrics, cost, reward, telemetry)
        self._held = self._revised(observation)
        return Outcome(observation, reward, done, telemetry.diverged, now, metrics, cost, telemetry)

    def copy_rows(self, sources: Tensor) -> None:
        """Student i goes on from where student `sources[i]` ([N] int64) is, on its own task and batches.

        For population-based training; the copies must be of students whose tasks are alike.

        Raises:
            ValueError: there is one student, which has nobody to copy.
        """
        if not isinstance(self.students, Population):
            raise ValueError("copy_rows: got one student; allowed: a population of at least two")
        self.students.copy_rows(sources)
        self.position, self._score = self.position[sources], self._score[sources]

    def training_state(self) -> dict[str, Tensor]:
        """Copies of all that `load_training_state` needs to go on from here."""
        own = {"position": self.position, "held": self._held, "window": self._window, "score": self._score}
        state = {name: tensor.clone() for name, tensor in own.items()}
        state["tasks"] = torch.tensor([task.seed for task in self.tasks])  # [N] int64
        return {**state, **{f"students.{name}": t for name, t in self.students.training_state().items()}}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state` of as many students in the same scenario.

        Raises:
            UserError: a task's seed or a random source is none.
        """
        num_teachers, seeds = len(self.scenario.signals.accuracy), state["tasks"].tolist()
        if not all(0 <= seed < LARGEST_SEED for seed in seeds):
            raise UserError(f"training state: a task's seed is {min(seeds)} or {max(seeds)}; allowed: 0 to below 2**61")
        self.tasks = [draw_task(seed, self._distribution, self.scenario.data, num_teachers) for seed in seeds]
        self.students.reset(self.tasks)
        begin = "students."
        try:
            mine = {name.removeprefix(begin): t for name, t in state.items() if name.startswith(begin)}
            self.students.load_training_state(mine)
        except RuntimeError as error:
            raise UserError(f"training state: a random source cannot be restored ({error!s:.80})") from error
        self.position, self._window = state["position"].clone(), state["window"].clone()
        self._held, self._score = state["held"].clone(), state["score"].clone()
        self._landmarks = self.scenario.signals.landmarks(self.scenario.data, self.tasks)
        self._features = self._task_features()

    def set_exit(self, exit_position: Tensor) -> None:
        """Move the exit control to `exit_position` [N] without training; nothing else changes."""
        self.position = self.position.clone()
        self.position[:, CONTROLS.index("exit_threshold")] = exit_position
        controls = decode(self.position, self.scenario.config.controls, self.scenario.data.num_classes)
        self.students.set_exit(controls.exit_threshold)

    def evaluate(self, split: Split) -> tuple[Metrics, Cost, Tensor]:
        """Metrics, cost and score [N] of the students as they are."""
        metrics = self.students.evaluate(split)
        threshold = decode(self.position, self.scenario.config.controls, self.scenario.data.num_classes).exit_threshold
        cost = self.scenario.cost(metrics.kept, metrics.exit_rates, threshold)
        return metrics, cost, score(metrics.accuracy, cost, self._features.preference)

    def _observe(self, metrics: Metrics, cost: Cost, change: Tensor, telemetry: Telemetry | None) -> Tensor:
        scenario = self.scenario
        return observe(
            features=self._features,
            progress=self._window / scenario.config.num_windows,
            position=self.position,
            temperature=decode(self.position, scenario.config.controls, scenario.data.num_classes).temperature,
            score=self._score,
            score_change=change,
            metrics=metrics,
            cost=cost,
            telemetry=telemetry,
            group_sizes=scenario.group_sizes,
            num_classes=scenario.data.num_classes,
            num_train=len(scenario.data.splits["train"]),
            capacity=self._capacity,
            savings=self._savings,
        )

    def _task_features(self) -> TaskFeatures:
        signals = self.scenario.signals
        teachers = [list(task.teachers) for task in self.tasks]  # figures of several are their means
        agreement = [
            torch.stack([signals.agreement(teacher, task.samples, task.labels) for teacher in task.teachers]).mean()
            for task in self.tasks
        ]
        return TaskFeatures(
            teacher_accuracy=torch.stack([signals.accuracy[some].mean() for some in teachers]),
            teacher_entropy=torch.stack([signals.entropy[some].mean() for some in teachers]),
            teacher_label_agreement=torch.stack(agreement),
            num_labels=torch.tensor([float(len(task.samples)) for task in self.tasks]),
            landmarks=self._landmarks,
            preference=torch.tensor([task.preference for task in self.tasks]),
        )


def reference_savings(scenario: EpisodeScenario) -> Tensor:
    """[6], in the order of `SAVINGS`: what the student would save by the cost model, whatever it has learned."""
    sizes = torch.tensor(scenario.group_sizes, dtype=torch.float32)  # [G]
    inputs = torch.arange(len(sizes)) == 0
    first = torch.eye(scenario.num_exits)[:1]  # [1, E], all leave at the first
    always = torch.tensor([1.0 / scenario.data.num_classes])
    costs = []
    for feature_keep, unit_keep in REFERENCES.values():
        kept = (sizes * torch.where(inputs, feature_keep, unit_keep)).round().clamp_min(1.0)
        costs.append(scenario.cost(kept[None], first, always))
    return torch.cat([1 - cost.latency_ratio for cost in costs] + [1 - cost.energy_ratio for cost in costs])
