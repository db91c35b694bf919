"""Ideas that change what happens to a student: rollback as an action, step sizes by parameter group, units by block.

All are tried around the plan of a learned policy. Rollback is tried as rules that know more or move more freely than an
action could. Step sizes and kept units are scaled by fixed factors, found on training tasks by their validation score
(all candidates on some tasks, the best on more) and judged on held-out tasks by test data.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkd.agents.comparison import interval
from rlkd.agents.controllers import hold_start, run
from rlkd.compression.selection import keep_top
from rlkd.envs.episodes import Episodes
from rlkd.envs.world import World
from rlkd.students import Controls, Population, Students
from rlkd.tasks import Preference, TaskDistribution

GROUPS = ("first block", "later blocks", "heads and adapter")
MARGINS = (0.0, 0.01, 0.02)  # of J on validation that a window may lose before it is undone
NUM_FIRST, NUM_SECOND, NUM_FINALISTS = 64, 128, 5  # tasks of all candidates, further tasks of the finalists
NUM_PARALLEL = 128
ORACLE = "end with the window that is best on test data (oracle)"
BEST, COMMON = "best factors that differ", "best common factor (one control does it)"
Row = dict[str, Any]


@dataclass(frozen=True)
class Scales:
    """Fixed factors on what the controls set; 1 changes nothing, to the bit."""

    rates: tuple[float, ...] = (1.0,) * len(GROUPS)  # on the step size, in the order of GROUPS
    units: tuple[float, ...] = ()  # on the share of kept units, one a block; none: 1 everywhere


class ScaledPopulation(Population):
    """A population under `Scales`."""

    scales = Scales()

    def set_controls(self, controls: Controls) -> None:
        """As of `Population`; each block keeps its own share of its units."""
        super().set_controls(controls)
        if self.scales.units:
            shares = [(controls.unit_keep * factor).clamp(max=1.0) for factor in self.scales.units]
            kept = [keep_top(score, share) for score, share in zip(self._scores()[1:], shares, strict=True)]
            self._masks = (self._masks[0], *kept)

    def _update(self, gradients: dict[str, Tensor], learning_rate: Tensor) -> None:
        """As of `Population`; each group goes its own share of Adam's way."""
        factors = {name: self.scales.rates[group_of(name)] for name in self._parameters}
        before = {name: self._parameters[name].clone() for name, factor in factors.items() if factor != 1.0}
        super()._update(gradients, learning_rate)
        for name, old in before.items():
            self._parameters[name].copy_(torch.lerp(old, self._parameters[name], factors[name]))


def group_of(name: str) -> int:
    """The place in GROUPS of the parameter `name` of a `WithAdapter`."""
    if name.startswith("student.layers.0."):
        return 0
    return 1 if name.startswith("student.layers.") else 2


@dataclass(frozen=True)
class ScaledWorld(World):
    """A world whose students train under `Scales`."""

    scales: Scales = field(default_factory=Scales)

    def students(self, num_students: int) -> Students:
        """A lock-step population, whatever its size."""
        made = ScaledPopulation(
            self.new_structure(), self.data, self.signals, num_students, self.config.train, self.exit_cost
        )
        made.scales = self.scales
        return made


def scaled(world: World, scales: Scales) -> ScaledWorld:
    """The same world under `scales`."""
    return ScaledWorld(**{f.name: getattr(world, f.name) for f in dataclasses.fields(World)}, scales=scales)


def rate_candidates() -> list[Scales]:
    """Halved, as they are, doubled: every combination over the groups."""
    return [Scales(rates=rates) for rates in itertools.product((0.5, 1.0, 2.0), repeat=len(GROUPS))]


def unit_candidates(num_blocks: int) -> list[Scales]:
    """Every combination over the blocks of five factors for two blocks, of three for more."""
    factors = (0.5, 0.7, 1.0, 1.4, 2.0) if num_blocks == 2 else (0.6, 1.0, 1.6)
    return [Scales(units=units) for units in itertools.product(factors, repeat=num_blocks)]


def is_common(scales: Scales) -> bool:
    """Whether all groups and blocks have one factor, which the existing control could do as well."""
    return len(set(scales.rates)) == 1 and len(set(scales.units)) <= 1


def study_scales(
    world: World, candidates: Sequence[Scales], weights: Sequence[float], choice: Sequence[int], held_out: Sequence[int]
) -> tuple[list[Row], int]:
    """For each accuracy weight the best candidate and the best common factor, judged; and the trainings spent.

    Args:
        world: its plan is followed.
        candidates: one of them changes nothing.
        weights: of the preferences.
        choice: seeds of at least NUM_FIRST + NUM_SECOND training tasks.
        held_out: seeds of the tasks that judge.
    """
    rows, spent = [], 0
    for weight in weights:
        tasks = world.config.task.with_preference(Preference(weight))
        chosen, num_trainings = choose(world, candidates, tasks, choice)
        base = _scores(world, Scales(), held_out, tasks, "test")
        spent += num_trainings + (1 + len(chosen)) * len(held_out)
        for name, (scales, gain) in chosen.items():
            row = judged(name, weight, _scores(world, scales, held_out, tasks, "test") - base)
            row |= {"choice": _shown(scales), "base": float(base.mean()), "gain_when_chosen": gain}
            rows.append({**row, "bound": name == COMMON})
    return rows, spent


