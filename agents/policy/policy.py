"""The learned policy as a plain function of named tensors: what a bundle holds and a replay runs."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlkd.agents.baselines.teacher_weights import weighing
from rlkd.agents.policy.controllers import Controller
from rlkd.envs.action import CONTROLS, ControlConfig, change
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.sb3 import CLIP

TENSORS = ("hidden.0.weight", "hidden.0.bias", "hidden.1.weight", "hidden.1.bias", "action.weight", "action.bias")
HIDDEN = 1e30  # deviation of an observation that the policy is not shown: it reads 0


@dataclass(frozen=True)
class Policy:
    """Two tanh layers from the standardised observation to the mean change of every control."""

    weights: dict[str, Tensor]  # by TENSORS; hidden.0.weight is [H, O], action.weight [12, H]
    mean: Tensor  # [O], of the observations, fixed before training
    deviation: Tensor  # [O]
    start: Tensor  # [12], the setting that its actions change
    controls: ControlConfig
    teacher_weights: Tensor | None = None  # [3], how several teachers are weighed (`rlkd.students.fusion`)

    def act(self, observation: Tensor) -> Tensor:
        """Return changes [N, 12] in [-1, 1] for observations [N, O]."""
        w = self.weights
        x = ((observation - self.mean) / self.deviation).clamp(-CLIP, CLIP)  # [N, O]
        for layer in range(2):
            x = torch.tanh(x @ w[f"hidden.{layer}.weight"].T + w[f"hidden.{layer}.bias"])  # [N, H]
        return (x @ w["action.weight"].T + w["action.bias"]).clamp(-1.0, 1.0)

    def controller(self) -> Controller:
        """Return the closed-loop controller: controls of each window from its observation, without exploration.

        A policy with `teacher_weights` also weighs the teachers of every student.
        """

        def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
            known = self.readable(observation, episodes.unknown)
            return change(episodes.u, self.act(known), episodes.start, self.controls)

        return controller if self.teacher_weights is None else weighing(controller, self.teacher_weights)

    def readable(self, observation: Tensor, unknown: Tensor) -> Tensor:
        """Return observations [N, O] with the training mean where `unknown` [O] is true."""
        return torch.where(unknown, self.mean, observation)

    def spread_of(self, observation: Tensor) -> Tensor:
        """[N], largest distance of an observation from the training mean, in training deviations."""
        return torch.as_tensor(((observation - self.mean) / self.deviation).abs().amax(-1))


def policy_from_sb3(
    state: dict[str, Tensor], mean: np.ndarray, deviation: np.ndarray, *, start: Tensor, controls: ControlConfig
) -> Policy:
    """Take the actor out of a stable-baselines3 `MlpPolicy` state dict."""
    names = {
        "hidden.0": "mlp_extractor.policy_net.0",
        "hidden.1": "mlp_extractor.policy_net.2",
        "action": "action_net",
    }
    weights = {
        f"{name}.{part}": state[f"{source}.{part}"].detach().clone()
        for name, source in names.items()
        for part in ("weight", "bias")
    }
    return Policy(weights, torch.from_numpy(mean), torch.from_numpy(deviation), start, controls)


def unchanged(policy: Policy) -> Policy:
    """Return the policy with the last layer of its actor at zero: it keeps its start unchanged."""
    last = {name: torch.zeros_like(policy.weights[name]) for name in ("action.weight", "action.bias")}
    return replace(policy, weights={**policy.weights, **last})


def actor_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a policy's `weights` with `hidden` units a layer."""
    num_observations, num_controls = len(OBSERVATIONS), len(CONTROLS)
    rows = (hidden, num_observations), (hidden,), (hidden, hidden), (hidden,), (num_controls, hidden), (num_controls,)
    return dict(zip(TENSORS, rows, strict=True))
