"""Ideas that change how the agent learns: each is PPO on top of a learned plan, as a training run has it, but for one part.

Judged as `keep_what_gains` does: the policy's gain over the plan alone on fresh tasks, validation data. What an idea
needs besides PPO's own trainings (reference students, rollouts to clone) comes on top and is counted.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from idea_students import Row, judged
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn

from rlkd.agents.controllers import Controller, hold_start, run
from rlkd.agents.held_out import TRAIN_STREAM, stream_seed
from rlkd.agents.policy import Policy
from rlkd.agents.ppo import PPOConfig, begin_unchanged, settings
from rlkd.envs.action import NUM_CONTROLS, change
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.sb3 import CLIP, SB3VecEnv, standardise
from rlkd.envs.vector import DistillationVectorEnv
from rlkd.envs.world import World
from rlkd.errors import UserError

NUM_PRIVILEGED = 3
CLONED_TASKS, CLONED_ROLLOUTS = 32, 8  # tasks of each world, and rollouts of each task
CLONE_STEPS, CLONE_BATCH, CLONE_RATE = 400, 256, 1e-3
LSTM_UNITS = 64


@dataclass(frozen=True)
class Variant:
    """PPO but for one part."""

    title: str
    what: str
    recurrent: bool = False
    privileged: bool = False
    cloned: bool = False
    learned_std: bool = False
    entropy_weight: float = 0.0
    target_kl: float | None = None


VARIANTS = {
    "plain": Variant("PPO as it is", "What the ideas below are compared with: the run's own configuration."),
    "recurrent": Variant(
        "Recurrent PPO",
        f"sb3-contrib's RecurrentPPO: an LSTM of {LSTM_UNITS} units before each network.",
        recurrent=True,
    ),
    "privileged": Variant(
        "Privileged critic",
        "The critic also sees the true noise rate, the share of labels and what the plan alone reaches on the same task from the same weights on the same batches "
        "(one more training each).",
        privileged=True,
    ),
    "cloned": Variant(
        "Behaviour cloning before PPO",
        f"{CLONED_TASKS} tasks of each world, {CLONED_ROLLOUTS} rollouts each, the first without noise; the actor is fitted to the changes of the best one, then PPO.",
        cloned=True,
    ),
    "kl": Variant("KL control", "An update ends once the policy has moved by a KL of 1.5 times 0.01.", target_kl=0.01),
    "learned_std": Variant(
        "Learned exploration",
        "The deviation of exploration is a parameter instead of a schedule (without which an entropy bonus has no gradient).",
        learned_std=True,
    ),
    "entropy": Variant(
        "Entropy bonus",
        "A bonus of 0.01, with the deviation of exploration as a parameter.",
        learned_std=True,
        entropy_weight=0.01,
    ),
}


class PrivilegedVecEnv(SB3VecEnv):
    """Appends to observations [N, O] what only a critic may see: [N, NUM_PRIVILEGED] on a scale of about one."""

    def __init__(self, envs: Sequence[DistillationVectorEnv], mean: Any, deviation: Any, seed: int) -> None:
        super().__init__(envs, mean, deviation, seed)
        bound = np.full(len(OBSERVATIONS) + NUM_PRIVILEGED, CLIP, dtype=np.float32)
        self.observation_space = spaces.Box(-bound, bound)
        self._reference = np.zeros(self.num_envs)
        self.num_references = 0  # trainings of reference students

    def reset(self) -> NDArray[np.float32]:
        """As of `SB3VecEnv`."""
        seen = super().reset()
        self._train_references(np.ones(self.num_envs, dtype=bool))
        return self._with_privileged(seen)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """As of `SB3VecEnv`."""
        seen, reward, terminated, infos = super().step_wait()
        if terminated.any():
            self._train_references(terminated)
        return self._with_privileged(seen), reward, terminated, infos

    def _train_references(self, begun: NDArray[np.bool_]) -> None:
        for env, rows in zip(self.envs, self._rows, strict=True):
            where = np.flatnonzero(begun[rows])
            if len(where):
                seeds = [env.episodes.tasks[i].seed for i in where]
                reached = run(env.world, hold_start, seeds, env.world.config.task, final_split="validation")
                self._reference[rows.start + where] = reached.score
                self.num_references += len(where)

    def _with_privileged(self, seen: NDArray[np.float32]) -> NDArray[np.float32]:
        facts = [
            ((task.label_noise - 0.4) / 0.25, (len(task.samples) / len(env.world.data.splits["train"]) - 0.5) / 0.3)
            for env in self.envs
            for task in env.episodes.tasks
        ]
        reference = (self._reference[:, None] - 0.8) / 0.1
        return np.concatenate([seen, np.array(facts), reference], axis=1).clip(-CLIP, CLIP).astype(np.float32)


class _BlindActor(MlpExtractor):
    """The actor's layers see zeros where the privileged figures stand."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of actor and critic."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """[N, H] for features [N, O + NUM_PRIVILEGED]."""
        hidden = torch.zeros_like(features[:, len(OBSERVATIONS) :])
        return super().forward_actor(torch.cat([features[:, : len(OBSERVATIONS)], hidden], dim=1))


