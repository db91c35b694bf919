"""Learning a plan: rounds of trainings around what the actors propose, each followed by a fit to all so far.

The first trainings follow widely scattered settings. After that half of every round goes to tasks on which the
critic's members disagree most, half of the students follow an explorer instead of the actor, and all get noise that
shrinks. Where a plan is decided more than once, three in ten keep what was decided at the beginning: the first decision
is judged by what it leads to alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkd.agents.planner.surrogate import NUM_TERMS, PhaseSurrogate, SurrogateConfig, Trained
from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.scenario import Scenario
from rlkd.envs.schedule import EXIT, PREFERENCE, ControlPlan
from rlkd.errors import UserError
from rlkd.io.journal import Arrays, Journal, recall

NUM_PARALLEL = 128
WIDE_NOISE, WIDE_JUMPS = 0.45, 0.6
KEPT_SHARE = 0.3  # of students, whose first decision stands
CANDIDATES = 4  # tasks looked at for each one that is chosen by doubt

Decide = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PlanningConfig:
    """Learning of the plan that actions change."""

    starts: tuple[float, ...] = (0.0, 1 / 3)
    """Share of an episode after which each phase of a plan begins."""
    num_decisions: int = 1
    """Phases at whose beginning the rest of the plan is decided anew."""
    num_wide: int = 1024
    """Trainings under widely scattered settings before the first round."""
    num_rounds: int = 108
    tasks_per_round: int = 128
    first_noise: float = 0.25
    """Standard deviation of the noise on settings in the first round."""
    last_noise: float = 0.08
    """The same in the last round; in between it falls in a line."""
    jumps: float = 0.1
    """Share of students whose exit is drawn at random."""
    explorers: float = 0.5
    """Share of students that follow an explorer."""
    main_share: float = 0.65
    """Share of the trainings that the first data set gets when there are several."""
    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)

    def check(self) -> None:
        """Raises UserError for an impossible value."""
        ascending = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if not self.starts or self.starts[0] != 0 or not ascending or self.starts[-1] >= 1:
            raise UserError(f"planning.starts: got {list(self.starts)}; allowed: 0, then ascending numbers below 1")
        if not 1 <= self.num_decisions <= len(self.starts):
            raise UserError(f"planning.num_decisions: got {self.num_decisions}; allowed: 1 to {len(self.starts)}")
        for name in ("num_wide", "num_rounds", "tasks_per_round"):
            if getattr(self, name) < 2:
                raise UserError(f"planning.{name}: got {getattr(self, name)}; allowed: at least 2")
        for name in ("first_noise", "last_noise", "jumps", "explorers", "main_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"planning.{name}: got {getattr(self, name):g}; allowed: 0 to 1")
        self.surrogate.check()

    @property
    def num_trainings(self) -> int:
        """Student trainings that the plan costs."""
        return self.num_wide + self.num_rounds * self.tasks_per_round


@dataclass(frozen=True)
class Round:
    """Summary of one round, for logs. Figures are means over its students."""

    number: int
    num_trainings: int
    scenario: int  # whose tasks they were; 0 is the main data set and student
    figures: dict[str, float]


def learn_plan(
    scenarios: Sequence[Scenario],
    config: PlanningConfig,
    start: Tensor,
    generator: torch.Generator,
    on_window: Callable[[int], object],
    on_round: Callable[[Round], object],
    journal: Journal | None = None,
) -> ControlPlan:
    """Learn a plan for the tasks of all scenarios.

    Args:
        scenarios: the first one gets `main_share` of the trainings, the others share the rest evenly.
        config: checked here.
        start: [9], the setting to begin with.
        generator: of tasks, noise, initial weights and minibatches.
        on_window: called with the number of students after every window.
        on_round: called after every round's trainings.
        journal: keeps every batch of trainings; fits are done again.
    """
    config.check()
    num_phases = len(config.starts)
    plan = ControlPlan(config.starts, start.expand(num_phases, NUM_CONTROLS).clone())
    phases = [PhaseSurrogate(k, k, num_phases, start, config.surrogate, generator) for k in range(config.num_decisions)]
    turns = _turns(len(scenarios), config.main_share)
    trained: Trained | None = None
    for count in _parts(config.num_wide):
        scenario = scenarios[next(turns)]
        decide = _wide(plan, count, generator)
        seeds = _draw(count, generator)
        batch = train_batch(scenario, plan, config.num_decisions, seeds, decide, on_window, journal)
        trained = batch if trained is None else trained.join(batch)
    assert trained is not None
    for number in range(config.num_rounds):
        figures = [phase.fit(trained) for phase in phases]
        turn = next(turns)
        scenario = scenarios[turn]
        done = number / max(1, config.num_rounds - 1)
        noise = config.first_noise + (config.last_noise - config.first_noise) * done
        parts = []
        for count in _parts(config.tasks_per_round):
            seeds = _choose(scenario, phases[0], count, generator)
            decide = _explore(phases, num_phases, count, noise, config, generator)
            parts.append(train_batch(scenario, plan, config.num_decisions, seeds, decide, on_window, journal))
        for batch in parts:
            trained = trained.join(batch)
        on_round(Round(number + 1, len(trained.terms), turn, _summary(parts, figures)))
    for phase in phases:
        phase.fit(trained)
    return ControlPlan(config.starts, plan.settings, tuple(phase.network() for phase in phases))


def train_batch(
    scenario: Scenario,
    plan: ControlPlan,
    num_decisions: int,
    seeds: Sequence[int],
    decide: Decide,
    on_window: Callable[[int], object],
    journal: Journal | None = None,
) -> Trained:
    """Train one student a seed under settings decided when phases begin, and evaluate them on validation.

    Args:
        scenario: of the tasks.
        plan: gives the phases.
        num_decisions: phases at whose beginning `decide` is asked.
        seeds: of the tasks.
        decide: from the number of the phase and the observation [N, O] to the settings [N, K - phase, 9]; it may keep
            a state of its own, but must not draw, because a batch that the journal knows is not trained again.
        on_window: called with the number of students after every window.
        journal: answers, or keeps what comes out.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        **{f"observations_{k}": ("float32", (len(seeds), len(OBSERVATIONS))) for k in range(num_decisions)},
        "settings": ("float32", (len(seeds), len(plan.starts), NUM_CONTROLS)),
        "terms": ("float32", (len(seeds), NUM_TERMS)),
    }

    def compute() -> Arrays:
        trained = _train(scenario, plan, num_decisions, seeds, decide, on_window)
        seen = {f"observations_{k}": tensor.numpy() for k, tensor in enumerate(trained.observations)}
        return {**seen, "settings": trained.settings.numpy(), "terms": trained.terms.numpy()}

    known = recall(journal, "planning", {"seeds": list(seeds)}, shapes, compute)
    tensors = {name: torch.from_numpy(array) for name, array in known.items()}
    seen = tuple(tensors[f"observations_{k}"] for k in range(num_decisions))
    return Trained(seen, tensors["settings"], tensors["terms"])


