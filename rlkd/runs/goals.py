"""Goals of one training: what is possible before it, and whether it was reached after it."""

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlkd.cost import Cost
from rlkd.data import Goal, Preference, Task, draw_task
from rlkd.data.distribution import COSTS
from rlkd.envs.action import decode, published_setting, with_exit_kind
from rlkd.envs.episodes import Episodes
from rlkd.envs.limits import KEPT, largest_cost, must_leave_first, within_limits
from rlkd.envs.references import References, key_of
from rlkd.envs.scenario import EpisodeScenario
from rlkd.errors import GoalError
from rlkd.io.journal import Arrays, Journal, recall

AnyScenario = TypeVar("AnyScenario", bound=EpisodeScenario)
ROUNDING = 1e-6  # of accuracies and ratios in single precision


@dataclass(frozen=True)
class PossibleStudent:
    """One student that could come out: how much it keeps, where its samples leave, and what it costs."""

    name: str
    feature_keep: float
    unit_keep: float
    exit: str  # "end" or "first exit"
    cost: Cost  # fields [1]


def with_goal(scenario: AnyScenario, goal: Goal, preference: Preference) -> AnyScenario:
    """Return the scenario with this goal in all of its tasks.

    Raises:
        UserError: the goal cannot be read.
    """
    dense = largest_cost(_dense(scenario), scenario, at_first=False)
    asked = goal.of_task(preference, float(dense.latency_s))
    config: Any = scenario.config
    task = config.task.with_goal(asked, goal.floor[0])
    whole: Any = scenario
    changed: AnyScenario = dataclasses.replace(whole, config=dataclasses.replace(config, task=task))
    return changed


def possible_students(scenario: EpisodeScenario, limits: Tensor) -> list[PossibleStudent]:
    """Dense and smallest student, both where all leave at the first exit, and the largest within each limit.

    Args:
        scenario: gives the costs.
        limits: [4], cost ratios to the dense student in the order of COSTS; inf: no limit.
    """
    dense = _dense(scenario)
    small = dense.clone()
    small[:, KEPT] = 0.0
    rows = [_possible("dense", dense, scenario, at_first=False)]
    if scenario.num_exits > 1:
        rows.append(_possible("dense, first exit", dense, scenario, at_first=True))
    rows.append(_possible("smallest", small, scenario, at_first=False))
    if scenario.num_exits > 1:
        rows.append(_possible("smallest, first exit", small, scenario, at_first=True))
    asked = []
    for i, name in enumerate(COSTS):
        if bool(limits[i].isfinite()):
            only = torch.full_like(limits, torch.inf)
            only[i] = limits[i]
            asked.append((f"{name} <= {_ratio(float(limits[i]))}", only))
    if len(asked) > 1:
        asked.append(("all limits", limits))
    within = [(_within(name, some, dense, scenario), some) for name, some in asked]
    return [*rows, *(row for row, some in within if bool((row.cost.ratios[0] <= some).all()))]


def check_limits(scenario: EpisodeScenario, limits: Tensor) -> None:
    """Raise GoalError for a limit below what the smallest student costs.

    Args:
        scenario: gives the costs.
        limits: [4], as of `possible_students`.
    """
    small = _dense(scenario)
    small[:, KEPT] = 0.0
    least = largest_cost(small, scenario, at_first=scenario.num_exits > 1).ratios[0]  # [4]
    for i, name in enumerate(COSTS):
        if least[i] > limits[i]:
            raise GoalError(
                f"goal.{name}: got a limit of {_ratio(float(limits[i]))} of the dense student's; the smallest student "
                f"has {_ratio(float(least[i]))}; raise the limit, or start from a smaller student"
            )


def check_floor(floors: Tensor, reference: Tensor, keep: float, name: str) -> None:
    """Raise GoalError for a floor that no accuracy reaches.

    Args:
        floors: [2], on validation and test.
        reference: [2], what the floor is a share of.
        keep: the share.
        name: whose accuracy it is, such as "the teacher's".
    """
    if float(floors.max()) > 1.0 + ROUNDING:
        raise GoalError(
            f"goal.keep: got {keep:g} of {name} accuracy {float(reference.max()):.4f}, which is a floor of "
            f"{float(floors.max()):.4f}; allowed: a floor of at most 1"
        )


