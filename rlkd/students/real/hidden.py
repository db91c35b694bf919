"""Read the hidden layers of a real student and its teacher: features behind the adapters, and attention maps."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from rlkd.data.examples import Examples
from rlkd.errors import UserError
from rlkd.losses import TERMS, LossConfig
from rlkd.models.layer_mapping import active_pairs
from rlkd.models.real.attachment import Plan
from rlkd.models.real.hooks import Link
from rlkd.models.real.instrumented import Instrumented, ModuleOutputs
from rlkd.teachers import Signals


def offered_signals(student: Instrumented, signals: Signals, data: Examples) -> frozenset[str]:
    """Name the signals that the student and its teacher have; its features are those behind the adapters."""
    names = {"student_logits", "exit_logits", "labels", "temperature", "teacher_logits"}
    names |= {"student_features", "adapted_features", "teacher_features"} if student.links else set()
    return frozenset(names | ({"student_map", "teacher_map"} if _has_maps(student.plan, signals, data) else set()))


def _has_maps(plan: Plan, signals: Signals, data: Examples) -> bool:
    """Whether the student's attention map has the teacher's positions."""
    if plan.is_conv or signals.are_conv:
        return plan.is_conv and signals.are_conv
    return bool(plan.attention) and signals.maps.shape[-1] == (data.num_positions or plan.num_positions)


def check_stages(loss: LossConfig, num_links: int) -> None:
    """Raise UserError for more stages than hints, or for terms of a fixed width in stages."""
    modules = [name for name in loss.terms if TERMS[name].is_module]
    if loss.stages > max(1, num_links):
        raise UserError(
            f"loss.stages: got {loss.stages}; allowed: 1 to {max(1, num_links)}, the blocks with hints "
            "(--attach.hints all gives every block one)"
        )
    if loss.stages > 1 and modules:
        raise UserError(f"loss.stages: got {loss.stages} with {modules[0]}, which has a fixed width; allowed: 1")


def num_active_columns(links: Sequence[Link], stages: int, done: float) -> int:
    """Count the columns of the features that belong to the hints that learn now, the shallowest blocks first.

    Args:
        links: of all hints.
        stages: 2 or more.
        done: share of the training, in [0, 1].
    """
    return sum(link.teacher_width for link in links[: active_pairs(len(links), stages, done)])


def hidden_signals(
    outputs: ModuleOutputs, features: Tensor, teacher_map: Tensor, *, has_features: bool, has_maps: bool
) -> dict[str, Tensor]:
    """Return signals of hidden layers; student and teacher have equal ones without the family.

    Args:
        outputs: of the student, for B samples.
        features: [B, F] of the teacher, the columns that count now.
        teacher_map: [B, P], over all positions.
        has_features: whether features are compared.
        has_maps: whether attention maps are compared.
    """
    if not features.shape[-1]:  # the mean over no features would be no number
        features = features.new_zeros(len(features), 1)
    adapted = outputs.features[:, : features.shape[-1]].float() if has_features else features
    theirs = _seen_map(outputs, teacher_map) if has_maps else teacher_map
    return {
        "student_features": adapted,
        "adapted_features": adapted,
        "teacher_features": features,
        "student_map": theirs if outputs.map is None or not has_maps else outputs.map,
        "teacher_map": theirs,
    }


def _seen_map(outputs: ModuleOutputs, full: Tensor) -> Tensor:
    """Return [B, P], the teacher's map `full` [B, P] over the tokens that the student still has, of unit norm."""
    if outputs.map is None:
        return full
    if outputs.positions is None or outputs.valid is None:
        return full[:, : outputs.map.shape[-1]]  # what follows is padding
    return F.normalize(full.gather(1, outputs.positions) * outputs.valid, dim=-1, eps=1e-8)
