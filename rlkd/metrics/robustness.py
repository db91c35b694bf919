"""Metrics of changed inputs: adversarial steps, and corruptions."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Tensor]  # inputs [B, *any] to logits [B, C]
Bounds = tuple[float, float] | None


def fgsm(model: Model, inputs: Tensor, labels: Tensor, *, epsilon: float, bounds: Bounds = None) -> Tensor:
    """Return inputs moved by one step that raises the cross entropy (fast gradient sign method).

    Formula: clip(x + eps sign(d CE / dx)) (Goodfellow, Shlens & Szegedy 2015, https://arxiv.org/abs/1412.6572).

    Args:
        model: gives logits of inputs.
        inputs: [B, *any].
        labels: [B] int64.
        epsilon: size of the step, in units of the inputs.
        bounds: lowest and highest value of an input, or None.
    """
    return _clipped(inputs + epsilon * _ascent(model, inputs, labels), bounds)


def pgd(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_steps: int = 10,
    bounds: Bounds = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return inputs moved by projected gradient ascent within `epsilon` of where they were.

    Formula: x <- clip(x0 + clip(x + a sign(d CE / dx) - x0, -eps, eps)), a = 2.5 eps / steps (Madry et al. 2018,
    https://arxiv.org/abs/1706.06083).

    Args:
        model: as in `fgsm`.
        inputs: as in `fgsm`.
        labels: as in `fgsm`.
        epsilon: largest change of an input.
        num_steps: number of steps.
        bounds: as in `fgsm`.
        generator: draws a start within `epsilon`; by default the attack starts at the inputs.
    """
    moved = inputs.clone()
    if generator is not None:
        moved = moved + epsilon * (2 * torch.rand(inputs.shape, generator=generator, dtype=inputs.dtype) - 1)
    size = 2.5 * epsilon / num_steps
    for _ in range(num_steps):
        moved = moved + size * _ascent(model, moved, labels)
        moved = _clipped(inputs + (moved - inputs).clamp(-epsilon, epsilon), bounds)
    return moved


def _ascent(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the sign of the gradient of the cross entropy by the inputs."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.sign()


def _clipped(inputs: Tensor, bounds: Bounds) -> Tensor:
    return inputs if bounds is None else inputs.clamp(*bounds)


def _noise(inputs: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add normal noise."""
    return inputs + strength * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)


def _missing(inputs: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Set a share of the inputs to 0."""
    return inputs * (torch.rand(inputs.shape, generator=generator) >= strength)


def _contrast(inputs: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Draw each sample towards its mean."""
    mean = inputs.flatten(1).mean(1).reshape(-1, *(1,) * (inputs.ndim - 1))
    return mean + (1 - strength) * (inputs - mean)


def _shift(inputs: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Move images to the right by a share of their width, at least one pixel; what is uncovered is 0."""
    pixels = max(1, round(strength * inputs.shape[-1]))
    return F.pad(inputs, (pixels, 0))[..., : inputs.shape[-1]]


# Name -> (change of inputs by a strength, strengths from weak to strong, whether inputs must be images).
CORRUPTIONS: Mapping[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...], bool]] = (
    MappingProxyType(
        {
            "noise": (_noise, (0.1, 0.2, 0.4), False),
            "missing": (_missing, (0.1, 0.2, 0.4), False),
            "contrast": (_contrast, (0.25, 0.5, 0.75), False),
            "shift": (_shift, (0.1, 0.2), True),
        }
    )
)


def corrupted(name: str, inputs: Tensor, scale: float, generator: torch.Generator) -> list[Tensor]:
    """Return the inputs under each strength of one of `CORRUPTIONS`, in the spirit of ImageNet-C.

    Args:
        name: of the corruption (cf. Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261).
        inputs: [B, D] or [B, H, W] or [B, channels, H, W].
        scale: of an input; the strength of noise is in its units.
        generator: of random changes.
    """
    change, strengths, _ = CORRUPTIONS[name]
    return [change(inputs / scale, strength, generator) * scale for strength in strengths]
