"""What a student may be asked to learn, and under which conditions: the distribution of tasks.

A task is fully determined by its integer seed and the distribution, so that any two controllers can be
given the same task: the same teacher, the same corrupted labels, the same initial weights, the same batches.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data.datasets import check_dataset
from rlkd.data.samples import Labelled
from rlkd.errors import UserError


@dataclass(frozen=True)
class Range:
    """A closed interval from which a task's property is drawn uniformly; `low == high` fixes it."""

    low: float = 0.0
    high: float = 1.0

    def check(self, name: str, lowest: float, highest: float) -> None:
        """Raise UserError unless lowest <= low <= high <= highest."""
        if not lowest <= self.low <= self.high <= highest:
            raise UserError(
                f"{name}: got low {self.low:g}, high {self.high:g}; allowed: {lowest:g} <= low <= high <= {highest:g}"
            )

    def draw(self, generator: torch.Generator) -> float:
        """One uniform draw."""
        return self.low + (self.high - self.low) * torch.rand((), generator=generator, dtype=torch.float64).item()


COSTS = ("latency", "energy", "macs", "size")  # what a goal can limit
LATENCY_SHARE = 0.75  # of what accuracy leaves of the weights; energy takes the rest


def reference_accuracy(reference: str) -> float | None:
    """Return the accuracy that `reference` states as a number; None for `dense` and `teacher`.

    Raises:
        UserError: another word, or a number outside (0, 1].
    """
    if reference in ("dense", "teacher"):
        return None
    try:
        value = float(reference)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise UserError(f"goal.reference: got {reference!r}; allowed: teacher, dense, or an accuracy in (0, 1]")
    return value


@dataclass(frozen=True)
class Preference:
    """The user's weights on accuracy, latency and energy. They need not sum to one: they are normalised.

    Latency and energy left out take what accuracy leaves, in the proportion 3 : 1.

    Example:
        >>> Preference(accuracy=0.5).weights()
        (0.5, 0.375, 0.125)
    """

    accuracy: float | None = None
    """Weight of the accuracy term; by default 0.6, or 0 where the goal has an accuracy floor."""
    latency: float | None = None
    """Weight of the latency term; by default three quarters of what accuracy leaves of 1."""
    energy: float | None = None
    """Weight of the energy term; by default one quarter of what accuracy leaves of 1."""

    @property
    def is_given(self) -> bool:
        """Whether any weight was given."""
        return not (self.accuracy is None and self.latency is None and self.energy is None)

    def weights(self, default_accuracy: float = 0.6) -> tuple[float, float, float]:
        """(accuracy, latency, energy), summing to one.

        Args:
            default_accuracy: weight of accuracy where none was given.

        Raises:
            UserError: a negative weight, an accuracy above 1 with nothing else given, or all zero.
        """
        accuracy = default_accuracy if self.accuracy is None else self.accuracy
        rest = 1.0 - accuracy
        latency = LATENCY_SHARE * rest if self.latency is None else self.latency
        energy = (1.0 - LATENCY_SHARE) * rest if self.energy is None else self.energy
        total = accuracy + latency + energy
        if not (min(accuracy, latency, energy) >= 0.0 and 0.0 < total < float("inf")):
            raise UserError(
                f"preference: got accuracy {accuracy:g}, latency {latency:g}, energy {energy:g}; "
                "allowed: finite weights >= 0 that are not all 0 (accuracy in [0, 1] when it stands alone)"
            )
        return accuracy / total, latency / total, energy / total


