"""Fake quantisation: float values rounded to the grid that an integer runtime computes on, with a gradient.

The gradient passes straight through the rounding and is zero outside the grid (Bengio et al. 2013, arXiv:1308.3432;
Jacob et al. 2018, arXiv:1712.05877). All functions are pure.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SCALE = 1e-8


class Grid(NamedTuple):
    """Unsigned integers 0 to 2^bits - 1 that stand for (q - zero_point) * scale."""

    scale: Tensor  # a scalar > 0
    zero_point: Tensor  # a scalar, a whole number
    bits: int

    @property
    def top(self) -> int:
        """Return the largest integer."""
        return (1 << self.bits) - 1


def grid_between(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Return the grid from `low` to `high`, widened to hold 0 exactly.

    Args:
        low, high: scalars.
        bits: 2 to 8.
    """
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    top = (1 << bits) - 1
    scale = ((high - low) / top).clamp_min(LEAST_SCALE)
    return Grid(scale, (-low / scale).round().clamp(0, top), bits)


def grid_of(values: Tensor, bits: int) -> Grid:
    """Return the grid of all `values`; no gradient runs through it."""
    detached = values.detach()
    return grid_between(detached.min(), detached.max(), bits)


def to_integers(values: Tensor, grid: Grid) -> Tensor:
    """Return the integers 0 to 2^bits - 1 that stand for `values`, as floats; halves go to the even neighbour."""
    return ((values / grid.scale).round() + grid.zero_point).clamp(0, grid.top)


def from_integers(integers: Tensor, grid: Grid) -> Tensor:
    """Return what the integers stand for."""
    return (integers - grid.zero_point) * grid.scale


def fake_quantise(values: Tensor, grid: Grid) -> Tensor:
    """Return the values rounded to the grid; the gradient is 1 inside of it and 0 outside."""
    low, high = -grid.zero_point * grid.scale, (grid.top - grid.zero_point) * grid.scale
    inside = torch.minimum(torch.maximum(values, low), high)
    return inside + (from_integers(to_integers(values, grid), grid) - inside).detach()


def fake_bias(bias: Tensor, inputs: Grid, weight: Grid) -> Tensor:
    """Return a bias rounded to what a 32-bit sum of products counts in: the product of both scales."""
    step = inputs.scale * weight.scale
    return bias + ((bias / step).round() * step - bias).detach()
