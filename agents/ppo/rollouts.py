"""Rollouts of PPO as pieces of work: whole episodes of a chunk of students, the policy sent along.

A piece is keyed by (scenario, round, chunk) and depends on nothing but its arguments: actor and critic, the exploration
noise, which this process draws, and the streams that tasks are drawn from. The arrays that come back fill
stable-baselines3's buffer in the order in which its own loop would, with the same floats.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.sb3 import CLIP, ended_students, standardise
from rlkd.envs.scenario import Scenario
from rlkd.envs.vector import DistillationVectorEnv, first_streams
from rlkd.workers import IN_PROCESS, Work, Workers

ARRAYS = ("observations", "actions", "rewards", "values", "log_probs", "dones", "unit_controls")  # of an `Episode`


@dataclass(frozen=True)
class Actor:
    """Actor and critic of SB3's `MlpPolicy`, without its optimizer."""

    body: nn.Module
    action: nn.Module
    value: nn.Module
    log_std: Tensor  # [12]

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> "Actor":
        """Take the parts of a policy; they are shared with it."""
        return cls(policy.mlp_extractor, policy.action_net, policy.value_net, policy.log_std.detach())

    @torch.no_grad()
    def act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions [N, 12], values [N] and log-probabilities [N].

        Args:
            observation: [N, O], standardised.
            noise: [N, 12], standard normal.
        """
        for_actions, for_values = self.body(observation)
        distribution = DiagGaussianDistribution(NUM_CONTROLS)
        distribution.proba_distribution(self.action(for_actions), self.log_std)
        normal: Any = distribution.distribution
        actions = normal.loc + noise * normal.scale
        return actions, self.value(for_values).flatten(), distribution.log_prob(actions)


@dataclass(frozen=True)
class Episode:
    """Hold what n students of one scenario did in W windows."""

    observations: NDArray[np.float32]  # [W, n, O], standardised
    actions: NDArray[np.float32]  # [W, n, 12], not clipped
    rewards: NDArray[np.float32]  # [W, n]
    values: NDArray[np.float32]  # [W, n]
    log_probs: NDArray[np.float32]  # [W, n]
    dones: NDArray[np.bool_]  # [W, n]
    unit_controls: NDArray[np.float32]  # [W, n, 12]
    infos: list[list[dict[str, Any]]]  # [W][n], SB3's, filled for students that ended
    streams: NDArray[np.int64]  # [n, 6], to draw the next tasks from


class Collector:
    """Collects the episodes of one scenario's students.

    Args:
        scenario: with the references of all tasks of `pool`.
        pool: seeds of the tasks.
        mean, deviation: [O] each, by which observations are standardised.
    """

    def __init__(
        self, scenario: Scenario, pool: Sequence[int], mean: NDArray[np.float32], deviation: NDArray[np.float32]
    ) -> None:
        self.scenario, self._pool, self._mean, self._deviation = scenario, tuple(pool), mean, deviation
        self._envs: dict[int, DistillationVectorEnv] = {}  # by their number of students, kept between rounds

    def episode(
        self, actor: Actor, streams: NDArray[np.int64], noise: Tensor, *, on_window: Callable[[int], object]
    ) -> Episode:
        """Train the students whose tasks come from `streams` [n, 6] to their end under `noise` [W, n, 12]."""
        num_students, num_windows = len(streams), self.scenario.config.num_windows
        env = self._env(num_students)
        observation, steps = env.begin(streams), list[tuple[Any, ...]]()
        unknown = env.episodes.unknown.numpy()
        returns, lengths = np.zeros(num_students), np.zeros(num_students, dtype=np.int64)
        for window in range(num_windows):
            scaled = standardise(observation, self._mean, self._deviation, unknown=unknown)
            actions, values, log_probs = (t.numpy() for t in actor.act(torch.from_numpy(scaled), noise[window]))
            outcome = env.episodes.step(env.moved(actions.clip(-1.0, 1.0)))
            unit_controls = env.episodes.u.numpy().copy()
            observation, reward, terminated, truncated, info = env.conclude(outcome, restart=window + 1 < num_windows)
            returns += reward
            lengths += 1
            infos: list[dict[str, Any]] = [{} for _ in range(num_students)]
            for i, ending in ended_students(info, truncated, returns, lengths).items():
                last = info["final_obs"][i][None]
                terminal = standardise(last, self._mean, self._deviation, unknown=unknown)[0]
                infos[i] = {**ending, "terminal_observation": terminal}
            done = terminated | truncated
            returns[done], lengths[done] = 0.0, 0
            row = (scaled, actions, reward.astype(np.float32), values, log_probs, done, unit_controls, infos)
            steps.append(row)
            on_window(num_students)
        *arrays, all_infos = zip(*steps, strict=True)
        named = dict(zip(ARRAYS, map(np.stack, arrays), strict=True))
        return Episode(**named, infos=list(all_infos), streams=env.streams())

    def _env(self, num_students: int) -> DistillationVectorEnv:
        if num_students not in self._envs:
            self._envs[num_students] = DistillationVectorEnv(
                num_students, scenario=self.scenario, pool=self._pool, restart_together=True
            )
        return self._envs[num_students]


def joined(parts: Sequence[Episode]) -> Episode:
    """Return the episodes of several chunks side by side."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ARRAYS}
    infos = [[info for chunk in window for info in chunk] for window in zip(*(p.infos for p in parts), strict=True)]
    return Episode(**arrays, infos=infos, streams=np.concatenate([part.streams for part in parts]))