def goal_figures(episodes: Episodes, accuracy: tuple[float, float], cost: Cost, diverged: bool) -> dict[str, Any]:
    """Floors, whether the goal is met on test data, and by how much accuracy misses its floor.

    Args:
        episodes: of the one student, as it ships.
        accuracy: on validation and test.
        cost: on test, fields [1].
        diverged: such a student meets no goal.
    """
    task = episodes.tasks[0]
    floors, reference = episodes.floors[0].tolist(), episodes.reference[0].tolist()
    limits = episodes.limits[0]  # [4]
    figures: dict[str, Any] = {
        "goal_met": None,
        "reference_accuracy": reference[1],
        "limits": {name: float(limits[i]) for i, name in enumerate(COSTS) if bool(limits[i].isfinite())},
    }
    within = bool((cost.ratios[0] <= limits + ROUNDING).all())
    if task.keep > 0:
        figures |= {"floor": floors[1], "validation_floor": floors[0]}
        figures["shortfall"] = max(0.0, floors[1] - accuracy[1])
        figures["validation_shortfall"] = max(0.0, floors[0] - accuracy[0])
        figures["goal_met"] = within and not diverged and accuracy[1] >= floors[1] - ROUNDING
    elif figures["limits"]:
        figures |= {"goal_met": within and not diverged, "shortfall": 0.0}
    return figures


def goal_line(figures: dict[str, Any], measured: dict[str, Any]) -> str:
    """Return the last line of a run: whether the goal is met, and the measured speed."""
    batch = measured["profile_batch"]
    row = measured[f"batch_{batch}"]
    speeds = [_compared_with("the dense student", row["speedup"])]
    if "speedup_over_teacher" in row:
        speeds.append(_compared_with("the teacher", row["speedup_over_teacher"]))
    speed = f"{', '.join(speeds)} (both measured, batch {batch})" if len(speeds) > 1 else f"{speeds[0]} (measured)"
    accuracy = f"accuracy {figures['accuracy']:.4f} on test"
    if "floor" in figures:
        accuracy += f" (floor {figures['floor']:.4f})"
    if figures["goal_met"] is None:
        return f"{accuracy}, {speed}"
    if figures["goal_met"]:
        return f"goal met: {accuracy}, {speed}"
    shortfall = f" by {figures['shortfall']:.4f}" if figures.get("shortfall") else ""
    return f"goal missed{shortfall}: {accuracy}, {speed}"


def _compared_with(other: str, speedup: float) -> str:
    """How fast a student is beside another network."""
    if speedup >= 1.0:
        return f"{speedup:.2f} times faster than {other}"
    return f"{1.0 / speedup:.2f} times slower than {other}"


def task_of(scenario: EpisodeScenario, seed: int) -> Task:
    """Return the task of a seed, as an episode draws it."""
    return draw_task(seed, scenario.config.task, scenario.data, len(scenario.signals.accuracy))


def reference_accuracies(scenario: EpisodeScenario, task: Task, journal: Journal | None = None) -> Tensor:
    """[2], what the floor of `task` is a share of, on validation and test.

    Args:
        scenario: trains the dense student here if the floor is a share of its accuracy.
        task: of the student.
        journal: answers in place of that training, if it was done before the run was stopped.
    """
    if scenario.config.task.reference != "dense":
        return scenario.references([task])[0, :2]
    inputs = {"seed": task.seed, "controls": asdict(scenario.config.controls)}
    shapes = {"accuracy": ("float64", (3,))}

    def train() -> Arrays:
        return {"accuracy": scenario.references([task])[0].double().numpy()}

    reached = recall(journal, "the dense student", inputs, shapes=shapes, compute=train)["accuracy"].tolist()
    known: References = scenario.known  # type: ignore[attr-defined]
    known.accuracy[key_of(task)] = (reached[0], reached[1], reached[2])
    return torch.tensor(reached[:2])


def dense_accuracies(scenario: AnyScenario, seed: int) -> Tensor:
    """[2], accuracy on validation and test of the dense student of a seed's task, which is trained here.

    A run does not keep it in its journal, whose entries come before the states of the student: a run that is resumed
    trains it again.
    """
    whole, config = scenario, scenario.config
    asked: Any = dataclasses.replace(config, task=dataclasses.replace(config.task, reference="dense"))  # type: ignore[type-var]
    changed: AnyScenario = dataclasses.replace(whole, config=asked)  # type: ignore[type-var]
    return changed.references([task_of(changed, seed)])[0, :2]


def _dense(scenario: EpisodeScenario) -> Tensor:
    """[1, 12], the largest student, none of whose samples leave early."""
    u = with_exit_kind(published_setting(scenario.config.controls)[None], "never")
    u[:, KEPT] = 1.0
    return u


def _possible(name: str, u: Tensor, scenario: EpisodeScenario, *, at_first: bool) -> PossibleStudent:
    controls = decode(u, scenario.config.controls, scenario.data.num_classes)
    where = "first exit" if at_first else "end"
    cost = largest_cost(u, scenario, at_first=at_first)
    return PossibleStudent(name, float(controls.feature_keep), float(controls.unit_keep), where, cost)


def _within(name: str, limits: Tensor, dense: Tensor, scenario: EpisodeScenario) -> PossibleStudent:
    u = within_limits(dense, limits[None], scenario)
    return _possible(name, u, scenario, at_first=bool(must_leave_first(u, limits[None], scenario)))


def _ratio(value: float) -> str:
    return f"{value:.3g}"
