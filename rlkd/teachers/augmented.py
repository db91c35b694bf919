"""More from the same teacher: noise on its answers, mixed samples, and the samples that are hard for it."""

from typing import NamedTuple

import torch
from torch import Tensor


def noisy_logits(teacher_logits: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Return logits under multiplicative noise, as if many teachers had answered.

    Formula: z' = (1 + xi) z, xi normal with this deviation, one number a logit (Sau & Balasubramanian 2016,
    https://arxiv.org/abs/1610.09650).

    Args:
        teacher_logits: [B, C].
        deviation: sigma, at least 0.
        generator: draws the noise.
    """
    noise = torch.randn(teacher_logits.shape, generator=generator, dtype=teacher_logits.dtype)
    return teacher_logits * (1 + deviation * noise.to(teacher_logits.device))


class Mixed(NamedTuple):
    """A batch of mixed samples."""

    inputs: Tensor  # [B, *any]
    partner: Tensor  # [B] int64, the sample of the batch that each one is mixed with
    share: float  # of the sample itself; its partner has the rest


def mixup(inputs: Tensor, alpha: float, generator: torch.Generator) -> Mixed:
    """Mix each sample with another one of the batch.

    Formula: lambda x_i + (1 - lambda) x_j, lambda from Beta(alpha, alpha), one for the batch (Zhang et al. 2018,
    https://arxiv.org/abs/1710.09412). The teacher answers the mixed inputs anew (`SignalCache` with key None): the mix
    of its answers is not its answer to the mix (Beyer et al. 2022, https://arxiv.org/abs/2106.05237).

    Args:
        inputs: [B, *any].
        alpha: above 0.
        generator: draws lambda and the partners.
    """
    a, b = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator)
    share = float(a / (a + b).clamp_min(1e-12))
    partner = torch.randperm(len(inputs), generator=generator)
    return Mixed(share * inputs + (1 - share) * inputs[partner], partner, share)


def hard_samples(
    teacher_logits: Tensor,
    labels: Tensor,
    bounds: tuple[float, float] = (0.3, 0.7),
    shares: tuple[float, float] = (0.1, 0.2),
) -> Tensor:
    """Choose the samples whose label the teacher gives a middling probability, 10 to 20 % of all.

    Samples within `bounds` are chosen. Where these are fewer than the first share, those nearest to the middle join
    them; where they are more than the second, those nearest to the middle stay.

    Args:
        teacher_logits: [S, C].
        labels: [S] int64.
        bounds: lowest and highest probability of the label.
        shares: least and largest share of the samples.

    Returns:
        [H] int64, rising places of the chosen samples.
    """
    p = teacher_logits.softmax(-1).gather(-1, labels[:, None])[:, 0]  # [S]
    low, high = bounds
    within = int(((p >= low) & (p <= high)).sum())
    least, most = (max(1, round(share * len(labels))) for share in shares)
    count = min(max(within, least), most)
    # within the bounds is nearer to the middle than outside them
    return (p - (low + high) / 2).abs().argsort(stable=True)[:count].sort().values
