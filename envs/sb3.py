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
    """A `VecEnv` of N students with a flat action Box [12] that train in one scenario after the other.

    Observations and actions do not depend on the data set or the student's architecture, so one agent learns from all
    scenarios. All students of a scenario begin and end together; then the next scenario's turn comes. A rollout of
    `num_steps` steps has one whole episode of every scenario.

    Args:
        envs: the populations, of N students each, with `restart_together`.
        mean, deviation: [O] each, fixed for the whole training, so that a policy means the same at every moment.
        seed: of the task streams; student i of population k draws from stream seed + k N + i.
    """

    def __init__(
        self,
        envs: Sequence[DistillationVectorEnv],
        mean: NDArray[np.float32],
        deviation: NDArray[np.float32],
        seed: int,
    ) -> None:
        bound = np.full(len(OBSERVATIONS), CLIP, dtype=np.float32)
        self.envs = tuple(envs)
        self._turn, self._window = 0, 0  # which population trains, and windows it has done
        num_students = envs[0].num_envs
        # asks for the render mode of the population that trains
        super().__init__(num_students, spaces.Box(-bound, bound), spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32))
        self._mean, self._deviation, self._first_seed = mean, deviation, seed
        self._waiting: list[NDArray[np.float32]] = []  # first observation of every population's next episode
        self._actions = np.zeros((num_students, NUM_CONTROLS), dtype=np.float32)
        self._returns = np.zeros(num_students)
        self._lengths = np.zeros(num_students, dtype=np.int64)
        self._began = time.time()

    @property
    def num_steps(self) -> int:
        """Steps after which every scenario had its turn."""
        return sum(env.scenario.config.num_windows for env in self.envs)

    @property
    def unit_controls(self) -> NDArray[np.float32]:
        """[N, 12], of the students that train now."""
        unit_controls: NDArray[np.float32] = self.envs[self._turn].episodes.u.numpy()
        return unit_controls

    def reset(self) -> NDArray[np.float32]:
        """Begin new episodes in all scenarios; the first call seeds their task streams."""
        n = self.num_envs
        self._waiting = [env.reset(seed=self._first_seed + k * n)[0] for k, env in enumerate(self.envs)]
        self._turn, self._window = 0, 0
        self._returns[:], self._lengths[:] = 0.0, 0
        return standardise(self._waiting[0], self._mean, self._deviation)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions.astype(np.float32)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One window for all; `infos` carry `episode` and `terminal_observation` where one ended, and its metrics."""
        env = self.envs[self._turn]
        observation, reward, terminated, truncated, info = env.conclude(env.episodes.step(env.moved(self._actions)))
        done = terminated | truncated
        self._returns += reward
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            last = info["final_info"]
            terminal = standardise(info["final_obs"][i][None], self._mean, self._deviation)[0]
            metrics = {name: float(values[i]) for name, values in last.items() if not name.startswith("_")}
            episode = {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": time.time() - self._began}
            infos[i] = {
                "terminal_observation": terminal,
                "TimeLimit.truncated": bool(truncated[i]),
                "episode": episode,
                "student": metrics,
                "scenario": self._turn,
            }
        self._returns[done], self._lengths[done] = 0.0, 0
        self._waiting[self._turn] = observation
        self._window += 1
        if self._window == env.scenario.config.num_windows:
            self._turn, self._window = (self._turn + 1) % len(self.envs), 0
        scaled = standardise(self._waiting[self._turn], self._mean, self._deviation)
        return scaled, reward.astype(np.float32), done, infos

    def training_state(self) -> dict[str, Tensor]:
        """Return copies of all that `load_training_state` needs to go on from here; call it between two steps."""
        state = {"returns": torch.from_numpy(self._returns.copy()), "lengths": torch.from_numpy(self._lengths.copy())}
        state["turn"] = torch.tensor([self._turn, self._window])
        state["waiting"] = torch.from_numpy(np.stack(self._waiting))
        for k, env in enumerate(self.envs):
            state |= {f"population{k}.{name}": tensor for name, tensor in env.training_state().items()}
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state` of the same populations; errors as of `Episodes.load_training_state`."""
        self._returns[:], self._lengths[:] = state["returns"].numpy(), state["lengths"].numpy()
        self._turn, self._window = state["turn"].tolist()
        self._waiting = list(state["waiting"].numpy().copy())
        for k, env in enumerate(self.envs):
            begin = f"population{k}."
            env.load_training_state({n.removeprefix(begin): t for n, t in state.items() if n.startswith(begin)})

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """Return the attribute of the population that trains now, once for each requested student."""
        return [getattr(self.envs[self._turn], attr_name) for _ in self._get_indices(indices)]

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
