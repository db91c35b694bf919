"""Cost limits, met by construction: unit controls are moved into what the limits allow before they act."""

import torch
from torch import Tensor

from rlkd.compression.selection import num_kept
from rlkd.cost import Cost
from rlkd.envs.action import CONTROLS, EXIT_KINDS, decode, exit_kind, with_exit_kind
from rlkd.envs.scenario import EpisodeScenario

NUM_BISECTIONS = 10
KEPT = [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]


def within_limits(u: Tensor, limits: Tensor, scenario: EpisodeScenario) -> Tensor:
    """Lower the shares kept in unit controls `u` [N, 12] together until all costs are within `limits` [N, 4].

    Costs are those of a student whose samples all leave at the end, the most that it can cost. Where even the smallest
    shares cost more, all samples leave at the first exit, and shares are lowered until that is within the limits.

    Args:
        u: [N, 12].
        limits: ratios to the dense student in the order of `rlkd.data.distribution.COSTS`; inf: no limit.
        scenario: gives the costs.
    """
    limited = limits.isfinite().any(-1)
    if not limited.any():
        return u
    moved = _lowered_until_it_fits(u, limits, scenario, at_first=False)
    stuck = limited & ~_fits(moved, limits, scenario, at_first=False)
    if stuck.any():
        first = _lowered_until_it_fits(with_exit_kind(u, "first"), limits, scenario, at_first=True)
        moved = torch.where(stuck[:, None], first, moved)
    return torch.where(limited[:, None], moved, u)


def must_leave_first(u: Tensor, limits: Tensor, scenario: EpisodeScenario) -> Tensor:
    """[N] bool: by `u` [N, 12] all samples leave at the first exit, and at the end they would break `limits` [N, 4]."""
    asks_first = exit_kind(u) == EXIT_KINDS.index("first")
    if not (asks_first & limits.isfinite().any(-1)).any():
        return torch.zeros_like(asks_first)
    return asks_first & ~_fits(u, limits, scenario, at_first=False)


def largest_cost(u: Tensor, scenario: EpisodeScenario, *, at_first: bool) -> Cost:
    """Return the most that students with `u` [N, 12] can cost, or their cost if all samples leave at the first exit."""
    controls = decode(u, scenario.config.controls, scenario.data.num_classes)
    inputs = num_kept(controls.feature_keep[:, None], scenario.group_sizes[0])  # [N, 1]
    units = scenario.units_kept(controls.unit_keep)  # [N, G - 1]
    kept = torch.cat([inputs, units], dim=-1)  # [N, G]
    rates = torch.eye(scenario.num_exits)[0 if at_first else -1].expand(len(u), -1)  # [N, E]
    if at_first:
        threshold = torch.full((len(u),), 1.0 / scenario.data.num_classes)
    else:  # deciding costs, too, where samples may leave by a threshold
        by_threshold = exit_kind(u) == EXIT_KINDS.index("threshold")
        threshold = torch.where(by_threshold, controls.exit_threshold, torch.ones(len(u)))
    return scenario.cost(kept, rates, threshold)


def _lowered_until_it_fits(u: Tensor, limits: Tensor, scenario: EpisodeScenario, *, at_first: bool) -> Tensor:
    """`u` [N, 12] with both shares lowered by as little as fits, or to their ends where nothing does."""
    low, high = torch.zeros(len(u)), torch.ones(len(u))  # how far both controls are lowered
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        fits = _fits(_lowered(u, middle), limits, scenario, at_first=at_first)
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    shift = torch.where(_fits(u, limits, scenario, at_first=at_first), torch.zeros_like(high), high)
    return _lowered(u, shift)


def _lowered(u: Tensor, shift: Tensor) -> Tensor:
    result = u.clone()
    result[:, KEPT] = (u[:, KEPT] - shift[:, None]).clamp_min(0.0)
    return result


def _fits(u: Tensor, limits: Tensor, scenario: EpisodeScenario, *, at_first: bool) -> Tensor:
    return (largest_cost(u, scenario, at_first=at_first).ratios <= limits).all(-1)
