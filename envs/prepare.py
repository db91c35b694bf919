"""Train the dense students that episodes refer to before the episodes begin, as pieces of work.

What a task reaches can depend on its place among the others by float rounding. So the tasks that lack a reference are
grouped here as they would be where they are met, and a training repeats to the bit whoever does it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlkd.data import Task, TaskDistribution, draw_task
from rlkd.envs.references import NUM_PARALLEL, Key, References, key_of
from rlkd.envs.scenario import Scenario
from rlkd.workers import IN_PROCESS, Work, Workers


@dataclass(frozen=True)
class Group:
    """Tasks of a scenario that will be trained."""

    scenario: Scenario
    seeds: Sequence[int]
    tasks: TaskDistribution  # that the seeds draw from
    num_parallel: int | None = None  # side by side at most; by default all

    def drawn(self) -> list[Task]:
        """Draw the tasks; with goals of no meaning, which references do not depend on."""
        return drawn_tasks(self.scenario, self.seeds, self.tasks)


def drawn_tasks(scenario: Scenario, seeds: Sequence[int], tasks: TaskDistribution) -> list[Task]:
    """Return the tasks of `seeds`."""
    return [draw_task(seed, tasks, scenario.data, len(scenario.signals.accuracy)) for seed in seeds]


def train_missing(groups: Sequence[Group], workers: Workers = IN_PROCESS) -> list[References]:
    """Train references and warm starts that the groups' tasks lack; scenarios keep them.

    Returns:
        Those of each group, in their order, to be sent along with work on it.
    """
    drawn = [group.drawn() if group.scenario.needs_references else [] for group in groups]
    works: list[Work[References]] = []
    into: list[References] = []
    planned: set[tuple[int, Key]] = set()
    for number, (group, tasks) in enumerate(zip(groups, drawn, strict=True)):
        known, warm = group.scenario.known, group.scenario.config.warm_windows
        width = group.num_parallel or max(1, len(tasks))
        for begin in range(0, len(tasks), width):
            missing = [
                task
                for task in known.missing(tasks[begin : begin + width], warm=warm > 0)
                if (id(known), key_of(task)) not in planned
            ]
            planned |= {(id(known), key_of(task)) for task in missing}
            for first in range(0, len(missing), NUM_PARALLEL):
                seeds = [task.seed for task in missing[first : first + NUM_PARALLEL]]
                key = ("references", number, begin, first)
                arguments = (workers.share(group.scenario), seeds, group.tasks)
                works.append(Work(key, _references, arguments, len(seeds), warm + group.scenario.config.num_windows))
                into.append(known)
    for known, found in zip(into, workers.run(works), strict=True):
        known.add(found)
    return [group.scenario.known.some(tasks) for group, tasks in zip(groups, drawn, strict=True)]


def _references(
    scenario: Scenario, seeds: Sequence[int], tasks: TaskDistribution, *, on_window: Callable[[int], object]
) -> References:
    """Do a piece of work; references are not counted as trainings."""
    return scenario.trained_references(drawn_tasks(scenario, seeds, tasks))
