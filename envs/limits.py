"""Cost limits, met by construction: unit controls are moved into what a limit allows before they act."""

import torch
from torch import Tensor

from rlkd.envs.action import CONTROLS, decode, with_exit_kind
from rlkd.envs.scenario import EpisodeScenario

NUM_BISECTIONS = 10
KEPT = [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]


def within_limits(u: Tensor, limit: Tensor, scenario: EpisodeScenario) -> Tensor:
    """Unit controls `u` [N, 12], with the shares kept lowered together until the latency ratio is at most `limit` [N].

    The ratio is that of a student none of whose samples leave early, the most it can cost. Where even the smallest
    shares cost more, all samples leave at the first exit.
    """
    limited = limit.isfinite()
    if not limited.any():
        return u
    low, high = torch.zeros_like(limit), torch.ones_like(limit)  # how far both controls are lowered
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        fits = _latency(_lowered(u, middle), scenario) <= limit
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    shift = torch.where(_latency(u, scenario) <= limit, torch.zeros_like(high), high)
    moved = _lowered(u, shift)
    too_much = limited & (_latency(moved, scenario) > limit)
    moved = torch.where(too_much[:, None], with_exit_kind(moved, "first"), moved)
    return torch.where(limited[:, None], moved, u)


def _lowered(u: Tensor, shift: Tensor) -> Tensor:
    result = u.clone()
    result[:, KEPT] = (u[:, KEPT] - shift[:, None]).clamp_min(0.0)
    return result


def _latency(u: Tensor, scenario: EpisodeScenario) -> Tensor:
    """[N], latency ratio to the dense student if no sample leaves early."""
    controls = decode(u, scenario.config.controls, scenario.data.num_classes)
    sizes = torch.tensor(scenario.group_sizes, dtype=torch.float32)  # [G]
    shares = torch.where(torch.arange(len(sizes)) == 0, controls.feature_keep[:, None], controls.unit_keep[:, None])
    kept = (shares * sizes).round().clamp_min(1.0)  # [N, G]
    rates = torch.eye(scenario.num_exits)[-1:].expand(len(u), -1)  # [N, E]
    return scenario.cost(kept, rates, torch.ones(len(u))).latency_ratio
