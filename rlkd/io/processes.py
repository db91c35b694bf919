"""Several processes that train one student, started by torchrun: each takes its part of every batch.

accelerate joins the processes (gloo on CPUs, nccl on GPUs) and places them on devices. Gradients are summed over the
parts, so that the step is the one that a single process would take. Controls and metrics are those of the first
process, because what it observes holds times that the others measured differently, and all must take the same way.
Without torchrun there is one process, and everything here leaves its arguments as they are.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from rlkd.errors import UserError

LONGEST_WAIT = timedelta(days=1)  # others wait while the first process lets the teacher answer or times the student
T = TypeVar("T")
R = TypeVar("R")


def join(device: str) -> None:
    """Join the processes that torchrun started with this one, if it did.

    Args:
        device: `cpu`, or anything else for the fastest that accelerate finds.

    Raises:
        UserError: the extra is not installed.
    """
    if is_started() and not distributed.is_initialized():
        _accelerate(cpu=device == "cpu")


def is_started() -> bool:
    """Whether torchrun started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave() -> None:
    """End the group of processes, if there is one; each goes on alone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def placed() -> torch.device:
    """Return the device that accelerate chooses for this process.

    Raises:
        UserError: the extra is not installed.
    """
    return torch.device(_accelerate(cpu=False).device)


def _accelerate(cpu: bool) -> Any:
    try:
        accelerate: Any = importlib.import_module("accelerate")
    except ImportError as error:
        raise UserError(
            "several processes and `auto` need the package accelerate; run `pip install 'rlkd[hf]'`"
        ) from error
    return accelerate.PartialState(cpu=cpu, **({"timeout": LONGEST_WAIT} if is_started() else {}))


def num_processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0; the first one writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextlib.contextmanager
def first_alone() -> Any:
    """Run the block in the first process before the others, which then find its results in a cache."""
    if index():
        distributed.barrier()
    try:
        yield
    finally:
        if num_processes() > 1 and not index():
            distributed.barrier()


def wait() -> None:
    """Wait until all processes are here."""
    if num_processes() > 1:
        distributed.barrier()


def from_first(compute: Callable[[], T]) -> T:
    """Return what `compute` returns in the first process, which alone calls it."""
    if num_processes() == 1:
        return compute()
    values: list[Any] = [None if index() else compute()]
    distributed.broadcast_object_list(values, src=0)
    found: T = values[0]
    return found


def share(positions: Tensor) -> Tensor:
    """Return the part of `positions` [B] that belongs to this process."""
    return positions.tensor_split(num_processes())[index()]


@torch.no_grad()
def add_up(tensors: Iterable[Tensor | None]) -> None:
    """Replace every tensor by its sum over the processes; None, in all of them alike, stays."""
    if num_processes() == 1:
        return
    given = [tensor for tensor in tensors if tensor is not None]
    flat = torch.cat([tensor.flatten() for tensor in given])
    distributed.all_reduce(flat)
    for tensor, part in zip(given, torch.split(flat, [tensor.numel() for tensor in given]), strict=True):
        tensor.copy_(part.view_as(tensor))


def agree(given: T, device: torch.device) -> T:
    """Return the first process's values of a dataclass of tensors on the CPU, or of a tensor.

    Args:
        given: of the same shapes in every process.
        device: that the processes send from.
    """
    if num_processes() == 1:
        return given
    values: Any = given
    if not isinstance(given, Tensor):
        values = type(given)(**{field.name: agree(getattr(given, field.name), device) for field in fields(values)})
    else:
        sent = given.to(device, copy=True)
        distributed.broadcast(sent, src=0)
        values = sent.cpu()
    same: T = values
    return same


def everywhere(right: Tensor, device: torch.device) -> Tensor:
    """Return, bool as `right` on the CPU, what is right in every process."""
    wrong = (~right).float().to(device)
    add_up([wrong])
    return wrong.cpu() == 0


def in_turns(tasks: Sequence[T], compute: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield every task with its result, in order, in the first process; the others yield nothing and compute, too.

    Process i of n computes tasks i, n + i, ...; all of them compute equally often, so that `compute` may use weights
    that are sharded over the processes. Results are pickled on their way.

    Args:
        tasks: the same in every process.
        compute: gives the result of a task.
    """
    for start in range(0, len(tasks), num_processes()):
        now = tasks[start : start + num_processes()]
        result = compute(now[min(index(), len(now) - 1)])  # of the last one again where there are too few
        results: list[Any] | None = [result]
        if num_processes() > 1:
            results = None if index() else [None] * num_processes()
            distributed.gather_object(result, results)
        if results is not None:
            yield from zip(now, results, strict=False)
