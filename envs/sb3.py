"""Presents the lock-step vector environment to stable-baselines3, with observations standardised by fixed figures."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from rlkd.envs.action import NUM_CONTROLS, change
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario, check_type
from rlkd.envs.single import changed_config
from rlkd.envs.vector import DistillationVectorEnv
from rlkd.errors import UserError

CLIP = 5.0
MOST = {"num_students": 2**20, "seed": 2**32 - 1}  # of the whole numbers that `make_sb3_env` takes
OBSERVED = 16  # students whose observations tell what to standardise by


def standardise(
    observation: NDArray[np.float32],
    mean: NDArray[np.float32],
    deviation: NDArray[np.float32],
    *,
    unknown: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """(observation - mean) / deviation, clipped at 5 either way; 0 where `unknown` [O] is true. [N, O] in and out."""
    scaled: NDArray[np.float32] = ((observation - mean) / deviation).clip(-CLIP, CLIP).astype(np.float32)
    scaled[:, unknown] = 0.0
    return scaled


def ended_students(
    info: Mapping[str, Any], truncated: NDArray[np.bool_], returns: NDArray[np.float64], lengths: NDArray[np.int64]
) -> dict[int, dict[str, Any]]:
    """Return SB3's info of each student that ended with a window, by its row; its time and last observation miss.

    Args:
        info: of `DistillationVectorEnv.conclude`.
        truncated: [N].
        returns: [N], sums of the rewards of the episodes.
        lengths: [N], windows of the episodes.
    """
    if "final_info" not in info:
        return {}
    last = {name: values for name, values in info["final_info"].items() if not name.startswith("_")}
    return {
        int(i): {
            "TimeLimit.truncated": bool(truncated[i]),
            "episode": {"r": float(returns[i]), "l": int(lengths[i])},
            "student": {name: float(values[i]) for name, values in last.items()},
        }
        for i in np.flatnonzero(info["_final_info"])
    }


class SB3VecEnv(VecEnv):
    """A `VecEnv` of N students with a flat action Box [12] that train in one scenario after the other.

    Observations and actions do not depend on the data set or the student's architecture, so one agent learns from all
    scenarios. All students of a scenario begin and end together; then the next scenario's turn comes. A rollout of
    `num_steps` steps has one whole episode of every scenario.

    Args:
        envs: the populations, of N students each, with `restart_together`.
        mean: [O], of the observations, fixed for the whole training, so that a policy means the same at every moment.
        deviation: [O], likewise.
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
        self.mean, self.deviation, self._first_seed = mean, deviation, seed
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
    def num_scenarios(self) -> int:
        """Count the scenarios that take turns."""
        return len(self.envs)

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
        return self._scaled(self._waiting[0])

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
        for i, ending in ended_students(info, truncated, self._returns, self._lengths).items():
            ending["terminal_observation"] = self._scaled(info["final_obs"][i][None])[0]
            ending["episode"]["t"] = time.time() - self._began
            infos[i] = {**ending, "scenario": self._turn}
        self._returns[done], self._lengths[done] = 0.0, 0
        self._waiting[self._turn] = observation
        self._window += 1
        if self._window == env.scenario.config.num_windows:
            self._turn, self._window = (self._turn + 1) % len(self.envs), 0
        scaled = self._scaled(self._waiting[self._turn])
        return scaled, reward.astype(np.float32), done, infos

    def _scaled(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return observations [N, O] of the population that trains, as the agent reads them."""
        unknown = self.envs[self._turn].episodes.unknown.numpy()
        return standardise(observation, self.mean, self.deviation, unknown=unknown)

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


def make_sb3_env(
    *configs: EnvConfig,
    num_students: int = 64,
    seed: int = 0,
    scale: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    **settings: Any,
) -> SB3VecEnv:
    """Make the lock-step population as a `VecEnv` for an agent of your own from stable-baselines3.

    Args:
        configs: scenarios that train in turns, by default one; they share the ranges of the controls.
        num_students: side by side in every scenario.
        seed: of the tasks.
        scale: mean and deviation [O] that observations are standardised by; by default those of one episode of random
            actions of 16 students a scenario.
        settings: fields of `EnvConfig` that differ from every config, as of `make_env`.

    Raises:
        UserError: an argument of another type, an impossible value, or configs whose ranges of the controls differ.

    Example:
        >>> env = make_sb3_env(num_students=4, num_windows=2, train={"steps_per_window": 2})  # doctest: +SKIP
        >>> PPO("MlpPolicy", env, n_steps=env.num_steps, batch_size=8).learn(8)  # doctest: +SKIP
    """
    for config in configs:
        check_type(config, "make_sb3_env")
    changed = [changed_config(config, None, settings) or EnvConfig() for config in configs or (EnvConfig(),)]
    _check_arguments(changed, scale, num_students=num_students, seed=seed)
    scenarios = [build_scenario(config) for config in changed]
    mean, deviation = scale or observation_scale(scenarios, OBSERVED, seed)
    envs = [DistillationVectorEnv(num_students, scenario=s, restart_together=True) for s in scenarios]
    return SB3VecEnv(envs, mean, deviation, seed)


def _check_arguments(configs: Sequence[EnvConfig], scale: Any, **numbers: Any) -> None:
    """Raise UserError for what `make_sb3_env` cannot use."""
    for name, least in (("num_students", 1), ("seed", 0)):
        value = numbers[name]
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (is_whole and least <= value <= MOST[name]):
            raise UserError(
                f"make_sb3_env: {name}: got {value!r:.40}; allowed: a whole number from {least} to {MOST[name]}"
            )
    if any(config.controls != configs[0].controls for config in configs):
        raise UserError(
            "make_sb3_env: got scenarios whose controls differ; allowed: one rlkd.ControlConfig for all, because an "
            "action means the same everywhere"
        )
    if scale is not None and not _is_scale(scale):
        raise UserError(
            f"make_sb3_env: scale: got {type(scale).__name__} of other values; allowed: mean and deviation of the "
            f"{len(OBSERVATIONS)} observations, finite, deviations above 0"
        )


def _is_scale(scale: Any) -> bool:
    """Return whether these are a mean and a deviation [O]."""
    if not (isinstance(scale, tuple | list) and len(scale) == 2):
        return False
    if any(np.shape(part) != (len(OBSERVATIONS),) for part in scale):
        return False
    return bool(np.isfinite(scale).all() and (np.asarray(scale[1]) > 0).all())


def observation_scale(
    scenarios: Sequence[Scenario],
    count: int,
    seed: int,
    *,
    on_window: Callable[[int], object] | None = None,
    seeds_of: Callable[[int], Sequence[int]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation [O] of what `count` students of every scenario see in one episode of random changes.

    Args:
        scenarios: at least one.
        count: of students.
        seed: of the changes.
        on_window: called with `count` after every window.
        seeds_of: gives the tasks of the scenario at an index; by default `seed`, `seed` + 1, ...
    """
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for index, scenario in enumerate(scenarios):
        episodes = Episodes(scenario, count)
        seen.append(episodes.reset(list(seeds_of(index) if seeds_of else range(seed, seed + count))))
        for _ in range(scenario.config.num_windows):
            action = 0.5 * torch.randn(episodes.u.shape, generator=generator)
            u = change(episodes.u, action, episodes.start, scenario.config.controls)
            seen.append(episodes.step(u).observation)
            if on_window:
                on_window(count)
    stacked = torch.cat(seen)
    return stacked.mean(0).numpy(), stacked.std(0).clamp_min(0.02).numpy()
