"""PPO (Schulman et al. 2017) over the lock-step population, by stable-baselines3.

Unlike SB3's own set-up the head starts at zero, so that the untrained policy is the start setting, and
observations are standardised by figures fixed before training instead of a running mean. SB3 seeds torch's and
numpy's global generators for its exploration noise and minibatch order; the students never read those.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, RunOptions
from rlkd.agents.policy.policy import HIDDEN, Policy, actor_shapes, policy_from_sb3
from rlkd.agents.ppo.evaluation import Choice, Evaluation, from_table
from rlkd.agents.ppo.rollouts import Collector, RolloutEnv, RolloutPPO
from rlkd.agents.ppo.state import capture, restore
from rlkd.envs.action import CONTROLS
from rlkd.envs.observation import OBSERVATIONS, TABLE
from rlkd.envs.prepare import Group, train_missing
from rlkd.envs.sb3 import observation_scale
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.journal import Arrays, Journal, Shapes, digest, recall
from rlkd.io.records import plain

BLIND = ("margin", "cost", "probe", "training")  # hidden_groups of a policy that sees what is known beforehand alone


@dataclass(frozen=True)
class PPOConfig:
    """The agent."""

    num_students: int = 64
    """Students in lock-step."""
    num_tasks: int = 128
    """Tasks of every scenario that training draws from; each draw has a goal of its own."""
    num_iterations: int = 40
    """Rollouts of one episode a student and scenario, each followed by an update of the policy."""
    learning_rate: float = 1e-3
    """Adam's step size for policy and value function; falls linearly to a tenth."""
    batch_size: int = 512
    """Windows of a minibatch."""
    num_epochs: int = 8
    """Passes over a rollout in one update."""
    gamma: float = 1.0
    """Discount; 1 makes the return the gain of the final score."""
    gae_lambda: float = 0.95
    hidden: int = 64
    """Units of each of the two layers, of the actor and of the critic."""
    initial_log_std: float = -1.0
    """Log of the standard deviation of exploration at the beginning, in units of an action."""
    final_log_std: float = -2.2
    """The same at the end; in between it falls in a line. It is set, not learned."""
    clip_range: float = 0.2
    evaluate_every: int = 5
    """Iterations between two evaluations on the validation scenarios; the first and the last iteration are evaluated,
    too. The best one ships."""
    num_evaluation_tasks: int = 32
    """Tasks of every validation scenario, the same at every evaluation."""
    hidden_groups: tuple[str, ...] = ()
    """Groups of observations (the keys of rlkd.envs.observation.TABLE) that the agent does not see."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        names = ("num_students", "num_tasks", "num_iterations", "batch_size", "num_epochs", "hidden")
        for name in (*names, "evaluate_every", "num_evaluation_tasks"):
            if getattr(self, name) < 1:
                raise UserError(f"ppo.{name}: got {getattr(self, name)}; allowed: at least 1")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"ppo.{name}: got {getattr(self, name):g}; allowed: 0 to 1")
        if not (self.learning_rate > 0 and self.clip_range > 0):
            raise UserError(
                f"ppo: got learning_rate {self.learning_rate:g} and clip_range {self.clip_range:g}; allowed: above 0"
            )
        if self.batch_size < 2:
            raise UserError(f"ppo.batch_size: got {self.batch_size}; allowed: at least 2")
        for name in self.hidden_groups:
            if name not in TABLE:
                raise UserError(f"ppo.hidden_groups: got {name!r}; allowed: {', '.join(TABLE)}")

    @property
    def num_observed(self) -> int:
        """Students of every scenario whose observations tell what to standardise by."""
        return max(2, self.num_students // 4)

    def evaluated(self) -> tuple[int, ...]:
        """Return the iterations after which the policy is evaluated; 0 is the start."""
        return tuple(sorted({*range(0, self.num_iterations, self.evaluate_every), self.num_iterations}))


@dataclass(frozen=True)
class Rollout:
    """Summary of one iteration, for logs. Means over students that ended; of goals, over those with a floor."""

    iteration: int
    num_trainings: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Learned:
    """Result of a training."""

    policy: Policy  # the best one on the validation scenarios, or without any the last
    evaluations: list[Evaluation]

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of `policy`."""
        return max(self.evaluations, key=lambda evaluation: evaluation.score, default=None)