class RolloutEnv(VecEnv):
    """N students that train in one scenario after the other; whole rollouts are collected, as `works`.

    A rollout has one whole episode of every scenario. SB3 reads spaces and sizes here and never steps.

    Args:
        collectors: one a scenario.
        num_students: N, of every scenario.
        seed: of the task streams; student i of scenario k draws from stream seed + k N + i.
        chunk_students: most students of a piece of work.
        workers: do the pieces.
        on_window: called with the number of students after every window.
    """

    render_mode: str | None = None

    def __init__(
        self,
        collectors: Sequence[Collector],
        num_students: int,
        seed: int,
        *,
        chunk_students: int,
        workers: Workers = IN_PROCESS,
        on_window: Callable[[int], object],
    ) -> None:
        bound = np.full(len(OBSERVATIONS), CLIP, dtype=np.float32)
        super().__init__(num_students, spaces.Box(-bound, bound), spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32))
        self._windows = [collector.scenario.config.num_windows for collector in collectors]
        self._shared = [workers.share(collector) for collector in collectors]
        self.workers, self.on_window = workers, on_window
        num_chunks = -(-num_students // chunk_students)
        self._chunks = np.array_split(np.arange(num_students), num_chunks)
        self._streams = [first_streams(seed + k * num_students, num_students) for k in range(len(collectors))]
        self.unit_controls = np.zeros(
            (num_students, NUM_CONTROLS), dtype=np.float32
        )  # of the window shown to callbacks

    @property
    def num_scenarios(self) -> int:
        """Count the scenarios that take turns."""
        return len(self._windows)

    @property
    def num_steps(self) -> int:
        """Windows of a rollout."""
        return sum(self._windows)

    def works(self, actor: Actor, noise: Tensor, number: int) -> list[Work[Episode]]:
        """Return the pieces of a rollout, in the order that `joined` takes their values in.

        Args:
            actor: acts, and judges what it sees.
            noise: [num_steps, N, 12].
            number: of the round.
        """
        return [
            Work(
                ("scenario", k, "round", number, "chunk", c),
                Collector.episode,
                (self._shared[k], actor, self._streams[k][rows], part[:, rows]),
                len(rows),
                self._windows[k],
            )
            for k, part in enumerate(torch.split(noise, self._windows))
            for c, rows in enumerate(self._chunks)
        ]

    def joined(self, parts: Sequence[Episode]) -> list[Episode]:
        """Return one episode of every scenario; the next rollout's tasks are drawn from where these ended."""
        size = len(self._chunks)
        episodes = [joined(parts[begin : begin + size]) for begin in range(0, len(parts), size)]
        self._streams = [episode.streams for episode in episodes]
        return episodes

    def training_state(self) -> dict[str, Tensor]:
        """Return all that `load_training_state` needs; call it between two rollouts."""
        return {"streams": torch.from_numpy(np.stack(self._streams))}  # [K, N, 6]

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `training_state`."""
        self._streams = list(state["streams"].numpy().copy())

    def reset(self) -> NDArray[np.float32]:
        """[N, O], zeros: students begin with each rollout."""
        return np.zeros((self.num_envs, len(OBSERVATIONS)), dtype=np.float32)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Refuse: whole rollouts are collected."""
        raise NotImplementedError("a RolloutEnv collects whole rollouts; for single steps use rlkd.make_sb3_env")

    def step_wait(self) -> Any:
        """As `step_async`."""
        raise NotImplementedError("a RolloutEnv collects whole rollouts; for single steps use rlkd.make_sb3_env")

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """Return the attribute once for each requested student."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Refuse: students share their attributes."""
        raise NotImplementedError("students of a rollout share their attributes")

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Refuse: there is no environment for a single student."""
        raise NotImplementedError("students of a rollout have no environments of their own")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: int | Iterable[int] | None = None) -> list[bool]:
        """No wrapper stands around a student."""
        return [False] * len(list(self._get_indices(indices)))


class RolloutPPO(PPO):
    """PPO whose rollouts a `RolloutEnv` collects; `after_update` is called after each update."""

    after_update: Callable[[], object] = staticmethod(lambda: None)

    def train(self) -> None:
        """One update."""
        super().train()
        self.after_update()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer as SB3's own loop would; callbacks get `infos` and `dones` of every window."""
        assert isinstance(env, RolloutEnv)
        assert isinstance(self.policy, ActorCriticPolicy)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        number = self.num_timesteps // (env.num_envs * n_rollout_steps) + 1
        # one draw a window, as SB3's policy draws from the same global source
        noise = torch.stack([torch.empty(env.num_envs, NUM_CONTROLS).normal_() for _ in range(n_rollout_steps)])
        works = env.works(Actor.of(self.policy), noise, number)
        parts = list(env.workers.run(works, env.on_window))
        for turn, episode in enumerate(env.joined(parts)):
            starts = np.ones(env.num_envs, dtype=bool)
            for window, infos in enumerate(episode.infos):
                dones, rewards = episode.dones[window], episode.rewards[window]
                self.num_timesteps += env.num_envs
                for i in np.flatnonzero(dones):
                    infos[i]["scenario"] = turn
                    infos[i]["episode"]["t"] = time.time() - self.start_time / 1e9
                env.unit_controls = episode.unit_controls[window]
                callback.update_locals(locals())
                if not callback.on_step():
                    return False
                self._update_info_buffer(infos, dones)
                self._bootstrap(infos, rewards)
                rollout_buffer.add(
                    episode.observations[window],
                    episode.actions[window],
                    rewards,
                    starts,
                    torch.from_numpy(episode.values[window]),
                    torch.from_numpy(episode.log_probs[window]),
                )
                starts = dones
        # all episodes have ended, so what would follow has no part in the advantages
        rollout_buffer.compute_returns_and_advantage(last_values=torch.zeros(env.num_envs, 1), dones=dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _bootstrap(self, infos: Sequence[dict[str, Any]], rewards: NDArray[np.float32]) -> None:
        """Add the value of the last observation to the rewards [N] of students that were truncated, as SB3 does."""
        for i, info in enumerate(infos):
            if info.get("TimeLimit.truncated", False):
                terminal = self.policy.obs_to_tensor(info["terminal_observation"])[0]
                with torch.no_grad():
                    rewards[i] += self.gamma * self.policy.predict_values(terminal)[0]