class AsymmetricPolicy(ActorCriticPolicy):
    """An `MlpPolicy` whose actor is blind to the privileged figures."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _BlindActor(self.features_dim, self.net_arch, self.activation_fn, self.device)


class _Exploration(BaseCallback):
    """Sets the deviation of exploration as `rlkd.agents.ppo` does, unless it is learned."""

    def __init__(self, config: PPOConfig, is_learned: bool) -> None:
        super().__init__()
        self._config, self._is_learned, self._iteration = config, is_learned, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        c, done = self._config, min(1.0, self._iteration / max(1, self._config.num_iterations - 1))
        self._iteration += 1
        if not self._is_learned:
            log_std = c.initial_log_std + (c.final_log_std - c.initial_log_std) * done
            self.model.policy.log_std.data.fill_(log_std)


def study_agent(
    variant: Variant,
    worlds: Sequence[World],
    policy: Policy,
    config: PPOConfig,
    seeds: Sequence[int],
    judges: Sequence[int],
) -> tuple[list[Row], int]:
    """One row a seed, and for clones one of what was cloned; and the trainings spent.

    Args:
        variant: of PPO.
        worlds: learned on, under the policy's plan; the first one judges.
        policy: gives the standardisation of observations and the ranges of the controls.
        config: PPO's.
        seeds: of the agents.
        judges: seeds of the tasks that judge.
    """
    world = worlds[0]

    def scores(controller: Controller) -> NDArray[np.float64]:
        return run(world, controller, judges, world.config.task, final_split="validation").score

    base, rows, spent = scores(hold_start), [], len(judges)
    for seed in seeds:
        agent, env = new_agent(variant, worlds, policy, config, stream_seed(seed, TRAIN_STREAM))
        controller = controller_of(agent, policy)
        if variant.cloned:
            spent += clone(agent, worlds, policy, config, stream_seed(seed, TRAIN_STREAM)) + len(judges)
            rows.append(_row(f"{variant.title}, before PPO", seed, agent, scores(controller), base))
        num_steps = config.num_iterations * config.num_students * world.config.num_windows
        agent.learn(num_steps, callback=_Exploration(config, variant.learned_std))
        spent += config.num_iterations * config.num_students + getattr(env, "num_references", 0) + len(judges)
        rows.append(_row(variant.title, seed, agent, scores(controller), base))
    return rows, spent


def new_agent(
    variant: Variant, worlds: Sequence[World], policy: Policy, config: PPOConfig, seed: int
) -> tuple[OnPolicyAlgorithm, SB3VecEnv]:
    """An agent as `rlkd.agents.ppo.new_agent` makes it but for the variant's part, and its environment."""
    populations = [DistillationVectorEnv(config.num_students // len(worlds), world=w) for w in worlds]
    make_env = PrivilegedVecEnv if variant.privileged else SB3VecEnv
    env = make_env(populations, policy.mean.numpy(), policy.deviation.numpy(), seed)
    algorithm: Any = PPO
    kind: Any = AsymmetricPolicy if variant.privileged else "MlpPolicy"
    num_windows = worlds[0].config.num_windows
    told = settings(replace(config, entropy_weight=variant.entropy_weight), num_windows)
    if variant.recurrent:
        try:
            algorithm, kind = importlib.import_module("sb3_contrib").RecurrentPPO, "MlpLstmPolicy"
        except ImportError as error:
            raise UserError(
                "--ideas recurrent: sb3-contrib is not installed; pip install it in stable-baselines3's version"
            ) from error
        told["policy_kwargs"]["lstm_hidden_size"] = LSTM_UNITS
    agent: OnPolicyAlgorithm = algorithm(kind, env, target_kl=variant.target_kl, seed=seed, **told)
    begin_unchanged(agent)
    agent.policy.log_std.requires_grad_(variant.learned_std)
    return agent, env


def controller_of(agent: OnPolicyAlgorithm, policy: Policy) -> Controller:
    """The agent's mean changes to the plan; privileged figures, which the actor does not see, are zeros."""
    state: Any = None
    num_extra = agent.observation_space.shape[0] - len(OBSERVATIONS)  # type: ignore[index]

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        nonlocal state
        seen = standardise(observation.numpy(), policy.mean.numpy(), policy.deviation.numpy())
        begins = np.full(len(seen), window == 0)
        known = None if window == 0 else state
        action, state = agent.predict(np.pad(seen, ((0, 0), (0, num_extra))), known, begins, deterministic=True)
        return change(episodes.start, torch.from_numpy(action), policy.controls)

    return controller


def clone(agent: OnPolicyAlgorithm, worlds: Sequence[World], policy: Policy, config: PPOConfig, seed: int) -> int:
    """Fit the actor to the best of several noisy rollouts a task; returns the trainings spent."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_best_rollouts(world, policy, math.exp(config.initial_log_std), generator) for world in worlds]
    seen, actions = (torch.cat([part[k] for part in parts]) for k in range(2))  # [M, O], [M, 9]
    layers = nn.Sequential(agent.policy.mlp_extractor.policy_net, agent.policy.action_net)
    optimizer = torch.optim.Adam(layers.parameters(), lr=CLONE_RATE)
    for _ in range(CLONE_STEPS):
        rows = torch.randint(len(seen), (CLONE_BATCH,), generator=generator)
        loss = (layers(seen[rows]) - actions[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(worlds) * CLONED_TASKS * CLONED_ROLLOUTS


def _best_rollouts(world: World, policy: Policy, deviation: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standardised observations [W * tasks, O] and changes [W * tasks, 9] of each task's best rollout on validation.

    Half of the noise's variance is held through an episode, half is drawn for every window.
    """
    num_students = CLONED_TASKS * CLONED_ROLLOUTS
    tasks = torch.randint(2**59, (CLONED_TASKS,), generator=generator).tolist()
    episodes = Episodes(world, num_students)
    observation = episodes.reset([seed for seed in tasks for _ in range(CLONED_ROLLOUTS)])
    noisy = (torch.arange(num_students) % CLONED_ROLLOUTS > 0)[:, None]  # [N, 1]
    held = torch.randn(num_students, NUM_CONTROLS, generator=generator)
    seen, actions = [], []
    for _ in range(world.config.num_windows):
        fresh = torch.randn(num_students, NUM_CONTROLS, generator=generator)
        action = (noisy * deviation * (held + fresh) / math.sqrt(2)).clamp(-1.0, 1.0)
        seen.append(((observation - policy.mean) / policy.deviation).clamp(-CLIP, CLIP))
        actions.append(action)
        outcome = episodes.step(change(episodes.start, action, policy.controls))
        observation = outcome.observation
    best = outcome.score.view(CLONED_TASKS, CLONED_ROLLOUTS).argmax(1)  # [tasks]
    rows = torch.arange(CLONED_TASKS) * CLONED_ROLLOUTS + best
    return torch.cat([s[rows] for s in seen]), torch.cat([a[rows] for a in actions])


def _row(what: str, seed: int, agent: OnPolicyAlgorithm, score: NDArray[np.float64], base: NDArray[np.float64]) -> Row:
    """The agent as it is now against the plan; `epochs` are its passes over rollouts so far."""
    row = judged(what, 0.0, score - base)
    del row["accuracy_weight"]  # drawn for every task
    facts = {"seed": seed, "base": float(base.mean()), "epochs": int(getattr(agent, "_n_updates", 0))}
    log_std = float(agent.policy.log_std.detach().mean())
    return {**row, **facts, "log_std": log_std, "scores": [round(float(s), 5) for s in score]}
