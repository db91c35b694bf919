"""The state of a PPO training between two iterations, so that one that was stopped goes on to the bit.

Besides the policy and its Adam there are stable-baselines3's counters, the figures that wait for the next line of its
log, torch's and numpy's global random states (it draws from those), the evaluations and the best policy so far, and the
streams that the students' next tasks are drawn from; between two rollouts no student is in training.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from torch import Tensor

from rlkd.agents.ppo.evaluation import Choice
from rlkd.agents.ppo.rollouts import RolloutEnv
from rlkd.errors import UserError
from rlkd.io.checkpoints import Checkpoint
from rlkd.io.files import number, reason, whole
from rlkd.students.optimizers import load_optimizer_state, optimizer_state

MAX_COUNT = 2**62


def capture(agent: PPO, env: RolloutEnv, choice: Choice, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors, and what else is needed as JSON; to be called after the update of `iteration` (from 1)."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global one is what SB3 draws from
    tensors = {
        **{f"policy.{name}": tensor.clone() for name, tensor in agent.policy.state_dict().items()},
        **optimizer_state(agent.policy.optimizer),
        **{f"students.{name}": tensor for name, tensor in env.training_state().items()},
        **{f"choice.{name}": tensor for name, tensor in choice.training_state().items()},
        "torch_random": torch.get_rng_state(),
        "numpy_random": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
    }
    logger = agent.logger
    note = {
        "iteration": iteration,
        "num_timesteps": agent.num_timesteps,
        "num_updates": agent._n_updates,
        "progress_remaining": agent._current_progress_remaining,
        "episodes": [[e["r"], e["l"], e["t"]] for e in agent.ep_info_buffer or ()],
        # as hexadecimal text: a share of explained variance can be no number
        "figures": {name: float(value).hex() for name, value in logger.name_to_value.items()},
        "not_for": {name: list(outputs) for name, outputs in logger.name_to_excluded.items()},
        "numpy_random": [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
    }
    return tensors, note


def restore(agent: PPO, env: RolloutEnv, choice: Choice, saved: Checkpoint) -> int:
    """Put a new agent, its environment and its choice where `capture` found others of the same configuration.

    Returns:
        The iteration.

    Raises:
        UserError: the checkpoint does not fit them.
    """
    now, _ = capture(agent, env, choice, 0)  # tells names, types and shapes
    tensors = saved.tensors({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in now.items()})
    agent.policy.load_state_dict({name: tensors[f"policy.{name}"] for name in agent.policy.state_dict()})
    load_optimizer_state(agent.policy.optimizer, tensors)
    try:
        env.load_training_state(_part(tensors, "students."))
        choice.load_training_state(_part(tensors, "choice."))
        _restore_note(agent, saved.note["state"])
        torch.set_rng_state(tensors["torch_random"].clone())
        _restore_numpy(tensors["numpy_random"].numpy(), saved.note["state"]["numpy_random"])
        return whole(saved.note["state"]["iteration"], "iteration", 1, MAX_COUNT)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(
            f"{saved.path}: not the state of this training, or a damaged one ({reason(error):.100})"
        ) from error


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _restore_note(agent: PPO, note: dict[str, Any]) -> None:
    agent.num_timesteps = whole(note["num_timesteps"], "num_timesteps", 0, MAX_COUNT)
    agent._n_updates = whole(note["num_updates"], "num_updates", 0, MAX_COUNT)
    agent._current_progress_remaining = number(note["progress_remaining"], "progress_remaining", 0.0, 1.0)
    assert agent.ep_info_buffer is not None
    agent.ep_info_buffer.clear()
    for episode_return, length, wall_s in note["episodes"]:
        row = {"r": number(episode_return, "r"), "l": whole(length, "l", 0, MAX_COUNT), "t": number(wall_s, "t")}
        agent.ep_info_buffer.append(row)
    for name, value in note["figures"].items():
        agent.logger.record(name, float.fromhex(value), exclude=tuple(str(o) for o in note["not_for"][name]))


def _restore_numpy(key: NDArray[np.int64], rest: list[Any]) -> None:
    position, has_gauss, gauss = rest
    state = {"key": key.astype(np.uint32), "pos": whole(position, "numpy_random", 0, len(key))}
    has = whole(has_gauss, "numpy_random", 0, 1)
    whole_state = {"bit_generator": "MT19937", "state": state, "has_gauss": has, "gauss": number(gauss, "numpy_random")}
    np.random.set_state(whole_state)  # noqa: NPY002 - as above
