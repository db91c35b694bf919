"""The controllers of `rlkd compare --methods`: one table, from which lists, checks and budgets are made.

A new baseline is one entry of METHODS. Each is built for one goal.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from rlkd.agents.baselines.gradients import adversarial_temperature, hypergradient
from rlkd.agents.baselines.pbt import PBTConfig, find_schedule
from rlkd.agents.baselines.published import SCHEDULES, annealed, curriculum, upon
from rlkd.agents.baselines.recipes import RECIPES, for_all
from rlkd.agents.baselines.search import SearchConfig, first_settings, search_recipe
from rlkd.agents.baselines.task_search import Sampler, TaskSearch, Trials, search_tasks
from rlkd.agents.baselines.teacher_weights import TeacherWeightsConfig, learn_teacher_weights, weighing
from rlkd.agents.policy.controllers import Controller, RunOptions, follow, hold_start, run
from rlkd.agents.policy.policy import Policy
from rlkd.data import TaskDistribution
from rlkd.envs.action import CONTROLS, NUM_CONTROLS, change, published_setting
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import GuardConfig
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import Arrays, Journal, recall
from rlkd.workers import IN_PROCESS, Workers

NUM_ABLATION_TASKS = 128
BUDGETS = (10, 25, 50, 100)
Needs = Literal["", "policy", "blind", "teachers"]
Found = TypeVar("Found")

SWITCHES: dict[str, tuple[str, ...]] = {
    "weights": tuple(name for name in CONTROLS if name.startswith("weight_")),
    **{name: (name,) for name in ("temperature", "feature_keep", "unit_keep", "learning_rate")},
    "exits": tuple(name for name in CONTROLS if name.startswith("exit_")),
}


@dataclass(frozen=True)
class Request:
    """Inputs that controllers are built from, for one goal."""

    scenario: Scenario
    tasks: TaskDistribution  # their goal fixed
    seeds: tuple[int, ...]  # of the compared tasks; a per-task search trains on them and reads their validation
    search: SearchConfig  # of tuned recipes
    seed: int
    on_window: Callable[[int], object]
    policy: Policy | None = None
    blind: Policy | None = None  # learned without what training shows
    guard: GuardConfig | None = field(default_factory=GuardConfig)  # of every training
    journal: Journal | None = None
    num_parallel: int = 128  # as in `RunOptions`
    workers: Workers = IN_PROCESS
    budgets: Mapping[tuple[Sampler, str], int] = field(default_factory=dict)  # of per-task searches, the largest one
    found: dict[str, object] = field(default_factory=dict, compare=False)  # what methods share, under this goal

    @property
    def options(self) -> RunOptions:
        """Return the options of every training."""
        return RunOptions(self.guard, self.on_window, self.journal, self.num_parallel, self.workers)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a separate random generator for each purpose."""
        return torch.Generator().manual_seed(self.seed * 2**32 + zlib.crc32(purpose.encode()))

    def once(self, key: str, find: Callable[[], Found]) -> Found:
        """Return the result of `find`; only the first call with `key` computes it."""
        if key not in self.found:
            self.found[key] = find()
        return self.found[key]  # type: ignore[return-value]

    def tuned(self, recipe: str) -> Tensor:
        """Return the best point [A] of a recipe over training tasks of this goal."""

        def find() -> Tensor:
            first = first_settings(self.scenario.config.controls)
            if recipe != "constant":  # what is best without a schedule is tried first
                first = torch.cat([self.tuned("constant")[None], first])
            return search_recipe(
                RECIPES[recipe],
                [self.scenario],
                self.search,
                self.generator(recipe),
                tasks=[self.tasks],
                known=first,
                options=self.options,
            )

        return self.once(recipe, find)

    def constant(self) -> Controller:
        """Return the controller of the best constant setting for the goal."""
        return self.best_of("constant")

    def best_of(self, recipe: str) -> Controller:
        """Return the controller of a recipe that is tuned for the goal."""
        return RECIPES[recipe].controller(for_all(self.tuned(recipe)))


