"""What a plan would bring, learned from trainings, and the networks that plan by climbing it.

A critic of E small networks predicts a student's final accuracy, latency and energy from what is known when a phase
begins and from the settings of that phase and those after it. The terms do not depend on the preference, so every
training teaches the critic about all preferences. The actor maps the same figures and a preference to settings and
climbs the critic's mean score less `caution` times its spread over the ensemble (a lower confidence bound), with the
exact expectation over the kinds of exit, which have no gradient between them. Beside it E explorers climb one member
of the critic each: what they propose is best under a model that the trainings still allow (Thompson sampling).

This is a deterministic actor and an ensemble critic (Silver et al. 2014; Osband et al. 2016) for a contextual bandit
with one decision an episode, or a few, not a temporal-difference method: every decision is judged by the end it led to.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.envs.action import EXIT_DEAD_ZONE
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.schedule import (
    EXIT,
    OTHERS,
    PREFERENCE,
    PhaseNetwork,
    exit_position,
    num_outputs,
    phase_inputs,
    split_outputs,
    standardised,
    to_settings,
)
from rlkd.errors import UserError

NUM_TERMS = 3
LEAST_DEVIATION = 0.02  # of an observation, which would otherwise blow up what hardly ever varies
CONSTANT = 0.005  # a smaller deviation than this: students have taught nothing about other values
UNSEEN = 1e6  # its deviation then, so that a network reads 0 whatever the value
CHOICE_ENTROPY = 1e-3  # keeps the kinds of exit open while they score alike
ACCURACY_WEIGHTS = (0.3, 0.98)  # of the preferences that plans are climbed for

Layers = list[Tensor]


@dataclass(frozen=True)
class SurrogateConfig:
    """The critic, the actor and how they are fitted to what trainings brought so far."""

    num_members: int = 5
    """Networks of the critic, and explorers."""
    critic_hidden: int = 128
    """Units of each of the two layers of a critic's network."""
    actor_hidden: int = 64
    """Units of each of the two layers of a network that plans."""
    caution: float = 1.0
    """Standard deviations over the critic's members that a plan's score is lowered by before plans are compared."""
    num_steps: int = 150
    """Optimizer steps of critic and actor in every round."""
    critic_batch_size: int = 256
    actor_batch_size: int = 64
    critic_learning_rate: float = 2e-3
    actor_learning_rate: float = 1e-3
    weight_decay: float = 0.3
    """Of the critic (AdamW)."""

    def check(self) -> None:
        """Raises UserError for an impossible value."""
        if self.num_members < 2:  # one member has no spread
            raise UserError(f"planning.surrogate.num_members: got {self.num_members}; allowed: at least 2")
        for name in ("critic_hidden", "actor_hidden", "num_steps", "critic_batch_size", "actor_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"planning.surrogate.{name}: got {getattr(self, name)}; allowed: at least 1")
        for name in ("critic_learning_rate", "actor_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"planning.surrogate.{name}: got {getattr(self, name):g}; allowed: above 0")
        for name in ("caution", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"planning.surrogate.{name}: got {getattr(self, name):g}; allowed: at least 0")


@dataclass(frozen=True)
class Trained:
    """Finished trainings of M students."""

    observations: tuple[Tensor, ...]  # [M, O] at the beginning of each phase that is decided on
    settings: Tensor  # [M, K, 9], as they were set, noise and all
    terms: Tensor  # [M, 3], accuracy, 1 - latency ratio, 1 - energy ratio on validation

    def join(self, other: "Trained") -> "Trained":
        """Both, one after the other."""
        pairs = zip(self.observations, other.observations, strict=True)
        return Trained(
            tuple(torch.cat(pair) for pair in pairs),
            torch.cat([self.settings, other.settings]),
            torch.cat([self.terms, other.terms]),
        )


class PhaseSurrogate:
    """Critic, actor and explorers of the decision at the beginning of one phase.

    Args:
        index: of the decision, as in `Trained.observations`.
        phase: that begins with it.
        num_phases: K of the plan.
        start: [9], the setting that an actor without experience plans for all phases.
        config: sizes and steps.
        generator: of initial weights and minibatches.
    """

    def __init__(
        self,
        index: int,
        phase: int,
        num_phases: int,
        start: Tensor,
        config: SurrogateConfig,
        generator: torch.Generator,
    ) -> None:
        self.index, self.phase, self._config, self._generator = index, phase, config, generator
        decided = num_phases - phase
        num_figures, num_features = len(phase_inputs(phase)), len(OTHERS) * decided + 3
        members, c = config.num_members, config
        self._critic = _networks(members, num_figures + num_features, c.critic_hidden, NUM_TERMS, generator)
        num_read = num_figures + len(PREFERENCE)
        self._actors = _networks(1 + members, num_read, c.actor_hidden, num_outputs(decided), generator)
        with torch.no_grad():
            self._actors[-2].zero_()
            self._actors[-1][..., :-4] = start[list(OTHERS)].clamp(0.03, 0.97).logit().repeat(decided)
            self._actors[-1][..., -3:] = torch.tensor([1.0, -0.5, 0.0])  # most students end at their first exit
        self._critic_optimizer = torch.optim.AdamW(self._critic, lr=c.critic_learning_rate, weight_decay=c.weight_decay)
        self._actor_optimizer = torch.optim.Adam(self._actors, lr=c.actor_learning_rate)
        self._mean, self._deviation = torch.zeros(num_figures), torch.ones(num_figures)
        self._centre, self._scale = torch.zeros(NUM_TERMS), torch.ones(NUM_TERMS)

    def fit(self, trained: Trained, accuracy_weights: tuple[float, float] = ACCURACY_WEIGHTS) -> dict[str, float]:
        """Go on fitting the critic to all trainings, then the actors to the critic; returns figures for logs."""
        seen = trained.observations[self.index]  # [M, O]
        columns = [OBSERVATIONS.index(name) for name in phase_inputs(self.phase)]
        self._mean, deviation = seen[:, columns].mean(0), seen[:, columns].std(0)
        self._deviation = deviation.clamp_min(LEAST_DEVIATION).where(deviation >= CONSTANT, torch.tensor(UNSEEN))
        self._centre, self._scale = trained.terms.mean(0), trained.terms.std(0) + 1e-3
        error = self._fit_critic(self._seen(seen), trained)
        bound = self._climb(seen, accuracy_weights)
        return {"critic_error": error, "promised_score": bound}

    def propose(self, observation: Tensor, member: Tensor) -> Tensor:
        """Settings [N, R, 9] by the actor (`member` [N] 0) or by explorer 1 to E for each student."""
        with torch.no_grad():
            outputs = _forward(self._actors, self._read(observation))[member, torch.arange(len(observation))]
            scalars, inner, choice = split_outputs(outputs)
            return to_settings(scalars, exit_position(inner, choice))

    def doubt(self, observation: Tensor) -> Tensor:
        """[N], spread over the critic's members of the score that the actor's plan would bring."""
        proposed = self.propose(observation, torch.zeros(len(observation), dtype=torch.int64))
        preference = observation[:, [OBSERVATIONS.index(name) for name in PREFERENCE]]  # [N, 3]
        with torch.no_grad():
            features = torch.cat([self._seen(observation), _features(proposed)], dim=-1)
            terms = _forward(self._critic, features) * self._scale  # [E, N, 3]
            return (terms * preference).sum(-1).std(0)

    def network(self) -> PhaseNetwork:
        """The actor as it is now, for a plan."""
        layers = tuple(
            t.detach()[0].reshape(t.shape[1:] if k % 2 == 0 else t.shape[2:]).clone()
            for k, t in enumerate(self._actors)
        )
        return PhaseNetwork(self.phase, self._mean.clone(), self._deviation.clone(), layers)

    def _seen(self, observation: Tensor) -> Tensor:
        return standardised(observation, self.phase, self._mean, self._deviation)

    def _read(self, observation: Tensor) -> Tensor:
        return PhaseNetwork(self.phase, self._mean, self._deviation, ()).figures(observation)

    def _fit_critic(self, seen: Tensor, trained: Trained) -> float:
        """AdamW on squared errors; every member draws minibatches of its own. Returns the last steps' mean error."""
        c = self._config
        inputs = torch.cat([seen, _features(trained.settings[:, self.phase :])], dim=-1)  # [M, F]
        targets = (trained.terms - self._centre) / self._scale  # [M, 3]
        errors = []
        for step in range(c.num_steps):
            for group in self._critic_optimizer.param_groups:
                group["lr"] = c.critic_learning_rate * (1 - 0.9 * step / c.num_steps)
            rows = torch.randint(len(inputs), (c.num_members, c.critic_batch_size), generator=self._generator)
            loss = (_forward(self._critic, inputs[rows]) - targets[rows]).square().mean((1, 2)).sum()
            self._critic_optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._critic_optimizer.step()
            errors.append(loss.detach() / c.num_members)
        return float(torch.stack(errors[-20:]).mean())

    def _climb(self, observed: Tensor, accuracy_weights: tuple[float, float]) -> float:
        """Adam on the actors' scores under the critic, on trained students under fresh preferences."""
        c, columns = self._config, [OBSERVATIONS.index(name) for name in PREFERENCE]
        bounds = []
        for tensor in self._critic:
            tensor.requires_grad_(False)
        for _ in range(c.num_steps):
            rows = torch.randint(len(observed), (c.actor_batch_size,), generator=self._generator)
            observation = observed[rows].clone()
            preference = _preferences(c.actor_batch_size, accuracy_weights, self._generator)  # [B, 3]
            observation[:, columns] = preference
            own, explorers, entropy = self._scores(observation, preference)
            loss = -own.mean() - explorers.mean(-1).sum() - CHOICE_ENTROPY * entropy
            self._actor_optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._actor_optimizer.step()
            bounds.append(own.detach().mean())
        for tensor in self._critic:
            tensor.requires_grad_(True)
        return float(torch.stack(bounds[-20:]).mean())

    def _scores(self, observation: Tensor, preference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The actor's lower confidence bound [B], each explorer's score under its member [E, B], mean entropy."""
        seen, members = self._seen(observation), self._config.num_members
        outputs = _forward(self._actors, self._read(observation))  # [1 + E, B, Q]
        scalars, inner, choice = split_outputs(outputs)
        chance = choice.softmax(-1)  # [1 + E, B, 3]
        own, explorers = torch.zeros(()), torch.zeros(())
        for kind, position in enumerate((torch.zeros_like(inner), torch.ones_like(inner), inner)):
            features = _features(to_settings(scalars, position))  # [1 + E, B, F]
            same = torch.cat([seen, features[0]], dim=-1).expand(members, -1, -1)
            each = torch.cat([seen.expand(members, -1, -1), features[1:]], dim=-1)
            terms = _forward(self._critic, torch.cat([same, each], dim=1)) * self._scale + self._centre  # [E, 2B, 3]
            score = (terms.reshape(members, 2, -1, NUM_TERMS) * preference).sum(-1)  # [E, 2, B]
            bound = score[:, 0].mean(0) - self._config.caution * score[:, 0].std(0)
            own = own + chance[0, :, kind] * bound
            explorers = explorers + chance[1:, :, kind] * score[:, 1]
        return own, explorers, -(chance * chance.clamp_min(1e-6).log()).sum(-1).mean()


def _networks(count: int, num_in: int, hidden: int, num_out: int, generator: torch.Generator) -> Layers:
    """Weights [count, in, out] and biases [count, 1, out] of `count` networks of three layers."""
    sizes = (num_in, hidden, hidden, num_out)
    layers: Layers = []
    for a, b in itertools.pairwise(sizes):
        layers.append((torch.randn(count, a, b, generator=generator) / math.sqrt(a)).requires_grad_())
        layers.append(torch.zeros(count, 1, b).requires_grad_())
    return layers


def _forward(layers: Layers, inputs: Tensor) -> Tensor:
    """[count, B, out] for inputs [B, in], the same for all, or [count, B, in]."""
    x = inputs.expand(len(layers[0]), *inputs.shape[-2:])
    for k in range(3):
        x = torch.baddbmm(layers[2 * k + 1], x, layers[2 * k])
        x = F.silu(x) if k < 2 else x
    return x


def _features(settings: Tensor) -> Tensor:
    """[*N, 8R + 3]: settings [*N, R, 9] on a scale of about one, the exit by its kind; only its last phase counts."""
    others, leave = settings[..., list(OTHERS)].flatten(-2), settings[..., -1, EXIT]
    always, never = leave <= EXIT_DEAD_ZONE, leave >= 1.0 - EXIT_DEAD_ZONE
    inner = leave.clamp(EXIT_DEAD_ZONE, 1.0 - EXIT_DEAD_ZONE) - 0.5
    kinds = torch.stack([2.0 * always - 1.0, 2.0 * never - 1.0, 4 * inner], dim=-1)
    return torch.cat([4 * (others - 0.5), kinds], dim=-1)


def _preferences(count: int, accuracy_weights: tuple[float, float], generator: torch.Generator) -> Tensor:
    """[count, 3], drawn as tasks draw theirs: accuracy, then latency's share of half to all of the rest."""
    low, high = accuracy_weights
    accuracy = low + (high - low) * torch.rand(count, generator=generator)
    latency = (1 - accuracy) * (0.5 + 0.5 * torch.rand(count, generator=generator))
    return torch.stack([accuracy, latency, 1 - accuracy - latency], dim=-1)
