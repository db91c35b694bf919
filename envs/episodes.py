"""N episodes side by side: the one place where controls meet students and become observations and rewards.

The single and the vector environment and every baseline go through here, so all of them train the same students on the
same batches and are scored alike. Controls are set by unit controls u (`rlkd.envs.action`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.compression.selection import num_kept
from rlkd.cost import Cost
from rlkd.data import Split, Task, TaskDistribution, draw_task
from rlkd.envs.action import CONTROLS, EXIT_KINDS, NUM_CONTROLS, decode, exit_kind, whole
from rlkd.envs.limits import must_leave_first, within_limits
from rlkd.envs.observation import PROBES, REFERENCES, Snapshot, TaskFeatures, observe, unknown_observations
from rlkd.envs.reward import score, worst_score
from rlkd.envs.scenario import EpisodeScenario
from rlkd.errors import UserError
from rlkd.students import Controls, Metrics, Population, Students, Telemetry
from rlkd.teachers.landmarks import LANDMARKS

CAUTION = 0.5  # standard errors; see `cautious`
SURE = 1.0  # standard errors; see `Episodes.confirm`
CLEAR = 3.0  # standard errors; see `Episodes.clear_floors`
LARGEST_SEED = 2**61  # below what torch's generators take once a purpose is added


@dataclass(frozen=True)
class Outcome:
    """Result of one window. Fields are [N] unless stated otherwise."""

    observation: Tensor  # [N, O]
    reward: Tensor
    terminated: Tensor  # bool, the horizon is reached or the student diverged
    diverged: Tensor  # bool
    score: Tensor
    floor: Tensor  # least validation accuracy that meets the goal; 0 for no floor
    margin: Tensor  # validation accuracy less the floor, or less the reference accuracy where there is no floor
    metrics: Metrics  # on validation
    cost: Cost
    telemetry: Telemetry


class Confirmed(NamedTuple):
    """What students reach on the samples that confirm a window, [N] each."""

    accuracy: Tensor
    score: Tensor
    floor: Tensor  # raised by CAUTION standard errors
    sure_floor: Tensor  # raised by SURE standard errors


def merge_rows(old: Mapping[str, Tensor], new: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the training state `old` with the students at `rows` ([N] bool) from `new`, or `new` if `old` is empty.

    One student's state is taken as a whole: not all of its tensors have a leading dimension.
    """
    if not old or len(rows) == 1:
        return dict(new if rows.any() or not old else old)
    return {name: torch.where(rows.view(-1, *(1,) * (t.ndim - 1)), new[name], t) for name, t in old.items()}


def cautious(floors: Tensor, num_samples: int, caution: float = CAUTION) -> Tensor:
    """Raise the validation floors by `caution` standard errors of an accuracy on `num_samples` samples.

    A student that exactly reaches a floor on validation misses it on test half of the time. No floor is raised above 1.

    Args:
        floors: [N, 2], on validation and test; 0 for no floor.
        num_samples: of the validation split that are evaluated.
        caution: number of standard errors.
    """
    error = standard_error(floors[:, 0], num_samples)
    highest = floors[:, 0].clamp_min(1.0)  # a floor that can be met stays so
    return torch.stack([torch.minimum(floors[:, 0] + caution * error, highest), floors[:, 1]], dim=-1)


def standard_error(accuracy: Tensor, num_samples: int) -> Tensor:
    """[N]: the standard error of an accuracy [N] that is measured on `num_samples` samples."""
    reached = accuracy.clamp(0.0, 1.0)
    return (reached * (1.0 - reached) / num_samples).sqrt()