@dataclass(frozen=True)
class Baseline:
    """One way of setting controls."""

    meaning: str
    build: Callable[[Request], Controller]
    finds: tuple[str, ...] = ()
    """Searches over training tasks that come first, as keys of `_cost_of_finding`."""
    needs: tuple[Needs, ...] = ()
    trainings_per_task: int = 1
    """Full student trainings that it spends on each compared task."""
    search: tuple[Sampler, str] | None = None
    """Sampler and recipe of a per-task search."""
    start: Callable[[Request], Tensor] | None = None
    """[12], the setting that training begins with; by default the scenario's."""


def _tuned(recipe: str, meaning: str) -> Baseline:
    finds = (recipe,) if recipe == "constant" else ("constant", recipe)
    return Baseline(f"{meaning}; tuned for the goal over training tasks by TPE", lambda r: r.best_of(recipe), finds)


def _upon_constant(meaning: str, build: Callable[[Request], Controller], *more: str, needs: Needs = "") -> Baseline:
    return Baseline(f"{meaning}; the rest as constant", build, ("constant", *more), (needs,) if needs else ())


def _of_policy(meaning: str, build: Callable[[Request], Controller], *finds: str) -> Baseline:
    return Baseline(f"{meaning} (needs --policy)", build, finds, ("policy",))


def _per_task(sampler: Sampler, recipe: str, what: str) -> dict[str, Baseline]:
    prefix = sampler if recipe == "constant" else f"{sampler}_{recipe}"
    trials = {"random": "random", "tpe": "TPE trials over"}[sampler]
    return {
        f"{prefix}_{b}": Baseline(
            f"best of {b} {trials} {what} on validation, for every single task",
            lambda r, b=b: _searched(r, sampler, recipe).best(b),  # type: ignore[misc]
            ("constant",),
            trainings_per_task=b,
            search=(sampler, recipe),
        )
        for b in BUDGETS
    }


def _policy(request: Request) -> Policy:
    assert request.policy is not None  # `check_needs` has seen to it
    return request.policy


def _blind(request: Request) -> Policy:
    assert request.blind is not None
    return request.blind


