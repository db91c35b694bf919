"""Other algorithms than PPO over the same environment: A2C, recurrent PPO, SAC and TQC.

A2C and SAC come with stable-baselines3, recurrent PPO (Pleines et al. 2022) and TQC (Kuznetsov et al. 2020) with
sb3-contrib (extra `rl`). PPO alone is tuned, resumes and ships; what the others reach is compared on the same held-out
tasks. They learn from as many student trainings as PPO's `num_iterations` tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import A2C, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from rlkd.agents.policy.controllers import Controller, RunOptions
from rlkd.agents.policy.sb3 import policy_from_sb3
from rlkd.agents.ppo.evaluation import Evaluation, evaluate
from rlkd.agents.ppo.train import (
    Listeners,
    PPOConfig,
    RolloutLog,
    begin_unchanged,
    hide,
    observation_figures,
    settings,
    task_pool,
)
from rlkd.envs.action import ControlConfig, change
from rlkd.envs.episodes import Episodes
from rlkd.envs.prepare import Group, train_missing
from rlkd.envs.sb3 import SB3VecEnv, standardise
from rlkd.envs.scenario import Scenario
from rlkd.envs.vector import DistillationVectorEnv
from rlkd.errors import UserError

Algorithm = Literal["ppo", "a2c", "recurrent_ppo", "sac", "tqc"]
CONTRIB = ("recurrent_ppo", "tqc")


@dataclass(frozen=True)
class AgentConfig:
    """The algorithm that learns."""

    algorithm: Algorithm = "ppo"
    """ppo is the default and the one that ships and resumes; a2c, recurrent_ppo, sac and tqc are for comparison."""
    learning_rate: float = 7e-4
    """Step size of the other algorithms; that of PPO is ppo.learning_rate."""
    buffer_size: int = 100_000
    """Windows that sac and tqc learn from."""

    @property
    def ships(self) -> bool:
        """Whether the actor has the form of a policy bundle."""
        return self.algorithm in ("ppo", "a2c")

    @property
    def needs_contrib(self) -> bool:
        """Whether the algorithm comes with sb3-contrib."""
        return self.algorithm in CONTRIB

    def check(self) -> None:
        """Raise UserError for an impossible value, or an extra that is not installed."""
        if not (self.learning_rate > 0 and self.buffer_size >= 1):
            raise UserError(
                f"agent: got learning_rate {self.learning_rate:g}, buffer_size {self.buffer_size}; allowed: above 0, "
                "at least 1"
            )
        if self.needs_contrib:
            contrib()


def contrib() -> Any:
    """Return the package sb3_contrib.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import sb3_contrib
    except ImportError as error:
        raise UserError(
            "agent.algorithm: recurrent_ppo and tqc need the package sb3-contrib; run `pip install 'rlkd[rl]'`"
        ) from error
    return sb3_contrib