def choose(
    world: World, candidates: Sequence[Scales], tasks: TaskDistribution, seeds: Sequence[int]
) -> tuple[dict[str, tuple[Scales, float]], int]:
    """The best candidate and the best common factor besides 1; each with its mean gain over 1 on all tasks tried."""
    first, second = seeds[:NUM_FIRST], seeds[NUM_FIRST : NUM_FIRST + NUM_SECOND]
    plain = next(c for c in candidates if set(c.rates) | set(c.units) == {1.0})
    tried = {c: _scores(world, c, first, tasks, "validation") for c in candidates}
    ranked = sorted((c for c in candidates if c != plain), key=lambda c: -tried[c].mean())
    finalists = {plain, *ranked[:NUM_FINALISTS], *[c for c in ranked if is_common(c)][:2]}
    more = {c: np.concatenate([tried[c], _scores(world, c, second, tasks, "validation")]) for c in finalists}
    gains = {c: float((scores - more[plain]).mean()) for c, scores in more.items() if c != plain}
    best = max((c for c in gains if not is_common(c)), key=lambda c: gains[c])
    common = max((c for c in gains if is_common(c)), key=lambda c: gains[c])
    chosen = {BEST: (best, gains[best]), COMMON: (common, gains[common])}
    return chosen, len(candidates) * len(first) + len(finalists) * len(second)


def _scores(
    world: World, scales: Scales, seeds: Sequence[int], tasks: TaskDistribution, split: str
) -> NDArray[np.float64]:
    return run(scaled(world, scales), hold_start, seeds, tasks, final_split=split).score


def _shown(scales: Scales) -> str:
    factors = scales.units or scales.rates
    return " / ".join(f"{factor:g}" for factor in factors)


def judged(what: str, weight: float, difference: NDArray[np.float64]) -> Row:
    """A row of the study: mean difference in J over the same tasks, with its bootstrap interval.

    `bound` marks what no action could do, or what needs none of the idea: no verdict rests on it.
    """
    row = interval(difference, "difference", np.random.default_rng(0))
    return {"what": what, "accuracy_weight": weight, "num_tasks": len(difference), "bound": False, **row}


def study_rollback(world: World, weights: Sequence[float], held_out: Sequence[int]) -> tuple[list[Row], int]:
    """Every rule of going back, judged against the plan followed to its end; and the trainings spent."""
    rows = []
    for weight in weights:
        tasks = world.config.task.with_preference(Preference(weight))
        ends = _join([_every_window(world, tasks, chunk) for chunk in _chunks(held_out)])
        rows += [
            {
                **judged(what, weight, ends[what] - ends["last"]),
                "base": float(ends["last"].mean()),
                "bound": what == ORACLE,
            }
            for what in ends
            if what != "last"
        ]
        for margin in MARGINS:
            undone = _join([_undo(world, tasks, chunk, margin) for chunk in _chunks(held_out)])
            row = judged(f"undo a window that loses more than {margin:g}", weight, undone["score"] - ends["last"])
            rows.append({**row, "base": float(ends["last"].mean()), "windows_undone": float(undone["undone"].mean())})
    return rows, len(weights) * (1 + len(MARGINS)) * len(held_out)


def _every_window(world: World, tasks: TaskDistribution, seeds: Sequence[int]) -> Mapping[str, NDArray[np.float64]]:
    """Test J [N] of the last window's student, of the best one on validation, and of the best one on test data."""
    episodes = Episodes(world, len(seeds), tasks)
    episodes.reset(seeds)
    validation, test = [], []
    for _ in range(world.config.num_windows):
        validation.append(episodes.step(episodes.start).score)
        test.append(episodes.evaluate("test")[2])
    tested = torch.stack(test)  # [W, N]
    best = torch.stack(validation).argmax(0)  # [N]
    named = {
        "last": tested[-1],
        "end with the window that is best on validation": tested.gather(0, best[None])[0],
        ORACLE: tested.amax(0),
    }
    return {name: score.double().numpy() for name, score in named.items()}


def _undo(
    world: World, tasks: TaskDistribution, seeds: Sequence[int], margin: float
) -> Mapping[str, NDArray[np.float64]]:
    """Test J [N] where a window that lost more than `margin` under unchanged controls is undone; and how many were.

    Parameters, moments and selection go back; batches go on, so that the next window is another one.
    """
    episodes = Episodes(world, len(seeds), tasks)
    episodes.reset(seeds)
    undone, last, before = torch.zeros(len(seeds)), torch.full((len(seeds),), -torch.inf), torch.empty(0)
    for _ in range(world.config.num_windows):
        state, held = episodes.students.training_state(), episodes.start
        score = episodes.step(held).score
        unchanged = (held == before).all(-1) if len(before) else torch.zeros(len(seeds), dtype=torch.bool)
        lost = unchanged & (score < last - margin)  # [N]
        if lost.any():
            put_back(episodes.students, state, lost)
            score = episodes.evaluate("validation")[2]
            undone += lost
        last, before = score, held
    return {"score": episodes.evaluate("test")[2].double().numpy(), "undone": undone.numpy()}


def put_back(students: Students, state: Mapping[str, Tensor], rows: Tensor) -> None:
    """The students at `rows` ([N] bool) go back to `state`; random sources and counts of rollbacks stay."""
    now = students.training_state()
    learned = ("parameters.", "first.", "second.", "mask.", "num_updates", "threshold")
    for name, tensor in now.items():
        if name.startswith(learned):
            tensor[rows] = state[name][rows]
    students.load_training_state(now)


def _chunks(seeds: Sequence[int]) -> list[Sequence[int]]:
    return [seeds[begin : begin + NUM_PARALLEL] for begin in range(0, len(seeds), NUM_PARALLEL)]


def _join(parts: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
