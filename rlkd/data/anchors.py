"""Perplexity as a number in [0, 1], so that one score and one policy serve classifiers and language models."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """Two perplexities, the one that counts as 0 and the one that counts as 1."""

    worst: float
    best: float

    def quality(self, nats: Tensor) -> Tensor:
        """(log worst - nats) / (log worst - log best), clipped to [0, 1], of mean cross entropies of any shape.

        Between a guess over all V tokens (worst = V) and certainty (best = 1) this is 1 - nats / log V: the part of
        a guess's uncertainty that is gone.
        """
        top, bottom = math.log(self.best), math.log(self.worst)
        return ((bottom - nats) / (bottom - top)).clamp(0.0, 1.0)
