"""A chain student together with what its loss terms train beside it: the hint's adapter, and the terms' own modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.losses import LossConfig, Objective, logit_gradient, loss_gradient
from rlkd.models import ChainStudent, Masks, Outputs
from rlkd.models.adapters import pooled
from rlkd.models.attention_map import attention_map
from rlkd.teachers import Signals
from rlkd.teachers.signals import EXTRA

# What every chain student gives, whatever its teacher.
OFFERED = frozenset(
    {"student_logits", "exit_logits", "labels", "temperature", "student_features", "adapted_features", "student_first"}
    | {"student_input_gradient", "student_loss_gradient"}
)


def chain_objective(loss: LossConfig, student: ChainStudent, signals: Signals) -> Objective:
    """Return the objective of a chain student.

    Attention maps over pixels and over units cannot be compared, so the kinds of student and teacher must match.

    Raises:
        UserError: a chosen term needs what this student or its teachers do not have, or there are stages.
    """
    if loss.stages > 1:
        raise UserError(f"loss.stages: got {loss.stages} for a student with a hint of one block; allowed: 1")
    maps = frozenset({"student_map", "teacher_map"} if student.is_conv == signals.are_conv else ())
    return Objective(loss, OFFERED | maps | {"teacher_logits", "teacher_features", *signals.more}, frozenset(EXTRA))


class WithAdapter(nn.Module):
    """A student, the linear adapter that brings its last features to the teacher's width, and modules of loss terms."""

    def __init__(self, student: ChainStudent, objective: Objective, signals: Signals) -> None:
        super().__init__()
        self.student, self._objective, self._signal_names = student, objective, tuple(signals.named())
        sizes = {
            "num_classes": student.num_classes,
            "student_width": student.group_sizes[-1],
            "first_width": student.group_sizes[1],
            "teacher_width": signals.features.shape[-1],
            "teacher_first_width": signals.more["teacher_first"].shape[-1] if "teacher_first" in signals.more else 0,
        }
        # their first weights come from the task; the global generator stays where it is
        with torch.random.fork_rng(devices=[]):
            self.adapter = nn.Linear(sizes["student_width"], sizes["teacher_width"])
            self.terms = objective.modules(sizes)

    def forward(self, inputs: Tensor, masks: Masks, targets: tuple[Tensor, ...] = ()) -> tuple[Outputs, Tensor]:
        """Return the outputs, and the last features at the teacher's width, [B, F], or with targets the losses, [4].

        Args:
            inputs: [B, *any].
            masks: one a group.
            targets: labels [B], the teachers' signals in the order of `Signals.named`, and the temperature.
        """
        outputs = self.student(inputs, masks)
        features = pooled(outputs.features[-1])
        adapted = self.adapter(features)
        if not targets:
            return outputs, adapted
        labels, *signals, temperature = targets
        given: dict[str, Any] = {
            "exit_logits": outputs.logits,
            "labels": labels,
            "temperature": temperature,
            "student_features": features,
            "adapted_features": adapted,
            **dict(zip(self._signal_names, signals, strict=True)),
        }
        return outputs, self._objective(given | self._wanted(inputs, masks, outputs, given), self.terms)

    def _wanted(self, inputs: Tensor, masks: Masks, outputs: Outputs, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return those signals that cost something, as far as a term needs them."""
        needs = self._objective.needs
        wanted: dict[str, Tensor] = {}
        if "student_map" in needs:
            wanted["student_map"] = attention_map(outputs.features[-1], given["teacher_map"].shape[-1])
        if "student_first" in needs:
            wanted["student_first"] = pooled(outputs.features[0])
        if "student_input_gradient" in needs:
            wanted["student_input_gradient"] = input_gradient(self.student, inputs, masks, given["teacher_logits"])
        if "student_loss_gradient" in needs:
            gradients = loss_gradient(lambda x: self.student(x, masks).logits[-1], inputs, given["labels"])
            wanted["student_loss_gradient"] = gradients.flatten(1)
        return wanted


def input_gradient(student: ChainStudent, inputs: Tensor, masks: Masks, teacher_logits: Tensor) -> Tensor:
    """Return [B, N], the gradient by the inputs of the logit of the class that the teacher finds likeliest."""
    return logit_gradient(lambda x: student(x, masks).logits[-1], inputs, teacher_logits.argmax(-1)).flatten(1)