@dataclass(frozen=True)
class AgentPolicy:
    """An agent of stable-baselines3 as a controller; it has the parts of `Policy` that comparisons read."""

    agent: BaseAlgorithm
    mean: NDArray[np.float32]  # [O]
    deviation: NDArray[np.float32]  # [O]
    start: Tensor  # [12]
    controls: ControlConfig

    def controller(self) -> Controller:
        """Return a closed loop of the agent's most likely actions; a recurrent one remembers an episode."""
        state: Any = None

        def act(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
            nonlocal state
            begins = np.full(len(observation), window == 0)
            unknown = episodes.unknown.numpy()
            scaled = standardise(observation.numpy(), self.mean, self.deviation, unknown=unknown)
            action, state = self.agent.predict(
                scaled, None if window == 0 else state, episode_start=begins, deterministic=True
            )
            return change(episodes.u, torch.from_numpy(action), episodes.start, self.controls)

        return act


def new_agent(env: SB3VecEnv, config: PPOConfig, own: AgentConfig, seed: int) -> BaseAlgorithm:
    """Build an agent of stable-baselines3 or sb3-contrib.

    Args:
        env: of the scenarios.
        config: gives what the algorithms share.
        own: the algorithm, any but ppo, and the rest.
        seed: of first weights, exploration and minibatches.
    """
    shared = settings(config, env.num_steps)
    shared |= {"learning_rate": own.learning_rate, "seed": seed}
    if own.algorithm == "a2c":
        wanted = ("learning_rate", "n_steps", "gamma", "gae_lambda", "policy_kwargs", "device", "seed")
        agent: OnPolicyAlgorithm = A2C("MlpPolicy", env, **{name: shared[name] for name in wanted})
        begin_unchanged(agent)
        return agent
    if own.algorithm == "recurrent_ppo":
        agent = contrib().RecurrentPPO("MlpLstmPolicy", env, **shared)
        begin_unchanged(agent)
        return agent
    made: Callable[..., BaseAlgorithm] = SAC if own.algorithm == "sac" else contrib().TQC
    return made(
        "MlpPolicy",
        env,
        learning_rate=own.learning_rate,
        buffer_size=own.buffer_size,
        learning_starts=config.num_students * env.num_steps,
        batch_size=config.batch_size,
        gamma=config.gamma,
        gradient_steps=config.num_epochs,
        policy_kwargs={"net_arch": [config.hidden, config.hidden]},
        seed=seed,
        device="cpu",
    )


class _Counted(RolloutLog):
    """Reports after every whole rollout of episodes, however the algorithm collects its windows."""

    def __init__(self, config: PPOConfig, listeners: Listeners, on_end: Callable[[int], object]) -> None:
        super().__init__(config, listeners)
        self._on_end = on_end

    def _on_rollout_start(self) -> None:
        """Leave exploration to the algorithm."""

    def _on_rollout_end(self) -> None:
        """Do nothing: rollouts are counted in steps."""

    def _on_step(self) -> bool:
        going = super()._on_step()
        self._listeners.on_window(len(self.locals["infos"]))
        if self.n_calls % self.training_env.num_steps == 0:  # type: ignore[attr-defined]
            super()._on_rollout_end()
            self._on_end(self.iteration)
        return going


def train_other(
    scenarios: Sequence[Scenario],
    config: PPOConfig,
    own: AgentConfig,
    seed: int,
    *,
    listeners: Listeners,
    validation: Sequence[Scenario] = (),
    logger: Logger | None = None,
) -> tuple[AgentPolicy, list[Evaluation]]:
    """Learn with another algorithm than PPO; arguments as of `rlkd.agents.ppo.train.train`.

    Returns:
        The last agent, and its evaluations on the validation scenarios.
    """
    config.check()
    own.check()
    start, controls = scenarios[0].start, scenarios[0].config.controls
    pools = [task_pool(seed, index, config.num_tasks) for index in range(len(scenarios))]
    train_missing([Group(s, pool, s.config.task) for s, pool in zip(scenarios, pools, strict=True)])
    mean, deviation = observation_figures(scenarios, config.num_observed, seed, listeners.on_window)
    deviation = hide(deviation, config.hidden_groups)
    populations = [
        DistillationVectorEnv(config.num_students, scenario=s, pool=pool, restart_together=True)
        for s, pool in zip(scenarios, pools, strict=True)
    ]
    env = SB3VecEnv(populations, mean, deviation, seed)
    agent = new_agent(env, config, own, seed)
    if logger is not None:
        agent.set_logger(logger)
    policy = AgentPolicy(agent=agent, mean=mean, deviation=deviation, start=start, controls=controls)
    evaluations: list[Evaluation] = []

    def on_end(iteration: int) -> None:
        if validation and iteration in config.evaluated():
            evaluation = evaluate(
                policy,
                validation,
                num_tasks=config.num_evaluation_tasks,
                iteration=iteration,
                options=RunOptions(on_window=listeners.on_window),
            )
            if own.ships and all(evaluation.score > before.score for before in evaluations):
                listeners.on_best(policy_from_sb3(agent))  # type: ignore[arg-type]
            evaluations.append(evaluation)
            listeners.on_evaluation(evaluation)

    if validation:
        on_end(0)
    total = config.num_iterations * config.num_students * env.num_steps
    agent.learn(total, callback=_Counted(config, listeners, on_end), log_interval=1)
    return policy, evaluations
