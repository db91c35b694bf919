"""Importance of inputs and units, the masks that keep the most important ones, and the rule of the exits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlkd.models import ChainStudent, Masks


def importance(student: ChainStudent, parameters: Mapping[str, Tensor], input_scale: Tensor) -> Masks:
    """Return the L1 importance of every input and unit, for plain and for stacked parameters.

    A unit's importance is the L1 norm of its incoming weights (Li et al. 2017, "Pruning filters for efficient
    convnets"); an input's is the L1 norm of its outgoing weights times its mean absolute value on the train
    split (Wanda, Sun et al. 2024), without which a pixel that is always black would look important.

    Args:
        student: gives the structure.
        parameters: its parameters by name, each [*N, ...] with the same leading dimensions *N (none or [N]).
        input_scale: [D], mean absolute value of each input.

    Returns:
        One [*N, G] score a group.
    """
    first = parameters["layers.0.weight"]  # [*N, U, D] or [*N, U, D, 3, 3]
    lead = first.ndim - (4 if student.is_conv else 2)
    inputs = first.new_ones(*first.shape[:lead], 1) if student.is_conv else first.abs().sum(-2) * input_scale
    units = [
        parameters[f"layers.{k}.weight"].abs().flatten(lead + 1).sum(-1) for k in range(len(student.layers))
    ]  # each [*N, U]
    return (inputs, *units)


def num_kept(keep: Tensor, size: Tensor | int, multiple: Tensor | int = 1) -> Tensor:
    """Return how many of `size` are kept at a share: rounded, at least one, then up to a multiple; as floats.

    Args:
        keep: [*N], in [0, 1].
        size: G, or sizes that go with `keep`.
        multiple: numbers that a target likes are multiples of this; or multiples that go with `size`. Never more than G
            are kept.
    """
    count = (keep * size).round().clamp_min(1.0)
    return ((count / multiple).ceil() * multiple).clamp_max(size)


def keep_top(scores: Tensor, keep: Tensor, multiple: int = 1) -> Tensor:
    """Return the mask of the `num_kept` highest scores; ties go to the lower index.

    Args:
        scores: [*N, G].
        keep: [*N], in [0, 1].
        multiple: as in `num_kept`.

    Returns:
        [*N, G] of zeros and ones.
    """
    size = scores.shape[-1]
    count = num_kept(keep, size, multiple)  # [*N]
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [*N, G]
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(size, device=order.device).expand_as(order))
    return (rank < count[..., None]).to(scores.dtype)


def spread(scores: Tensor) -> Tensor:
    """Return the participation ratio (sum s)^2 / (G sum s^2), from 1/G (one score) to 1 (equal scores).

    Args:
        scores: [*N, G], not negative.

    Returns:
        [*N].
    """
    return scores.sum(-1).square() / (scores.shape[-1] * scores.square().sum(-1)).clamp_min(1e-12)


def exit_ends(threshold: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Whether all samples leave at the first exit, and whether none leaves early, for thresholds [*N].

    A threshold within 1e-6 of 1/C or of 1 counts as that end, because 0.1 differs between single and double precision,
    and training, cost and the compacted student must agree.
    """
    return threshold <= 1.0 / num_classes + 1e-6, threshold >= 1.0 - 1e-6


def exits_at(confidence: Tensor, threshold: Tensor, num_classes: int) -> Tensor:
    """Whether a sample of this confidence (largest softmax probability) leaves at an early exit.

    The ends are exact, regardless of the rounding of confidences: at a threshold of 1/C or less every sample leaves, at
    1 or more no sample leaves. A compacted student then has no decision to compute.

    Args:
        confidence: [*N, B].
        threshold: [*N].

    Returns:
        [*N, B] bool.
    """
    always, never = exit_ends(threshold, num_classes)
    return ((confidence >= threshold[..., None]) | always[..., None]) & ~never[..., None]


def gated_exits(gate_logits: Tensor, threshold: Tensor, num_classes: int) -> Tensor:
    """Whether samples leave as in `exits_at`; gate logits [*N, B] decide where the threshold is at neither end."""
    always, never = exit_ends(threshold, num_classes)
    return ((gate_logits >= 0) | always[..., None]) & ~never[..., None]


def exits_taken(
    confidence: Tensor,
    answer: Tensor,
    threshold: Tensor,
    num_classes: int,
    patience: int = 0,
    gates: tuple[Tensor, ...] = (),
) -> Tensor:
    """Return which exit answers each sample: [N, E, B] bool with one True for each sample.

    Args:
        confidence: [N, E, B], largest probability at every exit.
        answer: [N, E, B].
        threshold: [N].
        num_classes: C.
        patience: a sample also leaves where this many exits in a row agree, unless the threshold is at an end; 0: off.
        gates: one [N, B] for each early exit, logits of leaving; if given, they decide instead of the confidence.
    """
    waiting = torch.ones_like(answer[:, 0], dtype=torch.bool)  # [N, B]
    undecided = ~torch.stack(exit_ends(threshold, num_classes)).any(0)[:, None]  # [N, 1]
    leaves = []
    for e in range(answer.shape[1] - 1):
        if gates:
            now = gated_exits(gates[e], threshold, num_classes)
        else:
            now = exits_at(confidence[:, e], threshold, num_classes)
        if 0 < patience <= e + 1:
            recent = answer[:, e + 1 - patience : e + 1]  # [N, patience, B]
            now = now | ((recent == recent[:, :1]).all(1) & undecided)
        leaves.append(waiting & now)
        waiting = waiting & ~now
    return torch.stack([*leaves, waiting], dim=1)


def select(student: ChainStudent, scores: Masks, feature_keep: Tensor, unit_keep: Tensor) -> Masks:
    """Return masks of all groups: `feature_keep` of the inputs, `unit_keep` of every block's units."""
    multiple = student.unit_multiple
    return (keep_top(scores[0], feature_keep), *(keep_top(s, unit_keep, multiple) for s in scores[1:]))
