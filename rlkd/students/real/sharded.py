"""A student whose weights, gradients and moments are sharded over the processes of torchrun, for its training alone."""

import copy
import gc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlkd.data.examples import to_device
from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.models.chain import Masks
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.sharding import release, shard_weights, whole

OPTION = "train.shard"
TOLERANCE = 1e-3  # of answers and gradients, relative to the largest; mistakes are as large as these themselves


def sharded_copy(student: Instrumented, device: torch.device) -> Instrumented:
    """Copy a student on the CPU to `device`, with sharded weights; every process must call this.

    Args:
        student: keeps its weights.
        device: of this process.

    Raises:
        UserError: a model that cannot be sharded.
    """
    gc.collect()  # copies of earlier trainings, whose hooks and modules hold one another
    copied = Instrumented(student.clean_copy(), student.plan, student.links)
    copied.heads, copied.adapters, copied.terms = copy.deepcopy((student.heads, student.adapters, student.terms))
    blocks = [f"model.{path}" for path in student.plan.blocks]
    shard_weights(copied, blocks, device, OPTION)
    return copied


def check_sharding(student: Instrumented, inputs: Mapping[str, Tensor], device: torch.device) -> None:
    """Compare answers and gradients of the sharded student with the whole one's, before any training.

    Args:
        student: on the CPU, with the same model in every process; its exits and adapters are drawn anew.
        inputs: of a few samples.
        device: of this process.

    Raises:
        UserError: the student cannot be sharded, or differs then.
    """
    generator = torch.Generator().manual_seed(0)
    for fresh in (*student.heads.parameters(), *student.adapters.parameters()):  # each process drew its own
        fresh.data.copy_(0.1 * torch.randn(fresh.shape, generator=generator))
    sharded, there = sharded_copy(student, device).eval(), to_device(inputs, device)
    masks = tuple((torch.arange(group.size) % 2 == 0).float() for group in student.plan.groups)
    on_device = tuple(mask.to(device) for mask in masks)
    with torch.no_grad():  # a training has such passes between those with gradients
        sharded(there, on_device)
    release(sharded)
    expected = _answers_and_gradients(student.eval(), inputs, masks)
    found = _answers_and_gradients(sharded, there, on_device)
    gaps = {
        "answers": max(_apart([a], [b]) for a, b in zip(found[0], expected[0], strict=True)),
        "gradients": _apart([gradient / processes.num_processes() for gradient in found[1]], expected[1]),
    }
    for what, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise UserError(
                f"{OPTION}: the sharded student's {what} differ from the whole one's, by {gap:.1e} of the largest; "
                "leave the option out"
            )


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest expected value."""
    gap = max(float((a.cpu() - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return gap / max(1e-12, *(float(b.abs().max()) for b in expected))


def _answers_and_gradients(
    student: Instrumented, inputs: Mapping[str, Tensor], masks: Masks
) -> tuple[list[Tensor], list[Tensor]]:
    """Answers of every exit with features and map, and gradients of the sum of their squares, summed over processes."""
    outputs = student(inputs, masks, 1.0 if student.plan.select_after is None else 0.5)
    answers = [*outputs.logits, outputs.features, *([] if outputs.map is None else [outputs.map])]
    answers = [answer.float() for answer in answers if answer.numel()]
    student.zero_grad()
    torch.stack([answer.square().sum() for answer in answers]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [whole(p.grad) for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    return [answer.detach() for answer in answers], gradients
