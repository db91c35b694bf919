"""Adapters that bring a student's hidden features to the teacher's shape: width, and tokens or positions."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["linear", "conv", "bottleneck"]


def pooled(features: Tensor) -> Tensor:
    """Return features [B, U] as they are, and features [B, U, H, W] as their mean over positions."""
    return features.mean((-2, -1)) if features.ndim == 4 else features


def adapter(kind: Kind, width: int, teacher_width: int) -> nn.Module:
    """Return a new adapter of features, for the loss `fitnets` and its relatives.

    Args:
        kind: linear for [B, U] or [B, L, U], conv (1x1 convolution) for [B, U, H, W], or bottleneck for [B, U] or
            [B, L, U].
        width: the student's U.
        teacher_width: F.

    Raises:
        ValueError: another kind.
    """
    if kind == "linear":
        return nn.Linear(width, teacher_width)
    if kind == "conv":
        return nn.Conv2d(width, teacher_width, 1)
    if kind == "bottleneck":
        return Bottleneck(width, teacher_width)
    raise ValueError(f"adapter: got kind {kind!r}; allowed: linear, conv, bottleneck")


class Bottleneck(nn.Module):
    """A two-layer network through a narrow layer, beside a residual path that is projected where widths differ.

    Formula: P h + W2 gelu(W1 h), P the identity for equal widths and a linear map otherwise (Houlsby et al. 2019,
    https://arxiv.org/abs/1902.00751, whose widths are equal; the projected shortcut is that of He et al. 2016,
    https://arxiv.org/abs/1512.03385). W2 begins at zero, so the adapter begins as its residual path.

    Args:
        width: U of the student's features [*N, U].
        teacher_width: F of the result [*N, F].
        narrow: units of the layer between; by default a quarter of the smaller width.
    """

    def __init__(self, width: int, teacher_width: int, narrow: int | None = None) -> None:
        super().__init__()
        narrow = narrow or max(1, min(width, teacher_width) // 4)
        self.shortcut = nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)
        self.down = nn.Linear(width, narrow)
        self.up = nn.Linear(narrow, teacher_width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return [*N, F] for features [*N, U]."""
        result: Tensor = self.shortcut(features) + self.up(F.gelu(self.down(features)))
        return result


def resample_tokens(tokens: Tensor, length: int) -> Tensor:
    """Return [B, L', U] of tokens [B, L, U], linearly between neighbours; a longer sequence is averaged.

    Args:
        tokens: [B, L, U], without special tokens.
        length: L'.
    """
    columns = tokens.transpose(1, 2)  # [B, U, L]
    if length <= tokens.shape[1]:
        return F.adaptive_avg_pool1d(columns, length).transpose(1, 2)
    return F.interpolate(columns, size=length, mode="linear", align_corners=False).transpose(1, 2)


def tokens_to_positions(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return a transformer's patch tokens as features of a convolution, [B, U, H, W], resampled to that grid.

    Args:
        tokens: [B, L, U], patches of a square image row by row; where L is a square plus one, the first token is taken
            for the class token and left out.
        height: H.
        width: W.

    Raises:
        ValueError: L is neither a square nor a square plus one.
    """
    length = tokens.shape[1]
    side = math.isqrt(length)
    if side * side != length:
        side, tokens = math.isqrt(length - 1), tokens[:, 1:]
    if side * side != tokens.shape[1]:
        raise ValueError(
            f"tokens_to_positions: got {length} tokens; allowed: a square number, or one more with a class token. "
            "Remove other special tokens first, or compare means over tokens"
        )
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)  # [B, U, S, S]
    return resample_positions(grid, height, width)


def positions_to_tokens(features: Tensor, length: int) -> Tensor:
    """Return features of a convolution [B, U, H, W] as `length` tokens [B, L, U], row by row, for a square length.

    Raises:
        ValueError: the length is no square number.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"positions_to_tokens: got length {length}; allowed: a square number of patches")
    return resample_positions(features, side, side).flatten(2).transpose(1, 2)


def resample_positions(features: Tensor, height: int, width: int) -> Tensor:
    """Return [B, U, height, width] of features [B, U, H, W]: averaged where there are fewer, else bilinear."""
    if height <= features.shape[2] and width <= features.shape[3]:
        return F.adaptive_avg_pool2d(features, (height, width))
    return F.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)


class DomainNorm(nn.Module):
    """A domain-adaptation layer: features are standardised by the statistics of their own domain.

    Formula: gamma (h - mean_d) / std_d + beta, with mean and deviation of domain d alone and one gamma and beta for all
    (adaptive batch normalisation, Li et al. 2017, https://arxiv.org/abs/1603.04779). A teacher of one domain can then
    teach a student on another.

    Args:
        width: U.
        num_domains: number of domains.
    """

    def __init__(self, width: int, num_domains: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, affine=False) for _ in range(num_domains))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor, domain: int) -> Tensor:
        """Return [B, U] for features [B, U], all of one domain, counted from 0."""
        result: Tensor = self.norms[domain](features) * self.weight + self.bias
        return result