def observation_figures(
    scenarios: Sequence[Scenario], count: int, seed: int, on_window: Callable[[int], object] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`observation_scale` on tasks that training draws from."""
    return observation_scale(
        scenarios, count, seed, on_window=on_window, seeds_of=lambda index: task_pool(seed, index, count)
    )


def hide(deviation: NDArray[np.float32], groups: Sequence[str]) -> NDArray[np.float32]:
    """`deviation` [O] so large for the observations of some groups of TABLE that they read 0."""
    hidden = [OBSERVATIONS.index(name) for group in groups for name in TABLE[group]]
    result = deviation.copy()
    result[hidden] = HIDDEN
    return result


def task_pool(seed: int, index: int, num_tasks: int) -> list[int]:
    """Seeds of the tasks that the scenario at `index` draws from while the agent with `seed` learns."""
    generator = torch.Generator().manual_seed(seed * 1024 + index)
    return torch.randint(2**60, (num_tasks,), generator=generator).tolist()


def settings(config: PPOConfig, num_windows: int) -> dict[str, Any]:
    """Return the arguments of SB3's on-policy algorithms for updates on whole episodes of `num_windows` decisions."""
    return {
        "learning_rate": lambda remaining: config.learning_rate * (0.1 + 0.9 * remaining),
        "n_steps": num_windows,
        "batch_size": min(config.batch_size, config.num_students * num_windows),
        "n_epochs": config.num_epochs,
        "gamma": config.gamma,
        "gae_lambda": config.gae_lambda,
        "clip_range": config.clip_range,
        "policy_kwargs": {"net_arch": [config.hidden, config.hidden], "log_std_init": config.initial_log_std},
        "device": "cpu",
    }


def begin_unchanged(agent: OnPolicyAlgorithm) -> None:
    """Zero-initialise the actor's head: its mean action changes nothing until it has learned."""
    for parameter in agent.policy.action_net.parameters():
        torch.nn.init.zeros_(parameter)


def new_agent(env: VecEnv, config: PPOConfig, num_windows: int, seed: int) -> RolloutPPO:
    """SB3's PPO with a zero-initialised head."""
    with warnings.catch_warnings():
        # the last minibatch of a pass may be smaller than the others
        warnings.filterwarnings("ignore", "You have specified a mini-batch size")
        agent = RolloutPPO("MlpPolicy", env, seed=seed, **settings(config, num_windows))
    begin_unchanged(agent)
    agent.policy.log_std.requires_grad_(False)  # `RolloutLog` sets it
    return agent


class RolloutLog(BaseCallback):
    """Set the exploration, collect what rollouts report, and call the listener of rollouts."""

    def __init__(self, config: PPOConfig, listeners: "Listeners") -> None:
        super().__init__()
        self._config, self._listeners = config, listeners
        self._ended: list[dict[str, float]] = []
        self._sums: dict[str, list[float]] = {}
        self.iteration = 0

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self._ended += [{**i["student"], "return": i["episode"]["r"]} for i in infos if "student" in i]
        for name, value in self._controls().items():
            self._sums.setdefault(name, []).append(value)
        return True

    def _on_rollout_start(self) -> None:
        done = min(1.0, self.iteration / max(1, self._config.num_iterations - 1))
        c = self._config
        log_std = c.initial_log_std + (c.final_log_std - c.initial_log_std) * done
        self.model.policy.log_std.data.fill_(log_std)  # type: ignore[operator]

    def _controls(self) -> dict[str, float]:
        u = self.training_env.unit_controls  # type: ignore[attr-defined]
        return {f"action/{name}": float(u[:, i].mean()) for i, name in enumerate(CONTROLS)}

    def _on_rollout_end(self) -> None:
        self.iteration += 1
        figures = {k: float(np.mean([e[k] for e in self._ended])) for k in (self._ended[0] if self._ended else ())}
        with_floor = [e for e in self._ended if e["has_floor"]]
        for name in ("goal_met", "shortfall"):
            figures.pop(name, None)
            if with_floor:
                figures[name] = float(np.mean([e[name] for e in with_floor]))
        for name, key in (("num_diverged", "diverged"), ("num_rollbacks", "num_rollbacks")):
            figures[name] = float(sum(e[key] for e in self._ended))
        controls = {name: float(np.mean(values)) for name, values in self._sums.items()}
        num_trainings = self.iteration * self.training_env.num_envs * self.training_env.num_scenarios  # type: ignore[attr-defined]
        self._listeners.on_rollout(Rollout(self.iteration, num_trainings, {**figures, **controls}), self.logger)
        self._ended, self._sums = [], {}


@dataclass(frozen=True)
class Listeners:
    """Functions that are called while an agent learns."""

    on_window: Callable[[int], object]
    """Given the number of students after every window."""
    on_rollout: Callable[[Rollout, Logger], object]
    """Given each iteration's summary, before the update."""
    on_evaluation: Callable[[Evaluation], object] = lambda evaluation: None
    """Given each evaluation on validation scenarios."""
    on_agent: Callable[[Callable[[], Policy]], object] = lambda policy_now: None
    """Given a function that returns the present policy, so that an interrupted run can be saved."""
    on_best: Callable[[Policy], object] = lambda policy: None
    """Given the policy of an evaluation that is better than all before."""


def train(
    scenarios: Sequence[Scenario],
    config: PPOConfig,
    seed: int,
    *,
    listeners: Listeners,
    validation: Sequence[Scenario] = (),
    logger: Logger | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Learned:
    """Learn a policy; the start of the scenarios is the setting that its actions change.

    Args:
        scenarios: take turns; they have one start and one range of controls.
        config: the agent's.
        seed: of the students' tasks, the exploration and the minibatches.
        listeners: are called while the agent learns.
        validation: scenarios that choose the iteration that is returned; with the same start.
        logger: SB3's, for TensorBoard.
        options: workers, the most students of one of their pieces of work, and a journal, which keeps the state after
            every update and goes on from the last one. The policy does not depend on the workers.
    """
    config.check()
    journal = options.journal
    start, controls = scenarios[0].start, scenarios[0].config.controls
    pools = [task_pool(seed, index, config.num_tasks) for index in range(len(scenarios))]
    train_missing([Group(s, pool, s.config.task) for s, pool in zip(scenarios, pools, strict=True)], options.workers)
    mean, deviation = _figures(scenarios, config, seed, on_window=listeners.on_window, journal=journal)
    deviation = hide(deviation, config.hidden_groups)

    inputs = {
        "ppo": asdict(config),
        "seed": seed,
        "scenarios": [_described(s) for s in scenarios],
        "validation": [_described(s) for s in validation],
        "start": digest(start),
        "chunk_students": options.num_parallel,
    }
    num_evaluations = len(config.evaluated()) if validation else 0
    shapes: Shapes = {
        **{name: ("float32", shape) for name, shape in actor_shapes(config.hidden).items()},
        "evaluations": ("float64", (num_evaluations, len(fields(Evaluation)))),
    }
    arrays = journal.find("PPO", inputs, shapes) if journal else None
    if arrays is None:
        env = RolloutEnv(
            [Collector(s, pool, mean, deviation) for s, pool in zip(scenarios, pools, strict=True)],
            config.num_students,
            seed,
            chunk_students=options.num_parallel,
            workers=options.workers,
            on_window=listeners.on_window,
        )
        agent = new_agent(env, config, env.num_steps, seed)
        if logger is not None:
            agent.set_logger(logger)

        def now() -> Policy:
            state: dict[str, Any] = agent.policy.state_dict()
            return policy_from_sb3(state, mean, deviation, start=start, controls=controls)

        listeners.on_agent(now)
        choice = _choice(validation, config, now().weights, listeners=listeners, options=options)
        watch = RolloutLog(config, listeners)
        is_resumed = _prepare(agent, env, watch, choice=choice, now=now, journal=journal)
        total = config.num_iterations * config.num_students * env.num_steps
        if agent.num_timesteps < total:
            agent.learn(total - agent.num_timesteps, callback=watch, log_interval=1, reset_num_timesteps=not is_resumed)
        agent.logger.dump(total + config.num_students * env.num_steps)  # the last update's, as if a rollout followed
        arrays = {**{name: tensor.numpy() for name, tensor in choice.weights.items()}, "evaluations": choice.table()}
        if journal:
            journal.add("PPO", inputs, shapes, arrays)
    evaluations = from_table(arrays["evaluations"])
    weights = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "evaluations"}
    policy = Policy(weights, torch.from_numpy(mean), torch.from_numpy(deviation), start, controls)
    return Learned(policy, evaluations)


def _described(scenario: Scenario) -> list[Any]:
    """Return what the journal records of a scenario, without the place of its cost profile."""
    config = {name: value for name, value in plain(scenario.config).items() if name != "cost"}
    return [list(scenario.group_sizes), config]


def _figures(
    scenarios: Sequence[Scenario],
    config: PPOConfig,
    seed: int,
    *,
    on_window: Callable[[int], object],
    journal: Journal | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`observation_figures`, kept in the journal."""

    def compute() -> Arrays:
        mean, deviation = observation_figures(scenarios, config.num_observed, seed, on_window)
        return {"mean": mean, "deviation": deviation}

    shapes = dict.fromkeys(("mean", "deviation"), ("float32", (len(OBSERVATIONS),)))
    inputs = {
        "seed": seed,
        "num_students": config.num_observed,
        "starts": [digest(scenario.start) for scenario in scenarios],
    }
    known = recall(journal, "observations", inputs, shapes=shapes, compute=compute)
    return known["mean"], known["deviation"]


def _choice(
    validation: Sequence[Scenario],
    config: PPOConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    listeners: Listeners,
    options: RunOptions,
) -> Choice:
    return Choice(
        validation,
        config.evaluated(),
        config.num_evaluation_tasks,
        weights,
        on_evaluation=listeners.on_evaluation,
        options=RunOptions(on_window=listeners.on_window, workers=options.workers),
        on_best=listeners.on_best,
    )


def _prepare(
    agent: RolloutPPO,
    env: RolloutEnv,
    watch: RolloutLog,
    *,
    choice: Choice,
    now: Callable[[], Policy],
    journal: Journal | None,
) -> bool:
    """Evaluate the start, or restore the journal's last state, and save the state after every update from now on.

    Returns:
        Whether a state was restored.
    """
    saved = journal.take_state() if journal else None
    if saved:
        agent._setup_learn(0)  # the counters, which `restore` then replaces
        watch.iteration = restore(agent, env, choice, saved)
    else:
        choice.consider(now(), 0)

    def after_update() -> None:
        choice.consider(now(), watch.iteration)
        if journal:
            journal.save_state(watch.iteration, *capture(agent, env, choice, watch.iteration))

    agent.after_update = after_update
    return saved is not None
