"""Candidates of a search for a student's structure: limits, short trainings, proposals and the front."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import optuna
import torch
from torch import Tensor

from rlkd.data import Goal, Task
from rlkd.data.distribution import COSTS
from rlkd.data.goal import limit_ratio
from rlkd.errors import UserError
from rlkd.students import Controls, Metrics, Students

EXIT_AT = 0.9  # confidence at which samples leave in the proxy; the distillation sets its own
NUM_FIRST = 4  # structures within the limits that are proposed first, spread over the search


class AnyCandidate(Protocol):
    """One structure with its costs, and what its short training reached."""

    @property
    def structure(self) -> Hashable:
        """Return what tells structures apart."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Costs as ratios to the reference, in the order of COSTS; no sample leaves early."""

    @property
    def latency_s(self) -> float:
        """Seconds of a batch if no sample leaves early."""

    @property
    def accuracy(self) -> float:
        """Accuracy on validation."""

    @property
    def expected_latency_s(self) -> float:
        """Seconds of a batch with the share of samples that left early."""


Candidate = TypeVar("Candidate", bound=AnyCandidate)


def limits_of(goal: Goal, reference_latency_s: float) -> tuple[float, ...]:
    """Return the limits of a goal as ratios, in the order of COSTS; inf: none."""
    given = [getattr(goal, name) for name in COSTS]
    return tuple(
        math.inf if value is None else limit_ratio(name, value, reference_latency_s)
        for name, value in zip(COSTS, given, strict=True)
    )


def is_within(candidate: AnyCandidate, limits: Sequence[float]) -> bool:
    """Whether a structure is within all limits though no sample leaves early."""
    return all(ratio <= limit for ratio, limit in zip(candidate.ratios, limits, strict=True))


def check_within(grid: Sequence[Candidate], limits: Sequence[float], name: Callable[[Candidate], str]) -> None:
    """Raise UserError where no structure is within the limits; it says what the fastest one costs.

    Args:
        grid: the fastest first, at least one.
        limits: as of `limits_of`.
        name: describes a structure.
    """
    if any(is_within(candidate, limits) for candidate in grid):
        return
    smallest = grid[0]
    costs = ", ".join(f"{cost} {ratio:.3f}" for cost, ratio in zip(COSTS, smallest.ratios, strict=True))
    raise UserError(
        f"search: no structure is within the limits; the fastest one, {name(smallest)}, has {costs} of the reference; "
        "raise the limits, or allow smaller structures"
    )


def train_windows(
    students: Students, tasks: Sequence[Task], setting: Controls, num_windows: int, *, has_exits: bool
) -> tuple[Metrics, Tensor, Tensor]:
    """Train students for a few windows under one setting.

    Returns:
        Metrics on validation, the exit threshold [N] of that evaluation, and [N] bool: whether any window stayed.
    """
    students.reset(tasks)
    for _ in range(num_windows):
        telemetry = students.train_window(setting)
    has_learned = ~telemetry.diverged & (telemetry.num_rollbacks < num_windows)
    threshold = torch.full((len(tasks),), EXIT_AT if has_exits else 1.0)
    students.set_exit(threshold)
    return students.evaluate("validation"), threshold, has_learned


def propose(
    draw: Callable[[optuna.Trial], Candidate | None],
    train: Callable[[Candidate], Candidate],
    *,
    first: Sequence[dict[str, Any]],
    num_candidates: int,
    seed: int,
    on_candidate: Callable[[Candidate], object],
) -> list[Candidate]:
    """Train structures that a multi-objective search proposes, and return them; accuracy goes up, latency down.

    Args:
        draw: asks a trial for a structure; None where it cannot be built, or is not within the limits.
        train: returns the candidate with what its short training reached.
        first: arguments that trials begin with; some of them, spread, since proposals alone can all miss narrow limits.
        num_candidates: structures that are trained, at most.
        seed: of the proposals.
        on_candidate: called after each training.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for point in first[:: max(1, -(-len(first) // NUM_FIRST))]:
        study.enqueue_trial(point)
    done: dict[Hashable, Candidate] = {}
    asked = 0
    while len(done) < num_candidates and asked < 20 * num_candidates:
        asked += 1
        trial = study.ask()
        drawn = draw(trial)
        if drawn is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        key = drawn.structure
        if key not in done:
            done[key] = train(drawn)
            on_candidate(done[key])
        study.tell(trial, [done[key].accuracy, done[key].expected_latency_s])
    return list(done.values())


def front_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other one beats in accuracy and expected latency at once, the fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.expected_latency_s, -c.accuracy)):
        if not front or candidate.accuracy > front[-1].accuracy:
            front.append(candidate)
    return front