@dataclass(frozen=True)
class TaskDistribution:
    """From what tasks are drawn. Every student gets its own draw."""

    dataset: str = "digits"
    """Name of the data set (`rlkd list`)."""
    label_noise: Range = field(default_factory=lambda: Range(0.0, 0.8))
    """Share of training labels replaced by a uniformly drawn wrong class."""
    num_labels: Range = field(default_factory=lambda: Range(60.0, 897.0))
    """How many training samples the student gets at all, before class_imbalance; the others do not exist for it."""
    accuracy_weight: Range = field(default_factory=lambda: Range(0.3, 0.95))
    """Weight of accuracy in the student's preference."""
    latency_share: Range = field(default_factory=lambda: Range(0.5, 1.0))
    """Share of latency in what accuracy leaves of the preference; energy takes the rest."""
    class_imbalance: Range = field(default_factory=lambda: Range(0.0, 0.0))
    """1 less the share of its num_labels samples that the rarest class keeps; the other classes lie evenly between on a
    log scale, in an order drawn for each task. 0 keeps all; 0.9 makes the rarest a tenth of the commonest."""
    num_teachers: Range = field(default_factory=lambda: Range(1.0, 1.0))
    """How many teachers the student learns from, rounded, all different: from the mean of their answers, unless a
    method weighs them."""
    floor_share: float = 0.0
    """Share of tasks whose goal is an accuracy floor; their accuracy weight is 0. The others have weights alone."""
    keep: Range = field(default_factory=lambda: Range(0.9, 1.02))
    """Floor as a share of the reference accuracy."""
    limit_share: float = 0.0
    """Share of the tasks without a floor that have a latency limit; they weigh accuracy alone."""
    latency_limit: Range = field(default_factory=lambda: Range(0.2, 0.8))
    """Limit on the latency ratio to the dense student."""
    reference: str = "dense"
    """What a floor is a share of: `dense` (the same student, trained dense under the published setting), `teacher`, or
    a number in (0, 1]."""

    def check(self) -> None:
        """Raise UserError for an unknown data set or an impossible range."""
        check_dataset(self.dataset)
        self.label_noise.check("task.label_noise", 0.0, 1.0)
        self.num_labels.check("task.num_labels", 1, float("inf"))
        self.accuracy_weight.check("task.accuracy_weight", 0.0, 1.0)
        self.latency_share.check("task.latency_share", 0.0, 1.0)
        self.class_imbalance.check("task.class_imbalance", 0.0, 1.0)
        self.num_teachers.check("task.num_teachers", 1, float("inf"))
        self.keep.check("task.keep", 0.0, 2.0)
        self.latency_limit.check("task.latency_limit", 0.0, float("inf"))
        for name in ("floor_share", "limit_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"task.{name}: got {getattr(self, name):g}; allowed: 0 to 1")
        reference_accuracy(self.reference)

    def with_preference(self, preference: Preference) -> "TaskDistribution":
        """Return the distribution with a fixed preference; all other draws of a seed stay the same."""
        accuracy, latency, energy = preference.weights()
        share = latency / (latency + energy) if latency + energy > 0 else 0.0
        return replace(
            self,
            accuracy_weight=Range(accuracy, accuracy),
            latency_share=Range(share, share),
            floor_share=0.0,
            limit_share=0.0,
        )

    def with_keep(self, keep: float, latency_share: float = LATENCY_SHARE) -> "TaskDistribution":
        """Return the distribution with a fixed floor of `keep` times the reference accuracy for all tasks."""
        share = Range(latency_share, latency_share)
        return replace(self, floor_share=1.0, keep=Range(keep, keep), latency_share=share)

    def with_goal(self, goal: "TaskGoal", reference: str) -> "GoalDistribution":
        """Return the distribution with one goal for all tasks; all other draws of a seed stay the same."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(TaskDistribution)}
        return GoalDistribution(**values | {"reference": reference}, goal=goal)

    def draw_goal(self, seed: int, accuracy: float, latency: float) -> "TaskGoal":
        """Draw the goal of a task; `accuracy` and `latency` are its weights without a floor or a limit."""
        g = task_generator(seed, "goal")
        kind, keep = torch.rand((), generator=g).item(), self.keep.draw(g)
        limit = self.latency_limit.draw(g)
        share = latency / (1.0 - accuracy) if accuracy < 1.0 else LATENCY_SHARE
        if kind < self.floor_share:
            return TaskGoal((0.0, share, 1.0 - share), keep=keep)
        rest = (kind - self.floor_share) / max(1e-12, 1.0 - self.floor_share)
        if rest < self.limit_share:
            return TaskGoal((1.0, 0.0, 0.0), latency_limit=limit)
        return TaskGoal((accuracy, latency, max(0.0, 1.0 - accuracy - latency)))


@dataclass(frozen=True)
class TaskGoal:
    """What one student is asked for. Limits are ratios to the dense student; inf: no limit."""

    preference: tuple[float, float, float]  # accuracy, latency, energy; sums to one
    keep: float = 0.0  # floor as a share of the reference accuracy; 0: no floor
    latency_limit: float = math.inf
    energy_limit: float = math.inf
    macs_limit: float = math.inf
    size_limit: float = math.inf

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """In the order of COSTS."""
        return self.latency_limit, self.energy_limit, self.macs_limit, self.size_limit


@dataclass(frozen=True)
class GoalDistribution(TaskDistribution):
    """Tasks that all have one goal."""

    goal: TaskGoal = TaskGoal((0.6, 0.3, 0.1))

    def draw_goal(self, seed: int, accuracy: float, latency: float) -> TaskGoal:
        """Return the one goal."""
        return self.goal


@dataclass(frozen=True)
class Task:
    """One draw: what a single student is given."""

    seed: int
    teacher: int
    label_noise: float
    samples: Tensor  # [L] int64, indices into the data set, all from the train split
    labels: Tensor  # [L] int64, corrupted labels of those samples
    preference: tuple[float, float, float]  # accuracy, latency, energy; sums to one
    class_imbalance: float
    others: tuple[int, ...] = ()  # further teachers
    goal_seed: int = 0
    keep: float = 0.0  # floor as a share of the reference accuracy; 0: no floor
    latency_limit: float = math.inf  # on the ratio to the dense student, as are the limits below
    energy_limit: float = math.inf
    macs_limit: float = math.inf
    size_limit: float = math.inf

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """Limits on cost ratios in the order of COSTS; inf: no limit."""
        return self.latency_limit, self.energy_limit, self.macs_limit, self.size_limit

    @property
    def teachers(self) -> tuple[int, ...]:
        """All teachers, k of them."""
        return (self.teacher, *self.others)


def task_generator(seed: int, purpose: str) -> torch.Generator:
    """Return an independent random source for one purpose ("task", "parameters", "batches" or "goal") of one task."""
    if purpose == "goal":  # came later; seeds of the other purposes are below 2**63
        return torch.Generator().manual_seed(seed + 2**63)
    offset = {"task": 0, "parameters": 1, "batches": 2}[purpose]
    return torch.Generator().manual_seed(seed * 3 + offset)


def thin_classes(labels: Tensor, order: Tensor, imbalance: float) -> Tensor:
    """Which samples stay so that classes are geometrically rarer along `order`.

    Of n samples whose class stands at place r of C (from 0), the first round(n (1 - imbalance)^(r / (C - 1))) stay, at
    least one: the ratio of the last class to the first is 1 - imbalance where they were equally common before. The
    long-tailed sets of Cui et al. 2019 (class-balanced loss) are thinned the same way.

    Args:
        labels: [L] int64, in the random order in which samples were drawn.
        order: [C], a permutation of the classes, the commonest first.
        imbalance: in [0, 1].

    Returns:
        [L] bool.
    """
    if imbalance == 0.0:  # all stay; a language model's vocabulary would be too many classes to count for nothing
        return torch.ones_like(labels, dtype=torch.bool)
    shares = (1.0 - imbalance) ** (torch.arange(len(order), dtype=torch.float64) / (len(order) - 1))  # [C], by place
    counts = torch.bincount(labels, minlength=len(order))[order]  # [C], by place
    kept = torch.empty_like(order)
    kept[order] = (counts * shares).round().long().clamp_min(1)  # [C], by class
    one_hot = F.one_hot(labels, len(order))  # [L, C]
    number = one_hot.cumsum(dim=0).gather(1, labels[:, None])[:, 0]  # [L], 1 for the first sample of its class
    return number <= kept[labels]


def draw_task(
    seed: int, distribution: TaskDistribution, data: Labelled, num_teachers: int, *, goal_seed: int | None = None
) -> Task:
    """Draw the task of this seed. Draws come in a fixed order, so a range held fixed leaves the others as they were.

    Args:
        seed: of all but the goal.
        distribution: ranges to draw from.
        data: labels and splits.
        num_teachers: there are.
        goal_seed: of the goal; by default `seed`.
    """
    g = task_generator(seed, "task")
    teacher = int(torch.randint(num_teachers, (), generator=g))
    noise = distribution.label_noise.draw(g)
    train = data.splits["train"]
    num_labels = min(round(distribution.num_labels.draw(g)), len(train))
    accuracy = distribution.accuracy_weight.draw(g)
    latency = (1.0 - accuracy) * distribution.latency_share.draw(g)
    samples = train[torch.randperm(len(train), generator=g)[:num_labels]]  # [L]
    labels = data.labels[samples]  # [L]
    wrong = (labels + torch.randint(1, data.num_classes, (num_labels,), generator=g)) % data.num_classes
    flipped = torch.rand(num_labels, generator=g) < noise  # [L]
    # Drawn last, so that balanced tasks are those that were drawn before there was an imbalance. Classes are thinned by
    # their true labels: how common a class is and how often it is labelled wrongly are two properties.
    imbalance = distribution.class_imbalance.draw(g)
    stay = thin_classes(labels, torch.randperm(data.num_classes, generator=g), imbalance)  # [L]
    labels = torch.where(flipped, wrong, labels)
    # after all that was drawn before a task could have several teachers
    count = min(round(distribution.num_teachers.draw(g)), num_teachers)
    order = torch.randperm(num_teachers, generator=g).tolist() if count > 1 else []
    others = tuple(t for t in order if t != teacher)[: count - 1]
    return Task(
        seed=seed,
        teacher=teacher,
        label_noise=noise,
        samples=samples[stay],
        labels=labels[stay],
        class_imbalance=imbalance,
        others=others,
        goal_seed=seed if goal_seed is None else goal_seed,
        **asdict(distribution.draw_goal(seed if goal_seed is None else goal_seed, accuracy, latency)),
    )
