"""The controllers that `rlkd compare --methods` knows, each built for one preference of a scenario."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from rlkd.agents.baselines.schedules import Shape, as_point, follow
from torch import Tensor

from rlkd.agents.baselines.gradients import adversarial_temperature, hypergradient
from rlkd.agents.baselines.pbt import PBTConfig, find_schedule
from rlkd.agents.baselines.published import SCHEDULES, annealed, published, upon
from rlkd.agents.baselines.search import SearchConfig, Shortlist, search_plans
from rlkd.agents.baselines.task_search import Sampler, Trials, search_tasks
from rlkd.agents.baselines.teacher_weights import TeacherWeightsConfig, learn_teacher_weights, weighing
from rlkd.agents.policy.controllers import Controller, hold_start, run
from rlkd.agents.policy.policy import Policy
from rlkd.data import TaskDistribution
from rlkd.envs.action import CONTROLS, NUM_CONTROLS, change
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import Arrays, Journal, recall

NUM_ABLATION_TASKS = 128
BUDGETS = (10, 25, 50, 100)

SEARCHES: dict[str, tuple[Sampler, Shape, int]] = {
    **{f"random_{b}": ("random", "static", b) for b in BUDGETS},
    **{f"tpe_{b}": ("tpe", "static", b) for b in BUDGETS},
    **{f"tpe_linear_{b}": ("tpe", "linear", b) for b in BUDGETS},
}
SWITCHES: dict[str, tuple[str, ...]] = {
    "weights": tuple(name for name in CONTROLS if name.startswith("weight_")),
    **{name: (name,) for name in CONTROLS if not name.startswith("weight_")},
}
NEED_POLICY = (
    "policy",
    "plan",
    "plan_at_start",
    "open_loop",
    "mean_action",
    "random_policy",
    *(f"without_{name}" for name in SWITCHES),
    "policy_mtkd_rl",
)
WEIGH_TEACHERS = ("mtkd_rl", "policy_mtkd_rl")

METHODS = {
    "policy": "closed loop: the learned policy (needs --policy)",
    "static": "best static setting of the search, or of the policy's own, for the preference",
    "plan": "the learned plan that the policy's actions change, unchanged (needs --policy)",
    "plan_at_start": "the learned plan as it is at the beginning, from the task alone, never revised (needs --policy)",
    "published": "CE : KL : feature : attention = 0.5 : 0.3 : 0.15 : 0.05, T = 4, the whole student",
    "annealed": "temperature 5 to 1, kept units 0.8 to 0.3, weight from teacher to labels, cosine learning rate",
    "alpha_weighted": "labels and softened answers half and half at T = 5; the rest as static",
    "temperature_decay": "T = 5 * 0.99^epoch, at least 1; the rest as static",
    "temperature_stages": "T = 4, 3, 2, 1; the rest as static",
    "fewer_features": "kept inputs 80 % to 30 %; the rest as static",
    "alpha_by_confidence": "weight of the labels by the teacher's confidence; the rest as static",
    "curriculum": "labels; answers; all families by what each does for validation; then pruning and exits as static",
    "linear": "every control from a first to a last value in a line, tuned over training tasks by TPE",
    "cosine": "every control from a first to a last value along half a cosine, tuned over training tasks by TPE",
    "ctkd": "temperature climbs the response loss (curriculum temperature); the rest as static",
    "hypergradient": "loss weights follow the one-step hypergradient; the rest as static",
    "pbt": "the schedule that population-based training finds on training tasks, replayed",
    **{f"random_{b}": f"best of {b} random static settings on validation, for every single task" for b in BUDGETS},
    **{f"tpe_{b}": f"best of {b} TPE trials over static settings, for every single task" for b in BUDGETS},
    **{f"tpe_linear_{b}": f"best of {b} TPE trials over linear schedules, for every single task" for b in BUDGETS},
    "open_loop": "the policy's mean schedule over training tasks, blind to task and student (needs --policy)",
    "mean_action": "the policy's mean setting over training tasks, held constant (needs --policy)",
    "random_policy": "uniformly random changes in every window (needs --policy)",
    **{f"without_{name}": f"the policy with {name} as static (needs --policy)" for name in SWITCHES},
    # last: `Request.generator` counts
    "mtkd_rl": "several teachers weighed sample by sample, learned over training tasks (MTKD-RL); the rest as static",
    "policy_mtkd_rl": "teachers weighed as in mtkd_rl, learned under the policy, which sets the rest (needs --policy)",
}


@dataclass(frozen=True)
class Request:
    """What controllers are built from, for one preference."""

    scenario: Scenario
    tasks: TaskDistribution  # its preference fixed
    seeds: tuple[int, ...]  # of the compared tasks; a per-task search trains on them and reads their validation
    static: Shortlist
    policy: Policy | None
    search: SearchConfig  # of tuned schedules
    seed: int
    on_window: Callable[[int], object]
    tuned: Mapping[str, Shortlist] = field(default_factory=dict)  # `tune`'s
    journal: Journal | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """A random source of its own for each method."""
        return torch.Generator().manual_seed(self.seed * 64 + list(METHODS).index(purpose) % 64)


def num_trainings(name: str) -> int:
    """Full student trainings that a method spends on every single task it is asked to solve."""
    return SEARCHES[name][2] if name in SEARCHES else 1


def total_trainings(names: Iterable[str], num_tasks: int) -> int:
    """Student trainings of a comparison under one preference: what methods are found with, and their replay.

    Without those of `tune`, which all preferences share.
    """
    names = list(names)
    shared = {SEARCHES[name][:2]: 0 for name in names if name in SEARCHES}
    for name in names:
        if name in SEARCHES:
            *kind, budget = SEARCHES[name]
            shared[tuple(kind)] = max(shared[tuple(kind)], budget)  # type: ignore[index]
    found = sum(shared.values()) * num_tasks
    found += PBTConfig().num_trainings * ("pbt" in names)
    found += TeacherWeightsConfig().num_trainings * len(set(WEIGH_TEACHERS) & set(names))
    found += NUM_ABLATION_TASKS * bool({"open_loop", "mean_action"} & set(names))
    return found + len(names) * num_tasks


def tune(names: Iterable[str], request: Request) -> dict[str, Shortlist]:
    """The schedules among `names` that are tuned over training tasks: once for all preferences."""
    shapes: dict[str, Shape] = {"linear": "linear", "cosine": "cosine"}
    return {
        name: search_plans(
            [request.scenario],
            request.search,
            request.generator(name),
            request.on_window,
            shapes[name],
            as_point(request.static.points, shapes[name]),
            request.journal,
        )
        for name in names
        if name in shapes
    }


def build_methods(names: Iterable[str], request: Request) -> dict[str, Controller]:
    """The named controllers.

    Raises:
        UserError: a policy's ablation without a policy.
    """
    names = list(names)
    for name in names:
        if name in NEED_POLICY and request.policy is None:
            raise UserError(f"--methods: {name} needs a policy; give its folder with --policy")
    trials = _searched(names, request)
    blind = {"open_loop", "mean_action"} & set(names)
    mean = mean_positions(request) if blind else torch.zeros(1, NUM_CONTROLS)  # [W, 9]
    built = {}
    for name in names:
        if name in SEARCHES:
            sampler, shape, budget = SEARCHES[name]
            built[name] = trials[sampler, shape].best(budget)
        elif name in ("open_loop", "mean_action"):
            built[name] = follow(mean if name == "open_loop" else mean.mean(0, keepdim=True))
        else:
            built[name] = _build(name, request)
    return built


def _build(name: str, request: Request) -> Controller:
    scenario, static = request.scenario, request.static.controller()
    if name in SCHEDULES:
        return upon(static, SCHEDULES[name])
    if request.policy is not None:
        if name == "policy":
            return request.policy.controller()
        if name == "plan_at_start":
            return _never_revised(request.policy)
        if name == "random_policy":
            return _random(request.generator(name), request.policy)
        if name.startswith("without_"):
            return _without(SWITCHES[name.removeprefix("without_")], request.policy.controller(), static)
    if name in request.tuned:
        return request.tuned[name].controller()
    if name == "pbt":
        first = request.static.best(_preference(request))[0]
        generator = request.generator(name)
        on_window, journal = request.on_window, request.journal
        return follow(find_schedule(scenario, PBTConfig(), request.tasks, first, generator, on_window, journal))
    if name in WEIGH_TEACHERS:
        base = static if request.policy is None or name == "mtkd_rl" else request.policy.controller()
        config, generator = TeacherWeightsConfig(), request.generator(name)
        theta = learn_teacher_weights(
            scenario, config, request.tasks, base, generator, request.on_window, request.journal
        )
        return weighing(base, theta)
    simple: dict[str, Callable[[], Controller]] = {
        "static": lambda: static,
        "plan": lambda: hold_start,
        "published": lambda: published(scenario.config.controls),
        "annealed": lambda: annealed,
        "ctkd": lambda: adversarial_temperature(static, request.seed),
        "hypergradient": lambda: hypergradient(static, request.seed),
    }
    return simple[name]()


def _searched(names: Iterable[str], request: Request) -> dict[tuple[Sampler, Shape], Trials]:
    """One search for every sampler and shape, as long as the largest budget that is asked for."""
    budgets: dict[tuple[Sampler, Shape], int] = {}
    for sampler, shape, budget in (SEARCHES[name] for name in names if name in SEARCHES):
        budgets[sampler, shape] = max(budget, budgets.get((sampler, shape), 0))
    first = request.static.best(_preference(request))[0]
    return {
        (sampler, shape): search_tasks(
            request.scenario,
            request.seeds,
            request.tasks,
            sampler,
            shape,
            budget,
            first,
            request.seed,
            request.on_window,
            request.journal,
        )
        for (sampler, shape), budget in budgets.items()
    }


def _preference(request: Request) -> Tensor:
    """[1, 3], the fixed one of the tasks."""
    accuracy, share = request.tasks.accuracy_weight.low, request.tasks.latency_share.low
    return torch.tensor([[accuracy, (1 - accuracy) * share, (1 - accuracy) * (1 - share)]])


def mean_positions(request: Request) -> Tensor:
    """[W, 9], where the policy's controls stand on average in every window over fresh training tasks.

    Under the preference of the comparison, so that the blind baseline knows as much of the budget as the policy.
    """
    assert request.policy is not None
    controller, num_windows = request.policy.controller(), request.scenario.config.num_windows
    generator = request.generator("open_loop")
    seeds = torch.randint(2**59, (NUM_ABLATION_TASKS,), generator=generator).tolist()

    def compute() -> Arrays:
        positions: list[Tensor] = []

        def recorded(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
            positions.append(controller(observation, episodes, window))
            return positions[-1]

        run(request.scenario, recorded, seeds, request.tasks, final_split="validation", on_window=request.on_window)
        return {"positions": torch.stack(positions).mean(1).numpy()}

    shapes = {"positions": ("float32", (num_windows, NUM_CONTROLS))}
    known = recall(request.journal, "mean positions", {"seeds": seeds, "tasks": asdict(request.tasks)}, shapes, compute)
    return torch.from_numpy(known["positions"])


def _never_revised(policy: Policy) -> Controller:
    """The plan that the first network decides at the beginning of an episode, kept to its end; for one run."""
    held = torch.empty(0)

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        nonlocal held
        num_windows = episodes.scenario.config.num_windows
        first = replace(policy.plan, networks=policy.plan.networks[:1])
        now = torch.full((len(observation),), float(window))
        if window == 0:
            held = first.revise(first.begin(len(observation)), observation, now, num_windows)
        return first.now(held, now, num_windows)

    return controller


def _random(generator: torch.Generator, policy: Policy) -> Controller:
    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        action = 2 * torch.rand(episodes.start.shape, generator=generator) - 1
        return change(episodes.start, action, policy.controls)

    return controller


def _without(switched_off: tuple[str, ...], policy: Controller, static: Controller) -> Controller:
    mask = torch.tensor([name not in switched_off for name in CONTROLS])  # [9]
    return lambda observation, episodes, window: torch.where(
        mask, policy(observation, episodes, window), static(observation, episodes, window)
    )
