"""The lock-step population behind Gymnasium's vector interface, and behind stable-baselines3's."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from rlkd.envs.action import NUM_CONTROLS, action_space, change, flat_action
from rlkd.envs.checks import check_options, check_parts, check_started, checked_changes, scenario_of
from rlkd.envs.episodes import Episodes, Outcome
from rlkd.envs.observation import observation_space
from rlkd.envs.scenario import EnvConfig, Scenario
from rlkd.envs.single import MAX_SEED, Action, changed_config, figures


class DistillationVectorEnv(VectorEnv[NDArray[np.float32], Action, NDArray[Any]]):
    """N students in lock-step; student i behaves as `DistillationEnv` does with the seed i higher.

    Spaces and rewards are those of `DistillationEnv`. An ended student starts its next episode in the same
    step; its last observation and figures stand in `info["final_obs"]` and `info["final_info"]`.

    Args:
        num_envs: N.
        config: the environment's parts; `scenario`, if given, takes its place.
        scenario: data, teachers and cost profile, shared between environments.
        render_mode: None.
        pool: task seeds to draw from, so that their references are trained once; goals are drawn anew every time.
        restart_together: whether a student that began late, because one before it diverged, is truncated when the
            others end, so that all begin together again.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - gymnasium's own form
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 128,
        config: EnvConfig | None = None,
        scenario: Scenario | None = None,
        *,
        render_mode: str | None = None,
        pool: Sequence[int] | None = None,
        restart_together: bool = False,
    ) -> None:
        self.scenario = scenario_of(config, scenario, render_mode)
        if num_envs < 1:
            raise ValueError(f"num_envs: got {num_envs}; allowed: at least 1")
        self.num_envs = num_envs
        self.render_mode = None
        self._pool, self._restart_together = pool, restart_together
        self._clock = 0  # windows since all began together
        self.episodes = Episodes(self.scenario, num_envs)
        self.single_action_space = action_space()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.single_observation_space = observation_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators = [np.random.default_rng() for _ in range(num_envs)]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin new episodes for all. An integer seed gives student i the seed `seed + i`, as SyncVectorEnv does.

        Raises:
            ValueError: not one seed a student; `options` holds anything.
        """
        check_options(options)
        seeds = [int(seed) + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None:
            if len(seeds) != self.num_envs:
                raise ValueError(f"seed: got {len(seeds)} seeds for {self.num_envs} students; give one each")
            for i, s in enumerate(seeds):
                if s is not None:
                    self._generators[i] = gymnasium.utils.seeding.np_random(s)[0]
        drawn, goals = self._draw(range(self.num_envs))
        observation = self.episodes.reset(drawn, goal_seeds=goals)
        self._clock = 0
        return observation.numpy(), {"task_seed": np.array(drawn), "_task_seed": np.ones(self.num_envs, dtype=bool)}

    def step(
        self, actions: Action
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Move every student's controls, train one window, evaluate, and restart those that ended.

        Raises:
            ValueError: the actions have another form, or hold a number that is not finite.
            gymnasium.error.ResetNeeded: `reset` was never called.
        """
        check_started(bool(self.episodes.tasks))
        check_parts(actions, self.action_space)  # type: ignore[arg-type]
        return self.step_flat(flat_action(actions))

    def step_flat(
        self, actions: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """As `step`, with the changes as one array [N, 12] in the order of `CONTROLS`."""
        return self.conclude(self.episodes.step(self.moved(actions)))

    def moved(self, actions: NDArray[np.float32]) -> Tensor:
        """Return the unit controls [N, 12] after changes [N, 12]; errors as of `step`."""
        check_started(bool(self.episodes.tasks))
        changes = torch.from_numpy(checked_changes(actions, self.num_envs))
        return change(self.episodes.u, changes, self.episodes.start, self.scenario.config.controls)

    def conclude(
        self, outcome: Outcome, restart: bool = True
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Return what `step` returns for the outcome of a window, and restart the episodes that ended with it.

        Without `restart` they stay as they ended, until `begin` or `reset`.
        """
        everyone = np.ones(self.num_envs, dtype=bool)
        info: dict[str, Any] = {}
        for name, values in figures(outcome).items():
            info[name], info[f"_{name}"] = values, everyone
        observation = outcome.observation.numpy()
        terminated = outcome.terminated.numpy()
        self._clock = (self._clock + 1) % self.scenario.config.num_windows
        truncated = ~terminated & (self._restart_together and self._clock == 0)
        ended = terminated | truncated
        if ended.any():
            rows = np.flatnonzero(ended)
            final = np.full(self.num_envs, None, dtype=object)
            for i in rows:
                final[i] = observation[i].copy()
            last = {name: np.where(ended, info[name], 0) for name in figures(outcome)}
            masks = {f"_{name}": ended.copy() for name in last}
            for name in last:  # metrics of students that go on stay; final_info has those of students that ended
                info[f"_{name}"] = ~ended
            info |= {"final_obs": final, "_final_obs": ended.copy(), "_final_info": ended.copy()}
            info["final_info"] = {**last, **masks}
        if ended.any() and restart:
            drawn, goals = self._draw(rows)
            observation = observation.copy()
            observation[rows] = self.episodes.reset(drawn, torch.from_numpy(rows), goals).numpy()[rows]
            info["task_seed"], info["_task_seed"] = np.zeros(self.num_envs, dtype=np.int64), ended.copy()
            info["task_seed"][rows] = drawn
        return observation, outcome.reward.numpy().astype(np.float64), terminated, truncated, info

    def begin(self, streams: NDArray[np.int64]) -> NDArray[np.float32]:
        """Begin new episodes with tasks drawn from `streams` [N, 6]; return the observation [N, O]."""
        self._generators = [_stream(row) for row in streams]
        return self.reset()[0]

    def streams(self) -> NDArray[np.int64]:
        """[N, 6], the states of the generators that the students' next tasks are drawn from."""
        return np.stack([_stream_state(g) for g in self._generators])

    def training_state(self) -> dict[str, Tensor]:
        """Return copies of all that `load_training_state` needs to go on from here."""
        state = {"streams": torch.from_numpy(self.streams()), "clock": torch.tensor(self._clock)}
        return {**state, **{f"episodes.{k}": v for k, v in self.episodes.training_state().items()}}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state` of as many students in the same scenario.

        Raises:
            UserError: as of `Episodes.load_training_state`.
        """
        self._generators = [_stream(row) for row in state["streams"].numpy()]
        self._clock = int(state["clock"])
        begin = "episodes."
        self.episodes.load_training_state({k.removeprefix(begin): v for k, v in state.items() if k.startswith(begin)})

    def _draw(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Seeds of a task and of its goal for each row."""
        goals = [int(self._generators[i].integers(MAX_SEED)) for i in rows]
        if self._pool is None:
            return goals, goals
        return [self._pool[int(self._generators[i].integers(len(self._pool)))] for i in rows], goals


class FlatDistillationVectorEnv(DistillationVectorEnv):
    """`DistillationVectorEnv` with one Box [N, 12] of changes in the order of `CONTROLS`."""

    def __init__(
        self,
        num_envs: int = 128,
        config: EnvConfig | None = None,
        scenario: Scenario | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(num_envs, config, scenario, render_mode=render_mode)
        self.single_action_space = spaces.Box(-1.0, 1.0, (NUM_CONTROLS,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def step(  # type: ignore[override]
        self, actions: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """As of the parent, with actions [N, 12]."""
        return self.step_flat(actions)


def make_vector_env(num_envs: int = 128, **arguments: Any) -> DistillationVectorEnv:
    """Make the population of `rlkd/Distillation-v0`; fields of `EnvConfig` are arguments, too, as of `make_env`."""
    return DistillationVectorEnv(num_envs, **_taken(arguments))


def make_flat_vector_env(num_envs: int = 128, **arguments: Any) -> FlatDistillationVectorEnv:
    """Make the population of `rlkd/DistillationFlat-v0`, as `make_vector_env` does."""
    return FlatDistillationVectorEnv(num_envs, **_taken(arguments))


def _taken(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, with fields of `EnvConfig` put into `config`."""
    fields = {f.name for f in dataclasses.fields(EnvConfig)}
    own = {name: value for name, value in arguments.items() if name not in fields}
    settings = {name: value for name, value in arguments.items() if name in fields}
    return {**own, "config": changed_config(own.get("config"), own.get("scenario"), settings)}


def first_streams(seed: int, num_students: int) -> NDArray[np.int64]:
    """[N, 6], the streams of tasks that `DistillationVectorEnv.reset(seed=seed)` begins with."""
    generators = [gymnasium.utils.seeding.np_random(seed + i)[0] for i in range(num_students)]
    return np.stack([_stream_state(g) for g in generators])


def _stream_state(generator: np.random.Generator) -> NDArray[np.int64]:
    """[6]: state and increment (128 bits each, in halves), and the half of a draw that is left over."""
    known = generator.bit_generator.state
    wide = b"".join(known["state"][name].to_bytes(16, "little") for name in ("state", "inc"))
    return np.append(np.frombuffer(wide, np.int64), [known["has_uint32"], known["uinteger"]]).astype(np.int64)


def _stream(row: NDArray[np.int64]) -> np.random.Generator:
    """Return the generator of a `_stream_state` [6]."""
    state, increment = (int.from_bytes(row[i : i + 2].tobytes(), "little") for i in (0, 2))
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": increment},
        "has_uint32": int(row[4]) & 1,
        "uinteger": int(row[5]) & 0xFFFFFFFF,
    }
    return np.random.Generator(bits)
