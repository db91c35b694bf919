"""Turn an agent that was trained with plain stable-baselines3 into a policy that `rlkd distil --policy` takes."""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from rlkd.agents.policy.policy import Policy
from rlkd.agents.policy.policy import policy_from_sb3 as of_state
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.sb3 import CLIP, SB3VecEnv
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError


def policy_from_sb3(model: OnPolicyAlgorithm, scenario: Scenario | None = None) -> Policy:
    """Take the actor out of an agent of stable-baselines3.

    Args:
        model: PPO or A2C with `MlpPolicy`, an actor of two equally wide tanh layers
            (`policy_kwargs={"net_arch": [64, 64]}`), trained on `rlkd.make_sb3_env`
            or on `rlkd/DistillationFlat-v0`, with or without `VecNormalize(clip_obs=5.0)`.
        scenario: gives the start and the ranges of the controls; by default that of the model's environment.

    Returns:
        The policy; `rlkd.save_policy(policy, FOLDER, {})` writes it.

    Raises:
        UserError: another kind of agent, network or environment.
    """
    if not isinstance(model, OnPolicyAlgorithm) or type(model).__name__ not in ("PPO", "A2C", "_ResumablePPO"):
        raise UserError(f"policy_from_sb3: got {type(model).__name__}; allowed: PPO or A2C with MlpPolicy")
    env = model.get_env()
    net: Any = getattr(getattr(model.policy, "mlp_extractor", None), "policy_net", None)
    layers = list(net) if isinstance(net, nn.Sequential) else []
    kinds = [type(layer) for layer in layers]
    if kinds != [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh] or layers[0].out_features != layers[2].out_features:
        raise UserError(
            f"policy_from_sb3: got an actor of {[k.__name__ for k in kinds]}; allowed: two tanh layers of one width, "
            "MlpPolicy with net_arch [64, 64]"
        )
    space = model.observation_space
    if not isinstance(space, Box) or space.shape != (len(OBSERVATIONS),):
        raise UserError(
            f"policy_from_sb3: got observations {space.shape}; allowed: [{len(OBSERVATIONS)}], those of the environment"
        )
    if scenario is None:
        scenario = _scenario_of(env)
    if not isinstance(scenario, Scenario):
        raise UserError(
            f"policy_from_sb3: got scenario {scenario!r:.60}; allowed: one of rlkd.build_scenario, or none for that of "
            "the model's environment"
        )
    mean, deviation = _scale_of(env)
    return of_state(model.policy.state_dict(), mean, deviation, start=scenario.start, controls=scenario.config.controls)


def _unwrapped(env: VecEnv | None) -> Any:
    """Return the innermost vector environment."""
    now: Any = env
    while now is not None and hasattr(now, "venv"):
        now = now.venv
    return now


def _scenario_of(env: VecEnv | None) -> Scenario:
    """Return the scenario that the environment's students train in; the first of several."""
    inner = _unwrapped(env)
    if isinstance(inner, SB3VecEnv):
        return inner.envs[0].scenario
    single = getattr(inner, "envs", [None])[0]
    found = getattr(getattr(single, "unwrapped", None), "scenario", None)
    if not isinstance(found, Scenario):
        raise UserError("policy_from_sb3: the model has no environment that tells its scenario; give one: scenario=...")
    return found


def _scale_of(env: VecEnv | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and deviation [O] by which the agent's observations were standardised; 0 and 1 where none were."""
    now: Any = env
    found: tuple[NDArray[Any], NDArray[Any]] | None = None
    while now is not None:
        if isinstance(now, VecNormalize) and now.norm_obs:
            if now.clip_obs > CLIP:
                raise UserError(
                    f"policy_from_sb3: got VecNormalize(clip_obs={now.clip_obs:g}); allowed: at most {CLIP:g}"
                )
            if found is not None or isinstance(_unwrapped(env), SB3VecEnv):
                raise UserError("policy_from_sb3: observations are standardised twice; allowed: once")
            moments: Any = now.obs_rms
            found = moments.mean, np.sqrt(moments.var + now.epsilon)
        now = getattr(now, "venv", None)
    inner = _unwrapped(env)
    if isinstance(inner, SB3VecEnv):
        found = inner.mean, inner.deviation
    if found is None:
        found = np.zeros(len(OBSERVATIONS)), np.ones(len(OBSERVATIONS))
    return found[0].astype(np.float32), found[1].astype(np.float32)


def check_same_actions(model: Any, policy: Policy, observations: NDArray[np.float32]) -> float:
    """Return the largest difference between the agent's and the policy's mean actions for observations [N, O].

    Args:
        model: as of `policy_from_sb3`.
        policy: made of it.
        observations: as the environment gives them, before they are standardised.
    """
    scaled = ((torch.from_numpy(observations) - policy.mean) / policy.deviation).clamp(-CLIP, CLIP)
    with torch.no_grad():
        actions = model.predict(scaled.numpy(), deterministic=True)[0]
    return float(np.abs(actions - policy.act(torch.from_numpy(observations)).numpy()).max())
