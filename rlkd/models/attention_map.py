"""Activation-based attention maps of chains and transformers (Zagoruyko & Komodakis 2017)."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_map(features: Tensor, num_positions: int) -> Tensor:
    """Return the unit-norm map of mean squared activation over `num_positions` positions.

    Formula: Q = pool(sum_u h_u^2), Q / ||Q||_2. As in the paper, channels are summed out of convolutional
    features and positions are pixels. A fully connected layer has no pixels: there the units themselves are
    the positions (a departure; the paper treats convolutions only). Adaptive mean pooling brings maps of
    different sizes to a common one.

    Args:
        features: [B, U] or [B, U, H, W].
        num_positions: positions of the map; a square number for convolutional features.

    Returns:
        [B, num_positions], each row of norm 1 (or 0 where nothing is active).
    """
    if features.ndim == 4:
        side = math.isqrt(num_positions)
        energy = F.adaptive_avg_pool2d(features.square().sum(1, keepdim=True), side).flatten(1)  # [B, P]
    else:
        energy = features.square() @ _pooling(features.shape[-1], num_positions, features.dtype, features.device)
    return F.normalize(energy, dim=-1, eps=1e-8)


@functools.cache
def _pooling(size: int, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [size, P], adaptive mean pooling of a vector as a matrix, which is many times faster under vmap."""
    with torch.inference_mode(False):  # the cached tensor must work in training, too
        pooling = F.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64)[:, None], num_positions)[:, 0]
        return pooling.to(device, dtype)
