"""Presents the lock-step vector environment to stable-baselines3, with observations standardised by fixed figures."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.vector import DistillationVectorEnv

CLIP = 5.0


def standardise(
    observation: NDArray[np.float32], mean: NDArray[np.float32], deviation: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(observation - mean) / deviation, clipped at 5 either way. [N, O] in and out."""
    scaled: NDArray[np.float32] = ((observation - mean) / deviation).clip(-CLIP, CLIP).astype(np.float32)
    return scaled


class SB3VecEnv(VecEnv):
    """A `VecEnv` of N students with a flat action Box [9]: one or several populations, one after the other.

    Observations and actions do not depend on the data set or the student's architecture, so populations of
    different scenarios stand side by side and one agent learns from all of them.

    Args:
        envs: the populations; their students are numbered in this order.
        mean, deviation: [O] each, fixed for the whole training, so that a policy means the same at every moment.
        seed: of the task streams; student i draws from stream seed + i, or those of its group's first one.
        group_size: students in a row that are given the same tasks, initial weights and batches. Their rewards then
            come less the mean of the others' in the same window, which no action of one's own can change: what is
            due to the task is gone, what is due to the actions stays (leave-one-out baseline, Kool et al. 2019).
            A member that diverges begins the next task at once and stays ahead of its group from then on: the others'
            mean is still nothing its actions can change, but no longer of the same task.
    """

    def __init__(
        self,
        envs: Sequence[DistillationVectorEnv],
        mean: NDArray[np.float32],
        deviation: NDArray[np.float32],
        seed: int,
        group_size: int = 1,
    ) -> None:
        for env in envs:
            if env.num_envs % group_size:
                raise ValueError(f"group_size: got {group_size} for {env.num_envs} students; allowed: its divisors")
        bound = np.full(len(OBSERVATIONS), CLIP, dtype=np.float32)
        self.envs = tuple(envs)  # before super().__init__, which asks for their render mode
        num_students = sum(env.num_envs for env in envs)
        super().__init__(num_students, spaces.Box(-bound, bound), spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32))
        self._rows = [
            slice(sum(e.num_envs for e in envs[:k]), sum(e.num_envs for e in envs[: k + 1])) for k in range(len(envs))
        ]
        self._mean, self._deviation, self._first_seed = mean, deviation, seed
        self._group_size = group_size
        self._actions = np.zeros((num_students, NUM_CONTROLS), dtype=np.float32)
        self._returns = np.zeros(num_students)
        self._lengths = np.zeros(num_students, dtype=np.int64)
        self._began = time.time()

    @property
    def positions(self) -> NDArray[np.float32]:
        """[N, 9], where every student's controls stand."""
        return np.concatenate([env.episodes.position.numpy() for env in self.envs])

    def reset(self) -> NDArray[np.float32]:
        """New episodes for all students; the first call seeds their task streams."""
        streams = [self._first_seed + i // self._group_size * self._group_size for i in range(self.num_envs)]
        seen = [env.reset(seed=streams[rows])[0] for env, rows in zip(self.envs, self._rows, strict=True)]
        self._returns[:], self._lengths[:] = 0.0, 0
        return standardise(np.concatenate(seen), self._mean, self._deviation)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions.astype(np.float32)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One window for all; `infos` carry `episode` and `terminal_observation` where one ended, and its figures."""
        outcomes = [env.step_flat(self._actions[rows]) for env, rows in zip(self.envs, self._rows, strict=True)]
        observation, reward, terminated = (np.concatenate([o[k] for o in outcomes]) for k in range(3))
        self._returns += reward
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for rows, (_, _, ended, _, info) in zip(self._rows, outcomes, strict=True):
            for row in np.flatnonzero(ended):
                i = rows.start + int(row)
                last = info["final_info"]
                terminal = standardise(info["final_obs"][row][None], self._mean, self._deviation)[0]
                figures = {name: float(values[row]) for name, values in last.items() if not name.startswith("_")}
                episode = {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": time.time() - self._began}
                infos[i] = {"terminal_observation": terminal, "episode": episode, "student": figures}
        self._returns[terminated], self._lengths[terminated] = 0.0, 0
        relative = self._less_the_others(reward).astype(np.float32)
        return standardise(observation, self._mean, self._deviation), relative, terminated, infos

    def _less_the_others(self, reward: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N] rewards less the mean of the other members of each group."""
        if self._group_size == 1:
            return reward
        groups = reward.reshape(-1, self._group_size)
        others = (groups.sum(1, keepdims=True) - groups) / (self._group_size - 1)
        relative: NDArray[np.float64] = (groups - others).ravel()
        return relative

    def training_state(self) -> dict[str, Tensor]:
        """Copies of all that `load_training_state` needs to go on from here; between two steps."""
        state = {"returns": torch.from_numpy(self._returns.copy()), "lengths": torch.from_numpy(self._lengths.copy())}
        for k, env in enumerate(self.envs):
            state |= {f"population{k}.{name}": tensor for name, tensor in env.training_state().items()}
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state` of the same populations; errors as of `Episodes.load_training_state`."""
        self._returns[:], self._lengths[:] = state["returns"].numpy(), state["lengths"].numpy()
        for k, env in enumerate(self.envs):
            begin = f"population{k}."
            env.load_training_state({n.removeprefix(begin): t for n, t in state.items() if n.startswith(begin)})

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The attribute of each student's population, once a student asked for."""
        populations = [env for env in self.envs for _ in range(env.num_envs)]
        return [getattr(populations[i], attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Not possible: students share one population."""
        raise NotImplementedError("students of a population share their attributes; build another population")

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Not possible: students share one population."""
        raise NotImplementedError("call the method on `.envs`, the populations")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: int | Iterable[int] | None = None) -> list[bool]:
        """No wrapper stands around a student."""
        return [False] * len(list(self._get_indices(indices)))