def _train(
    scenario: Scenario,
    plan: ControlPlan,
    num_decisions: int,
    seeds: Sequence[int],
    decide: Decide,
    on_window: Callable[[int], object],
) -> Trained:
    num_windows = scenario.config.num_windows
    episodes = Episodes(scenario, len(seeds))
    observation = episodes.reset(seeds)
    held, seen = plan.begin(len(seeds)), []
    diverged = torch.zeros(len(seeds), dtype=torch.bool)
    for window in range(num_windows):
        for phase in range(num_decisions):
            if window == plan.begins(phase, num_windows):
                seen.append(observation)
                held[:, phase:] = decide(phase, observation)
        now = plan.now(held, torch.full((len(seeds),), float(window)), num_windows)
        outcome = episodes.step(now)
        observation, diverged = outcome.observation, diverged | outcome.diverged
        on_window(len(seeds))
    columns = (outcome.metrics.accuracy, 1 - outcome.cost.latency_ratio, 1 - outcome.cost.energy_ratio)
    terms = torch.stack(columns, dim=-1)  # [N, 3]
    terms[diverged] = 0.0  # the worst score under every preference
    return Trained(tuple(seen), held, terms.float())


def _wide(plan: ControlPlan, count: int, generator: torch.Generator) -> Decide:
    """The plan's settings with a great deal of noise, decided once."""
    noise, leave = _noise(count, len(plan.starts), WIDE_NOISE, WIDE_JUMPS, generator)
    held = _add(plan.begin(count), noise, leave)
    return lambda phase, observation: held[:, phase:]


