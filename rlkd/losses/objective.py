"""The losses of all families for one batch, in one tensor; the controls weigh them."""

import torch
from torch import Tensor

from rlkd.losses.attention import attention_transfer
from rlkd.losses.feature import hint
from rlkd.losses.hard_label import cross_entropy
from rlkd.losses.response import response
from rlkd.losses.tokens import TopK, token_cross_entropy, token_response_top_k
from rlkd.models import Outputs
from rlkd.models.attention_map import attention_map

FAMILIES = ("hard_label", "response", "feature", "attention")


def family_losses(
    outputs: Outputs,
    adapted_features: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    teacher_features: Tensor,
    teacher_map: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Return the loss of each family for one student and one batch; the objective is their weighted sum.

    Logit terms are averaged over all exits, as BranchyNet trains its exits jointly with equal weights; feature
    and attention terms look at the last block.

    Args:
        outputs: the student's, logits [B, C] an exit.
        adapted_features: [B, F], the last block's features through the adapter.
        labels: [B] int64.
        teacher_logits: [B, C].
        teacher_features: [B, F].
        teacher_map: [B, P], the teacher's attention map.
        temperature: scalar.

    Returns:
        [4], in the order of `FAMILIES`.
    """
    student_map = attention_map(outputs.features[-1], teacher_map.shape[-1])  # [B, P]
    return losses_of(
        outputs.logits,
        adapted_features,
        student_map,
        labels,
        teacher_logits,
        teacher_features,
        teacher_map,
        temperature,
    )


def losses_of(
    logits: tuple[Tensor, ...],
    adapted_features: Tensor,
    student_map: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    teacher_features: Tensor,
    teacher_map: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Return the losses as `family_losses` does, for a student whose attention map is given.

    Args:
        logits: [B, C] an exit.
        adapted_features: [B, F].
        student_map: [B, P], rows of unit norm.
        labels: as in `family_losses`, like all that follow.
        teacher_logits: [B, C].
        teacher_features: [B, F].
        teacher_map: [B, P].
        temperature: scalar.

    Returns:
        [4], in the order of `FAMILIES`.
    """
    num_exits = len(logits)
    zero = logits[0].new_zeros(())
    hard = sum((cross_entropy(z, labels) for z in logits), start=zero) / num_exits
    soft = sum((response(z, teacher_logits, temperature) for z in logits), start=zero) / num_exits
    return torch.stack(
        [hard, soft, hint(adapted_features, teacher_features), attention_transfer(student_map, teacher_map)]
    )


def token_losses_of(
    logits: tuple[Tensor, ...],
    tokens: Tensor,
    counted: Tensor,
    teacher: TopK,
    temperature: Tensor,
    reverse: bool,
    adapted_features: Tensor,
    teacher_features: Tensor,
    student_map: Tensor,
    teacher_map: Tensor,
) -> Tensor:
    """Return the losses of a language model as `losses_of` does; hard label and response are means over `counted`.

    Args:
        logits: [B, L, V] an exit.
        tokens: [B, L] int64.
        counted: [B, L - 1] bool, positions whose next token is learned.
        teacher: of the same [B, L].
        temperature: scalar.
        reverse: response is KL(student || teacher).
        adapted_features: [B, F].
        teacher_features: [B, F].
        student_map: [B, P], rows of unit norm.
        teacher_map: [B, P].

    Returns:
        [4], in the order of `FAMILIES`.
    """
    num_exits = len(logits)
    zero = logits[0].new_zeros(())
    hard = sum((token_cross_entropy(z, tokens, counted) for z in logits), start=zero) / num_exits
    soft = sum((token_response_top_k(z, teacher, counted, temperature, reverse) for z in logits), start=zero)
    return torch.stack(
        [
            hard,
            soft / num_exits,
            hint(adapted_features, teacher_features),
            attention_transfer(student_map, teacher_map),
        ]
    )