METHODS: dict[str, Baseline] = {
    "policy": _of_policy("closed loop: the learned policy", lambda r: _policy(r).controller()),
    "blind": Baseline(
        "a policy that sees only what is known beforehand (needs --blind)",
        lambda r: _blind(r).controller(),
        needs=("blind",),
        start=lambda r: _blind(r).start,
    ),
    "start": _of_policy("the setting that the policy begins with, unchanged", lambda r: hold_start),
    "open_loop": _of_policy(
        "the policy's mean controls over time on training tasks, whatever is seen",
        lambda r: follow(mean_controls(r)),
        "mean controls",
    ),
    "mean_action": _of_policy(
        "the policy's mean setting on training tasks, as a constant one",
        lambda r: follow(mean_controls(r).mean(0, keepdim=True)),
        "mean controls",
    ),
    "dense": Baseline(
        "CE : KL : feature : attention = 0.5 : 0.3 : 0.15 : 0.05, T = 4, the whole student",
        lambda r: RECIPES["constant"].controller(for_all(published_setting(r.scenario.config.controls))),
    ),
    "constant": _tuned("constant", "the best constant setting"),
    "nncf": _tuned("nncf", "prune while above the floor; below it go back, and halve the step at each reversal"),
    "cubic": _tuned("cubic", "gradual pruning of units and inputs along the cubic schedule to a final share"),
    "one_shot": _tuned("one_shot", "dense, pruned once, then fine-tuned"),
    "two_phase": _tuned("two_phase", "the published setting for a third of the windows, then another one"),
    "linear": _tuned("linear", "every control from a first to a last value in a line"),
    "cosine": _tuned("cosine", "every control from a first to a last value along half a cosine"),
    "annealed": Baseline(
        "temperature 5 to 1, kept units 0.8 to 0.3, weight from teacher to labels, cosine learning rate",
        lambda r: annealed,
    ),
    **{
        name: _upon_constant(meaning, lambda r, name=name: upon(r.constant(), SCHEDULES[name]))  # type: ignore[misc]
        for name, meaning in {
            "alpha_weighted": "labels and softened answers half and half at T = 5",
            "temperature_decay": "T = 5 * 0.99^epoch, at least 1",
            "temperature_stages": "T = 4, 3, 2, 1",
            "fewer_features": "kept inputs 80 % to 30 %",
            "alpha_by_confidence": "weight of the labels by the teacher's confidence",
        }.items()
    },
    "curriculum": _upon_constant(
        "labels; answers; all families by what each does for validation; then pruning and exits",
        lambda r: curriculum(r.constant()),
    ),
    "ctkd": _upon_constant(
        "temperature climbs the response loss (curriculum temperature)",
        lambda r: adversarial_temperature(r.constant(), r.seed),
    ),
    "hypergradient": _upon_constant(
        "loss weights follow the one-step hypergradient", lambda r: hypergradient(r.constant(), r.seed)
    ),
    "pbt": Baseline(
        "the schedule that population-based training finds on training tasks, replayed",
        lambda r: _pbt(r),
        ("constant", "pbt"),
    ),
    "mtkd_rl": _upon_constant(
        "several teachers weighed sample by sample, learned over training tasks (MTKD-RL)",
        lambda r: _weighed(r, "mtkd_rl", r.constant()),
        "mtkd_rl",
        needs="teachers",
    ),
    "policy_mtkd_rl": Baseline(
        "teachers weighed as in mtkd_rl, learned under the policy, which sets the rest (needs --policy)",
        lambda r: _weighed(r, "policy_mtkd_rl", _policy(r).controller()),
        ("policy_mtkd_rl",),
        ("policy", "teachers"),
    ),
    **_per_task("random", "constant", "constant settings"),
    **_per_task("tpe", "constant", "constant settings"),
    **_per_task("tpe", "two_phase", "settings after a dense first third"),
    **_per_task("tpe", "linear", "linear schedules"),
    "random_policy": _of_policy("uniformly random changes in every window", lambda r: _random(r)),
    **{
        f"without_{name}": _of_policy(
            f"the policy with {name} as constant",
            lambda r, off=off: _without(off, _policy(r).controller(), r.constant()),  # type: ignore[misc]
            "constant",
        )
        for name, off in SWITCHES.items()
    },
}


def check_needs(names: Iterable[str], *, has_policy: bool, has_blind: bool, has_teachers: bool) -> None:
    """Raise UserError for a method whose policy or scenario is missing."""
    missing: dict[Needs, tuple[bool, str]] = {
        "policy": (has_policy, "a policy; give its folder with --policy"),
        "blind": (has_blind, "a blind policy; give its folder with --blind"),
        "teachers": (has_teachers, "several teachers a task; give task.num_teachers.high of 2 or more"),
    }
    for name in names:
        for need in METHODS[name].needs:
            if need and not missing[need][0]:
                raise UserError(f"methods: {name} needs {missing[need][1]}")


def total_trainings(names: Iterable[str], num_tasks: int, search: SearchConfig) -> int:
    """Count the student trainings of a comparison under one goal: searches for methods, and runs on the tasks."""
    names = list(names)
    found = {key for name in names for key in METHODS[name].finds}
    searches: dict[tuple[Sampler, str], int] = {}
    for name in names:
        kind = METHODS[name].search
        if kind:
            searches[kind] = max(searches.get(kind, 0), METHODS[name].trainings_per_task)
    cost = sum(_cost_of_finding(key, search) for key in found)
    return cost + (sum(searches.values()) + len(names)) * num_tasks


