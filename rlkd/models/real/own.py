"""Teacher and student that are a user's own modules, with samples from memory; the modules stay as they were."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.data.examples import Examples
from rlkd.data.memory import examples_of, read_parts
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Table
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, Plan, make_plan
from rlkd.models.real.hooks import logits_of
from rlkd.models.real.pretrained import as_user_error, device_of
from rlkd.models.real.sides import Side, few_rows


def argument_of(model: nn.Module) -> str:
    """Return the name of the argument of `forward` that takes the inputs: the first one.

    Raises:
        UserError: it can be given by position alone, or there is none.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD,):
        raise UserError(
            f"{type(model).__name__}: its forward names no first argument; allowed: def forward(self, inputs), which "
            "returns logits [samples, classes]"
        )
    return parameters[0].name


def own_sides(
    teacher: nn.Module, student: nn.Module | None, data: Any, attach: AttachConfig, name: str = "data"
) -> tuple[Side, Side]:
    """Prepare modules that a user holds for a distillation.

    Args:
        teacher: gives logits [B, C]; only read.
        student: of any smaller structure; copied. By default a copy of the teacher, which the controls prune.
        data: of `rlkd.data.memory.read_parts`.
        attach: what the student gets.
        name: of the data, for messages.

    Returns:
        The student, a copy that will be trained, and the teacher.

    Raises:
        UserError: modules or data that cannot be used, or do not belong together.
    """
    argument, parts = argument_of(teacher), read_parts(data)
    first = next(iter(parts.values()))[0][:2]
    probe = examples_of(parts, argument, _num_classes(teacher, first), name)
    plan = _plan(teacher, probe, AttachConfig(exits=()), "teacher")
    made = copy.deepcopy(teacher if student is None else student).cpu().float().eval()
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    own = argument_of(made)
    samples = probe if own == argument else dataclasses.replace(probe, inputs={own: probe.inputs[argument]})
    own_plan = _plan(made, samples, attach, "student")
    if own_plan.num_classes != plan.num_classes:
        raise UserError(f"student: gives {own_plan.num_classes} answers; the teacher gives {plan.num_classes}")
    columns = ColumnConfig()
    table = Table(name, "array", [], [], [], None if "" in parts else list(parts))
    return Side(made, samples, own_plan, None, table, columns), Side(teacher, probe, plan, None, table, columns)


def _num_classes(teacher: nn.Module, inputs: Tensor) -> int:
    """Count the answers of the teacher to inputs [B, ...]."""
    others = {p.dtype for p in teacher.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        raise UserError(
            f"teacher: got weights of {', '.join(map(str, others))}; allowed: torch.float32, teacher.float()"
        )
    what = f"teacher: {type(teacher).__name__} does not take inputs of shape {list(inputs.shape)} and {inputs.dtype}"
    with torch.no_grad(), as_user_error(what):
        logits = logits_of(teacher.eval()(inputs.to(device_of(teacher))))
    if logits.ndim != 2:
        raise UserError(f"teacher: gives answers of shape {list(logits.shape)}; allowed: logits [samples, classes]")
    if logits.shape[1] < 2:
        raise UserError("teacher: gives one number a sample; allowed: logits of two classes or more")
    return logits.shape[1]


def _plan(model: nn.Module, data: Examples, attach: AttachConfig, name: str) -> Plan:
    shapes = {key: list(values.shape[1:]) for key, values in data.inputs.items()}
    with as_user_error(f"{name}: {type(model).__name__} does not take inputs of shapes {shapes}"):
        return make_plan(model, data.batch(data.few()), attach, data.num_positions, samples=few_rows(data))


@contextmanager
def unchanged(*models: nn.Module | None) -> Iterator[None]:
    """Give models back as they were: training mode, device of every tensor, and hooks are the caller's to remove."""
    given = [model for model in models if model is not None]
    modes = [(module, module.training) for model in given for module in model.modules()]
    devices = [device_of(model) for model in given]
    try:
        yield
    finally:
        for model, device in zip(given, devices, strict=True):
            if device_of(model) != device:
                model.to(device)
        for module, training in modes:
            module.training = training