def _explore(
    phases: Sequence[PhaseSurrogate],
    num_phases: int,
    count: int,
    noise: float,
    config: PlanningConfig,
    generator: torch.Generator,
) -> Decide:
    """What the actor or an explorer proposes, with noise that stays the same through the episode."""
    offsets, leave = _noise(count, num_phases, noise, config.jumps, generator)
    follows = torch.rand(count, generator=generator) < config.explorers
    chosen = torch.randint(1, config.surrogate.num_members + 1, (count,), generator=generator)
    member = torch.where(follows, chosen, 0)  # [N]
    keeps = torch.rand(count, generator=generator) < KEPT_SHARE
    before = torch.zeros(count, num_phases, NUM_CONTROLS)

    def decide(phase: int, observation: Tensor) -> Tensor:
        proposed = _add(phases[phase].propose(observation, member), offsets[:, phase:], leave)
        if phase > 0:
            proposed = torch.where(keeps[:, None, None], before[:, phase:], proposed)
        before[:, phase:] = proposed
        return proposed

    return decide


def _noise(
    count: int, num_phases: int, deviation: float, jumps: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noise on settings [N, K, 9], half of it common to all phases, and an exit control [N], below 0 where it stays.

    Students differ in how much noise they get, and each control of a student gets none with a chance of a half.
    """

    def draw(*shape: int) -> Tensor:
        on = torch.rand(*shape, generator=generator) < 0.5
        return torch.randn(*shape, generator=generator) * on / math.sqrt(2)

    amount = 2 * deviation * torch.rand(count, 1, 1, generator=generator)
    noise = amount * (draw(count, num_phases, NUM_CONTROLS) + draw(count, 1, NUM_CONTROLS))
    noise[..., EXIT] = 0.0
    kind, inner = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    leave = torch.where(kind < 0.4, 0.0, torch.where(kind < 0.8, 1.0, inner))
    return noise, torch.where(torch.rand(count, generator=generator) < jumps, leave, -1.0)


def _add(settings: Tensor, noise: Tensor, leave: Tensor) -> Tensor:
    """Settings [N, R, 9] with noise, and with the exit control `leave` [N] where it is not below 0."""
    noisy = (settings + noise).clamp(0.0, 1.0)
    noisy[..., EXIT] = torch.where(leave[:, None] >= 0, leave[:, None], noisy[..., EXIT])
    return noisy


def _choose(scenario: Scenario, phase: PhaseSurrogate, count: int, generator: torch.Generator) -> list[int]:
    """Task seeds: half of them any, half drawn by the square of the critic's doubt."""
    num_doubted = count // 2
    seeds = _draw(count - num_doubted, generator)
    candidates = _draw(CANDIDATES * num_doubted, generator)
    doubt = phase.doubt(Episodes(scenario, len(candidates)).reset(candidates))
    chance = (doubt / doubt.mean()).square().clamp(0.05, 20.0)
    return seeds + [candidates[i] for i in torch.multinomial(chance, num_doubted, generator=generator).tolist()]


def _draw(count: int, generator: torch.Generator) -> list[int]:
    return [int(s) for s in torch.randint(2**59, (count,), generator=generator)]


def _parts(count: int) -> list[int]:
    """`count` in parts of at most NUM_PARALLEL."""
    return [min(NUM_PARALLEL, count - begin) for begin in range(0, count, NUM_PARALLEL)]


def _turns(num_scenarios: int, main_share: float) -> Iterator[int]:
    """Whose turn it is, without end: scenario 0 in `main_share` of all turns, the others one after the other."""
    given, others = 0.0, 0
    while True:
        given += main_share if num_scenarios > 1 else 1.0
        if given >= 1.0 - 1e-9:
            given -= 1.0
            yield 0
        else:
            yield 1 + others % (num_scenarios - 1)
            others += 1


def _summary(parts: Sequence[Trained], fitted: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the students of a round, and the fits before it by decision."""
    terms = torch.cat([batch.terms for batch in parts])  # [N, 3]
    last = torch.cat([batch.observations[-1] for batch in parts])
    preference = last[:, [OBSERVATIONS.index(name) for name in PREFERENCE]]
    figures = {
        "score": float((terms * preference).sum(-1).mean()),
        "accuracy": float(terms[:, 0].mean()),
        "latency_ratio": float(1 - terms[:, 1].mean()),
        "energy_ratio": float(1 - terms[:, 2].mean()),
    }
    for k, row in enumerate(fitted):
        figures |= {f"{name}_{k}": value for name, value in row.items()}
    return figures
