"""How the losses answer to the controls: gradients that gradient-based baselines of a policy follow.

Works on the stacked parameters of any `Students`, so a population and a solo student are treated alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap

from rlkd.data import DataSet, Task
from rlkd.losses import FAMILIES, LossConfig, cross_entropy
from rlkd.models import ChainStudent
from rlkd.students.adapted import WithAdapter, chain_objective
from rlkd.students.fusion import TeacherMix
from rlkd.students.interface import Controls, Students
from rlkd.teachers import Signals

NUM_SAMPLES = 48  # of a student's own samples, and of the validation split


@dataclass(frozen=True)
class Sensitivity:
    """Gradients at the current parameters."""

    log_temperature: Tensor  # [N], d log response loss / d log T on training samples
    alignment: Tensor  # [N, 4], cosine of each family's gradient with the validation cross entropy's


def sensitivity(
    students: Students,
    structure: ChainStudent,
    tasks: Sequence[Task],
    *,
    controls: Controls,
    data: DataSet,
    signals: Signals,
    generator: torch.Generator,
    loss: LossConfig | None = None,
) -> Sensitivity:
    """Gradients on NUM_SAMPLES training samples a student and as many of the validation split.

    The alignment is, to first order, what one gradient step on a family alone does for validation: the
    one-step hypergradient of the family's weight (Baydin et al. 2018), scaled to [-1, 1].

    Args:
        students: N.
        structure: their architecture.
        tasks: one a student.
        controls: of the last window.
        data: gives samples and validation labels.
        signals: of the teachers.
        generator: draws the samples.
        loss: the terms of the students' objective.
    """
    module = WithAdapter(structure, chain_objective(loss or LossConfig(), structure, signals), signals)
    parameters = {_full_name(k): p for k, p in students.state_dict().items()}
    positions = [torch.randint(len(task.samples), (NUM_SAMPLES,), generator=generator) for task in tasks]
    samples = torch.stack([task.samples[p] for task, p in zip(tasks, positions, strict=True)])  # [N, B]
    labels = torch.stack([task.labels[p] for task, p in zip(tasks, positions, strict=True)])  # [N, B]
    teachers = TeacherMix(len(tasks), max(len(task.teachers) for task in tasks))  # under their plain mean
    teachers.reset(tasks, torch.arange(len(tasks)))
    validation = data.splits["validation"]
    chosen = validation[torch.randint(len(validation), (NUM_SAMPLES,), generator=generator)]  # [B]
    batch = (data.inputs[samples], labels, *teachers.of(signals, samples, labels))

    def losses(p: dict[str, Tensor], inputs: Tensor, *rest: Any) -> Tensor:
        *targets, masks, log_temperature = rest
        losses: Tensor = functional_call(module, p, (inputs, masks, (*targets, log_temperature.exp())))[1]
        return losses  # [4]

    def of_one(p: dict[str, Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
        _, pullback = vjp(lambda q: losses(q, *rest), p)  # type: ignore[misc]
        (each,) = vmap(pullback)(torch.eye(len(FAMILIES)))
        wanted = grad(lambda q: cross_entropy(_answers(module, q, rest[-2], data.inputs[chosen]), data.labels[chosen]))(
            p
        )
        names = [name for name in p if name.startswith("student.")]
        inner = sum((each[k].flatten(1) @ wanted[k].flatten() for k in names), start=torch.zeros(len(FAMILIES)))
        norms = sum((each[k].flatten(1).square().sum(1) for k in names), start=torch.zeros(len(FAMILIES))).sqrt()
        norm = sum((wanted[k].square().sum() for k in names), start=torch.zeros(())).sqrt()
        by_temperature = grad(lambda t: losses(p, *rest[:-1], t)[1].clamp_min(1e-12).log())(rest[-1])
        return by_temperature, inner / (norms * norm).clamp_min(1e-12)

    by_temperature, alignment = vmap(of_one)(parameters, *batch, students.masks(), controls.temperature.log())
    return Sensitivity(by_temperature.detach(), alignment.detach())


def _answers(module: WithAdapter, parameters: dict[str, Tensor], masks: Any, inputs: Tensor) -> Tensor:
    outputs, _ = functional_call(module, parameters, (inputs, masks))
    logits: Tensor = outputs.logits[-1]  # [B, C]
    return logits


def _full_name(name: str) -> str:
    return name if name.startswith(("adapter.", "terms.")) else f"student.{name}"