class Episodes:
    """N students in training, each with its own task, controls and clock."""

    def __init__(self, scenario: EpisodeScenario, num_students: int, tasks: TaskDistribution | None = None) -> None:
        self.scenario = scenario
        self.num_students = num_students
        self.students: Students = scenario.students(num_students)
        self.tasks: list[Task] = []
        self.u = torch.zeros(num_students, NUM_CONTROLS)  # unit controls now
        self.reference = torch.zeros(num_students, 3)  # reference accuracies, as the scenario orders them
        self._distribution = tasks or scenario.config.task
        self._window = torch.zeros(num_students)
        self._score = torch.zeros(num_students)
        self._threshold = torch.ones(num_students)  # of the exits, as they are now
        self._landmarks = torch.zeros(num_students, len(LANDMARKS))
        self._previous = torch.zeros(num_students, 1 + scenario.num_exits)  # see `Snapshot.previous`
        self._savings = reference_savings(scenario)

    def reset(
        self, seeds: Sequence[int], rows: Tensor | None = None, goal_seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Begin the episodes of `seeds` and return the observation [N, O], which is meant for those episodes alone.

        Args:
            seeds: one task a student, for all N or for those at `rows`.
            rows: [len(seeds)] int64.
            goal_seeds: one a task, of its goal; by default `seeds`.
        """
        where = torch.arange(self.num_students) if rows is None else rows
        fresh = [self._draw(seed, goal) for seed, goal in zip(seeds, goal_seeds or seeds, strict=True)]
        self.students.reset(fresh, where)
        self.scenario.warm_start(self.students, fresh, where)
        tasks = dict(zip(where.tolist(), fresh, strict=True))
        self.tasks = [tasks.get(i) or self.tasks[i] for i in range(self.num_students)]
        self._window[where] = 0.0
        self.reference[where] = self.scenario.references(fresh)
        self._landmarks[where] = self.scenario.signals.landmarks(self.scenario.data, fresh)
        self._features = self._task_features()
        self.u[where] = within_limits(self.start, self.limits, self.scenario)[where]
        metrics, cost, now = self._settle()
        self._score = self._score.clone()
        self._score[where] = now[where]  # scores of the others stay: their next reward begins there
        return self._observe(metrics, cost, torch.zeros(self.num_students), None)

    @property
    def unknown(self) -> Tensor:
        """[O] bool, see `unknown_observations`."""
        return unknown_observations(self.scenario.num_exits, self.scenario.group_sizes)

    @property
    def start(self) -> Tensor:
        """[N, 12], the setting that actions change."""
        return self.scenario.start.expand(self.num_students, -1)

    @property
    def score(self) -> Tensor:
        """[N], J on validation after the last window; after `reset` before the first."""
        return self._score

    @property
    def window(self) -> Tensor:
        """[N], windows done."""
        return self._window

    @property
    def floors(self) -> Tensor:
        """[N, 2], least accuracy on validation and test that meets the goal; 0 for no floor.

        See `cautious`.
        """
        return cautious(self._asked, self.students.num_evaluated("validation"))

    @property
    def _asked(self) -> Tensor:
        """[N, 2], floors before caution."""
        return self.reference[:, :2] * torch.tensor([task.keep for task in self.tasks])[:, None]

    @property
    def threshold(self) -> Tensor:
        """[N], exit thresholds as they are now."""
        return self._threshold

    @property
    def latency_limit(self) -> Tensor:
        """[N], greatest latency ratio that the goal allows; inf for no limit."""
        return self.limits[:, 0]

    @property
    def limits(self) -> Tensor:
        """[N, 4], greatest cost ratios that the goals allow, in the order of COSTS; inf for no limit."""
        return self._features.limits

    def step(self, u: Tensor) -> Outcome:
        """Train one window with the unit controls `u` [N, 12]; the reward is what that window changed.

        Raises:
            ValueError: a value that is not finite.
        """
        if not torch.isfinite(u).all():
            bad = [CONTROLS[i] for i in range(NUM_CONTROLS) if not torch.isfinite(u[:, i]).all()]
            raise ValueError(f"step: {', '.join(bad)} is not finite; allowed: 0 to 1")
        self.u = within_limits(u.clone(), self.limits, self.scenario)
        telemetry = self.students.train_window(self._controls())
        self._window += 1
        metrics, cost, now = self._settle()
        now = torch.where(telemetry.diverged, worst_score(self.floors[:, 0]), now)
        reward = now - self._score
        self._score = now
        done = (self._window >= self.scenario.config.num_windows) | telemetry.diverged
        observation = self._observe(metrics, cost, reward, telemetry)
        margin = metrics.accuracy - self._features.anchor
        return Outcome(
            observation=observation,
            reward=reward,
            terminated=done,
            diverged=telemetry.diverged,
            score=now,
            floor=self.floors[:, 0],
            margin=margin,
            metrics=metrics,
            cost=cost,
            telemetry=telemetry,
        )

    def _controls(self) -> Controls:
        return decode(self.u, self.scenario.config.controls, self.scenario.data.num_classes)

    def _settle(self) -> tuple[Metrics, Cost, Tensor]:
        """Select inputs and units, choose the exits, and evaluate on validation.

        By the kind `first`, all samples leave at the first exit if its accuracy meets the floor, or if a cost limit
        leaves nothing else, else at the end.
        """
        controls = self._controls()
        self.students.set_controls(controls)
        self._threshold = controls.exit_threshold
        metrics = self.students.evaluate("validation")
        asks_first = exit_kind(self.u) == EXIT_KINDS.index("first")
        may_fail = asks_first & ~must_leave_first(self.u, self.limits, self.scenario)
        fails = may_fail & (metrics.exit_accuracy[:, 0] < self.floors[:, 0])
        if self.scenario.num_exits > 1 and fails.any():
            self._threshold = torch.where(fails, torch.ones_like(self._threshold), self._threshold)
            self.students.set_exit(self._threshold)
            last = F.one_hot(torch.full((self.num_students,), self.scenario.num_exits - 1), self.scenario.num_exits)
            metrics = replace(
                metrics,
                accuracy=torch.where(fails, metrics.exit_accuracy[:, -1], metrics.accuracy),
                exit_rates=torch.where(fails[:, None], last.to(metrics.exit_rates), metrics.exit_rates),
            )
        cost = self.scenario.cost(metrics.kept, metrics.exit_rates, self._threshold)
        return metrics, cost, self._scored(metrics.accuracy, cost, 0)

    def _scored(self, accuracy: Tensor, cost: Cost, column: int) -> Tensor:
        return score(accuracy, cost, self._features.preference, self.floors[:, column])

    def _draw(self, seed: int, goal_seed: int) -> Task:
        num_teachers = len(self.scenario.signals.accuracy)
        return draw_task(seed, self._distribution, self.scenario.data, num_teachers, goal_seed=goal_seed)

    def copy_rows(self, sources: Tensor) -> None:
        """Continue student i from the state of student `sources[i]` ([N] int64), on its own task and batches.

        For population-based training; the copies must be of students whose tasks are alike.

        Raises:
            ValueError: there is one student, so that there is nothing to copy.
        """
        if not isinstance(self.students, Population):
            raise ValueError("copy_rows: got one student; allowed: a population of at least two")
        self.students.copy_rows(sources)
        self.u, self._score = self.u[sources], self._score[sources]
        self._threshold, self._previous = self._threshold[sources], self._previous[sources]

    def training_state(self) -> dict[str, Tensor]:
        """Return copies of all that `load_training_state` needs to go on from here."""
        own = {"u": self.u, "window": self._window, "score": self._score, "threshold": self._threshold}
        own["previous"] = self._previous
        state = {name: tensor.clone() for name, tensor in own.items()}
        state["tasks"] = torch.tensor([[task.seed, task.goal_seed] for task in self.tasks])  # [N, 2] int64
        return {**state, **{f"students.{name}": t for name, t in self.students.training_state().items()}}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state` of as many students in the same scenario.

        Raises:
            UserError: a task's seed or a random source is none.
        """
        seeds = state["tasks"].tolist()
        flat = [seed for pair in seeds for seed in pair]
        if not all(0 <= seed < LARGEST_SEED for seed in flat):
            raise UserError(f"training state: a task's seed is {min(flat)} or {max(flat)}; allowed: 0 to below 2**61")
        self.tasks = [self._draw(*pair) for pair in seeds]
        self.students.reset(self.tasks)
        begin = "students."
        try:
            mine = {name.removeprefix(begin): t for name, t in state.items() if name.startswith(begin)}
            self.students.load_training_state(mine)
        except RuntimeError as error:
            raise UserError(f"training state: a random source cannot be restored ({error!s:.80})") from error
        self.u, self._window = state["u"].clone(), state["window"].clone()
        self._score, self._threshold = state["score"].clone(), state["threshold"].clone()
        self._previous = state["previous"].clone()
        self.reference = self.scenario.references(self.tasks)
        self._landmarks = self.scenario.signals.landmarks(self.scenario.data, self.tasks)
        self._features = self._task_features()

    def restore(self, state: Mapping[str, Tensor], rows: Tensor) -> None:
        """Put the students at `rows` ([N] bool) back to a `training_state` of these episodes.

        Clocks go on, and the samples drawn since then are spent: a window trained anew draws others.
        """
        begin = "students."
        if rows.any():
            now = self.students.training_state()
            kept = {name.removeprefix(begin): t for name, t in state.items() if name.startswith(begin)}
            kept |= {name: now[name] for name in ("batches", "step") if name in now}
            self.students.load_training_state(merge_rows(now, kept, rows))
        self.u = torch.where(rows[:, None], state["u"], self.u)
        self._score = torch.where(rows, state["score"], self._score)
        self._threshold = torch.where(rows, state["threshold"], self._threshold)

    def leave_nothing_out(self) -> tuple[Tensor, Tensor]:
        """Keep all units and inputs, let no sample leave early; returns accuracy and score [N] on validation.

        Limits on costs come first: what they allow is kept.
        """
        self.u = within_limits(whole(self.u), self.limits, self.scenario)
        metrics, _, now = self._settle()
        return metrics.accuracy, now

    def observe_now(self) -> Tensor:
        """[N, O], the present observation, as if the last window had changed nothing."""
        metrics, cost, _ = self.evaluate("validation")
        return self._observe(metrics, cost, torch.zeros(self.num_students), None)

    def set_exit(self, threshold: Tensor) -> None:
        """Set the exit threshold [N] without training; nothing else changes."""
        self._threshold = threshold.clone()
        self.students.set_exit(threshold)

    def evaluate(self, split: Split) -> tuple[Metrics, Cost, Tensor]:
        """Return metrics, cost and score [N] of the students as they are."""
        metrics = self.students.evaluate(split)
        cost = self.scenario.cost(metrics.kept, metrics.exit_rates, self._threshold)
        return metrics, cost, self._scored(metrics.accuracy, cost, 1 if split == "test" else 0)

    @property
    def clear_floors(self) -> Tensor:
        """[N]: accuracies on the evaluated samples from which a window needs no confirmation; they may be above 1.

        Infinite without a floor, where J has the accuracy in it, and for students that confirm nothing.
        """
        floor = self._asked[:, 0]
        clear = floor + CLEAR * standard_error(floor, self.students.num_evaluated("validation"))
        return torch.where((floor > 0) & self.students.confirms, clear, torch.inf)

    def confirm(self) -> Confirmed | None:
        """Look at the students on the samples that confirm a window; None for students that have no such samples.

        A window that is the best of many on few samples owes part of that to chance.
        """
        confirmed = self.students.confirm()
        if confirmed is None:
            return None
        metrics, num_samples = confirmed
        keep = torch.tensor([task.keep for task in self.tasks])  # [N]
        floors = (self.reference[:, 2:] * keep[:, None]).expand(-1, 2)  # [N, 2]
        floor, sure = (cautious(floors, num_samples, caution)[:, 0] for caution in (CAUTION, SURE))
        cost = self.scenario.cost(metrics.kept, metrics.exit_rates, self._threshold)
        value = score(metrics.accuracy, cost, self._features.preference, floor)
        return Confirmed(metrics.accuracy, value, floor, sure)

    def _probes(self, metrics: Metrics) -> dict[str, Tensor]:
        """Return the accuracy that each student would lose now, by the names of PROBES; [N] each."""
        controls = self._controls()

        def accuracy(inputs: float, units: float) -> Tensor:
            exits = self.students.probe(controls.feature_keep * inputs, controls.unit_keep * units)  # [N, E]
            return (exits * metrics.exit_rates).sum(-1)

        now = accuracy(1.0, 1.0)
        return {name: now - accuracy(*shares) for name, shares in PROBES.items()}

    def _observe(self, metrics: Metrics, cost: Cost, change: Tensor, telemetry: Telemetry | None) -> Tensor:
        snapshot = Snapshot(
            windows_done=self._window,
            num_windows=self.scenario.config.num_windows,
            u=self.u,
            score_change=change,
            metrics=metrics,
            previous=self._previous if telemetry else None,
            cost=cost,
            probes=self._probes(metrics),
            telemetry=telemetry,
        )
        self._previous = torch.cat([metrics.accuracy[:, None], metrics.exit_accuracy], dim=-1)
        return observe(
            self._features,
            snapshot,
            self._savings,
            group_sizes=self.scenario.group_sizes,
            num_classes=self.scenario.data.num_classes,
        )

    def _task_features(self) -> TaskFeatures:
        signals = self.scenario.signals
        teachers = [list(task.teachers) for task in self.tasks]  # metrics of several are their means
        agreement = [
            torch.stack([signals.agreement(teacher, task.samples, task.labels) for teacher in task.teachers]).mean()
            for task in self.tasks
        ]
        has_floor = torch.tensor([task.keep > 0 for task in self.tasks])
        return TaskFeatures(
            teacher_accuracy=torch.stack([signals.accuracy[some].mean() for some in teachers]),
            teacher_label_agreement=torch.stack(agreement),
            landmarks=self._landmarks,
            preference=torch.tensor([task.preference for task in self.tasks]),
            anchor=torch.where(has_floor, self.floors[:, 0], self.reference[:, 0]),
            has_floor=has_floor,
            limits=torch.tensor([task.limits for task in self.tasks]),
        )


def reference_savings(scenario: EpisodeScenario) -> Tensor:
    """[6], in the order of `SAVINGS`: what the student would save by the cost model, whatever it has learned."""
    first = torch.eye(scenario.num_exits)[:1]  # [1, E], all leave at the first
    always = torch.tensor([1.0 / scenario.data.num_classes])
    costs = []
    for feature_keep, unit_keep in REFERENCES.values():
        inputs = num_kept(torch.tensor([[feature_keep]]), scenario.group_sizes[0])  # [1, 1]
        units = scenario.units_kept(torch.tensor([unit_keep]))  # [1, G - 1]
        costs.append(scenario.cost(torch.cat([inputs, units], dim=-1), first, always))
    return torch.cat([1 - cost.latency_ratio for cost in costs] + [1 - cost.energy_ratio for cost in costs])