def _cost_of_finding(key: str, search: SearchConfig) -> int:
    """Return the number of student trainings of a search over training tasks."""
    others = {
        "pbt": PBTConfig().num_trainings,
        "mtkd_rl": TeacherWeightsConfig().num_trainings,
        "policy_mtkd_rl": TeacherWeightsConfig().num_trainings,
        "mean controls": NUM_ABLATION_TASKS,
    }
    return search.num_trainings if key in RECIPES else others[key]


def build_methods(names: Iterable[str], request: Request) -> dict[str, Controller]:
    """Build the named controllers; run a search that several of them share only once.

    Raises:
        UserError: a method that needs a policy, or several teachers, without them.
    """
    names = list(names)
    has_teachers = request.tasks.num_teachers.high >= 2
    check_needs(
        names,
        has_policy=request.policy is not None,
        has_blind=request.blind is not None,
        has_teachers=has_teachers,
    )
    budgets: dict[tuple[Sampler, str], int] = {}
    for method in (METHODS[name] for name in names):
        if method.search:
            budgets[method.search] = max(budgets.get(method.search, 0), method.trainings_per_task)
    request = replace(request, budgets=budgets)
    return {name: METHODS[name].build(request) for name in names}


def _searched(request: Request, sampler: Sampler, recipe: str) -> Trials:
    """Return the search with a sampler and recipe that is as long as the largest requested budget."""
    return request.once(
        f"{sampler} search of {recipe}",
        lambda: search_tasks(
            request.scenario,
            request.seeds,
            request.tasks,
            search=TaskSearch(sampler, RECIPES[recipe], request.budgets[sampler, recipe]),
            first=request.tuned("constant"),
            seed=request.seed,
            options=request.options,
        ),
    )


def mean_controls(request: Request) -> Tensor:
    """[W, 12], the policy's mean unit controls in every window over fresh training tasks of the same goal."""
    controller, num_windows = _policy(request).controller(), request.scenario.config.num_windows
    seeds = torch.randint(2**59, (NUM_ABLATION_TASKS,), generator=request.generator("mean controls")).tolist()

    def compute() -> Arrays:
        seen: list[Tensor] = []

        def recorded(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
            seen.append(controller(observation, episodes, window))
            return seen[-1]

        run(
            request.scenario,
            recorded,
            seeds,
            request.tasks,
            final_split="validation",
            options=RunOptions(on_window=request.on_window),
        )
        return {"controls": torch.stack(seen).mean(1).numpy()}

    shapes = {"controls": ("float32", (num_windows, NUM_CONTROLS))}

    def find() -> Tensor:
        inputs = {"seeds": seeds, "tasks": asdict(request.tasks)}
        return torch.from_numpy(
            recall(request.journal, "mean controls", inputs, shapes=shapes, compute=compute)["controls"]
        )

    return request.once("mean controls", find)


def _pbt(request: Request) -> Controller:
    first, generator = request.tuned("constant"), request.generator("pbt")
    schedule = find_schedule(
        request.scenario,
        PBTConfig(),
        request.tasks,
        first=first,
        generator=generator,
        options=replace(request.options, guard=None),
    )
    return follow(schedule)


def _weighed(request: Request, purpose: str, base: Controller) -> Controller:
    theta = learn_teacher_weights(
        request.scenario,
        TeacherWeightsConfig(),
        request.tasks,
        base=base,
        generator=request.generator(purpose),
        options=request.options,
    )
    return weighing(base, theta)


def _random(request: Request) -> Controller:
    generator, policy = request.generator("random_policy"), _policy(request)

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        action = 2 * torch.rand(episodes.u.shape, generator=generator) - 1
        return change(episodes.u, action, episodes.start, policy.controls)

    return controller


def _without(switched_off: tuple[str, ...], policy: Controller, constant: Controller) -> Controller:
    mask = torch.tensor([name not in switched_off for name in CONTROLS])  # [12]
    return lambda observation, episodes, window: torch.where(
        mask, policy(observation, episodes, window), constant(observation, episodes, window)
    )
