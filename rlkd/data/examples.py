"""Samples of a real model's task: several input tensors by name, labels, three splits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkd.data.samples import Split

PADDING_MASK = "attention_mask"


@dataclass(frozen=True)
class Examples:
    """As `DataSet`, with the inputs that a model's forward takes by keyword."""

    name: str
    inputs: dict[str, Tensor]  # each [S, ...]; texts are padded on the right to one length, with an attention_mask
    labels: Tensor  # [S] int64
    num_classes: int
    splits: dict[Split, Tensor]  # each [S_split] int64, disjoint
    report: str = field(
        default="", kw_only=True
    )  # what was seen, used and left out, the splits, and the class that each label means
    fixed_length: bool = field(default=False, kw_only=True)  # all padding stays in a batch: the answers depend on it

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Return inputs of the samples at `index` [B] without their common padding."""
        chosen = {name: values[index] for name, values in self.inputs.items()}
        mask = chosen.get(PADDING_MASK)
        if mask is None or self.fixed_length:
            return chosen
        longest = int(mask.sum(1).max())
        full = mask.shape[1]
        return {k: v[:, :longest] if v.ndim > 1 and v.shape[1] == full else v for k, v in chosen.items()}

    def shape_of_texts(self) -> dict[str, int | bool]:
        """Return the length that texts are cut to, and whether all have it, to tokenize the same data alike."""
        length = self.num_positions
        return {} if length is None else {"max_length": length, "fixed_length": self.fixed_length}

    def few(self) -> Tensor:
        """Choose up to 5 training samples, from the shortest to the longest; returns their numbers, [B] int64."""
        train = self.splits["train"]
        ordered = train[self.by_length(train)]
        return ordered[torch.linspace(0, len(ordered) - 1, min(5, len(ordered))).long()]

    def by_length(self, index: Tensor) -> Tensor:
        """[B] int64, places in `index` [B] from the shortest text to the longest: batches then hold little padding."""
        mask = self.inputs.get(PADDING_MASK)
        return torch.arange(len(index)) if mask is None else mask[index].sum(1).argsort(stable=True)

    @property
    def num_positions(self) -> int | None:
        """Length of the padded texts; None where inputs are no texts."""
        mask = self.inputs.get(PADDING_MASK)
        return None if mask is None else mask.shape[1]


@dataclass(frozen=True)
class TokenExamples(Examples):
    """Texts whose next tokens are learned: `num_classes` is the vocabulary V, and `labels` are zeros, for a text has
    no class."""

    counted: Tensor  # [S, L - 1] bool, positions whose next token is learned: real, and no part of a prompt

    def counted_of(self, index: Tensor, length: int) -> Tensor:
        """[B, length - 1] bool, of the samples at `index` [B], whose `batch` has `length` tokens."""
        return self.counted[index, : length - 1]


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the inputs on `device`."""
    return {name: values.to(device) for name, values in inputs.items()}


def next_token_mask(attention_mask: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
    """Return [B, L - 1] bool, positions whose next token is real and not part of the prompt.

    Args:
        attention_mask: [B, L], 0 at padding on either side.
        prompt_mask: [B, L], 1 where a token is given rather than learned; by default none is.
    """
    real = attention_mask.bool()
    counted = real[:, 1:] & real[:, :-1]
    return counted if prompt_mask is None else counted & ~prompt_mask.bool()[:, 1:]
