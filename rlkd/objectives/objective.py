"""The terms together, one value a family, ready to be weighted by the controls."""

import torch
from torch import Tensor

from rlkd.models import Outputs
from rlkd.objectives.attention import attention_map, attention_transfer
from rlkd.objectives.feature import hint
from rlkd.objectives.hard_label import cross_entropy
from rlkd.objectives.response import response

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
    """Each family's loss for one student and one batch; the objective is their weighted sum.

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
    """As `family_losses`, for a student whose attention map is at hand.

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
