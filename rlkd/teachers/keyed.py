"""Answers of a teacher to samples and to augmented samples, each computed once and never taken for another input's."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class SignalCache:
    """A teacher whose answers are kept by sample and augmentation.

    After the first epoch, plain samples and those of a repeated augmentation cause no teacher forward. Stored answers
    have a fingerprint of their inputs; the same key with other inputs is an error instead of a stale answer.

    Args:
        teacher: gives answers [B, *any] to inputs [B, *any].
        num_samples: S, of the data set.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor], num_samples: int) -> None:
        self._teacher, self._num_samples = teacher, num_samples
        self._stored: dict[Hashable, tuple[Tensor, Tensor, Tensor]] = {}  # answers, fingerprints, whether present
        self.num_forwards = 0
        """Samples that the teacher has answered."""

    @torch.no_grad()
    def __call__(self, inputs: Tensor, samples: Tensor, key: Hashable = "plain") -> Tensor:
        """Return the teacher's answers [B, *any].

        Args:
            inputs: [B, *any], as the student sees them.
            samples: [B] int64, each sample's place in the data set.
            key: names the augmentation, every number that it drew included; None for inputs that never come again,
                whose answers are not kept.

        Raises:
            ValueError: inputs differ from those that had this key before.
        """
        if key is None:
            return self._ask(inputs)
        prints = _fingerprints(inputs)
        if key not in self._stored:
            fresh = self._ask(inputs)
            self._stored[key] = (
                fresh.new_zeros(self._num_samples, *fresh.shape[1:]),
                prints.new_zeros(self._num_samples),
                torch.zeros(self._num_samples, dtype=torch.bool),
            )
            self._store(key, samples, fresh, prints)
            return fresh
        answers, known, present = self._stored[key]
        differs = present[samples] & (known[samples] != prints)
        if differs.any():
            raise ValueError(
                f"SignalCache: the inputs of sample {int(samples[differs][0])} differ from those that were answered "
                f"under key {key!r:.60}; give every augmentation a key of its own, or None"
            )
        missing = ~present[samples]
        if missing.any():
            self._store(key, samples[missing], self._ask(inputs[missing]), prints[missing])
        return answers[samples]

    def _ask(self, inputs: Tensor) -> Tensor:
        self.num_forwards += len(inputs)
        return self._teacher(inputs)

    def _store(self, key: Hashable, samples: Tensor, fresh: Tensor, prints: Tensor) -> None:
        answers, known, present = self._stored[key]
        answers[samples], known[samples], present[samples] = fresh, prints, True


def _fingerprints(inputs: Tensor) -> Tensor:
    """Return [B] float64, a projection of each sample's inputs that other inputs do not share."""
    flat = inputs.flatten(1).double()
    places = torch.arange(1, flat.shape[1] + 1, dtype=torch.float64)
    # row by row, so that a sample has the same sum in every batch
    return (flat * (places * 0.7548776662466927).frac().add(0.5)).sum(1)
