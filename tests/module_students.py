"""A tiny transformer as a student of another one, with data, for tests of training."""

from typing import Any

import tiny_models
import torch
from torch import Tensor

from rlkd.data import Task
from rlkd.data.examples import Examples
from rlkd.losses import LossConfig
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.hooks import link_places
from rlkd.models.real.instrumented import Instrumented
from rlkd.students import Controls
from rlkd.students.real.module import ModuleStudent
from rlkd.students.real.train_config import ModuleTrainConfig
from rlkd.teachers.real.module_signals import module_signals

TRAIN = ModuleTrainConfig(steps_per_window=3, batch_size=12, learning_rate=1e-3, warmup=0.0, rate_exponent=1.0)


def texts(size: int = 96, length: int = 9) -> Examples:
    """The label says whether token 5 stands in the text."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(6, 40, (size, length), generator=g)
    ids[:, 0] = 2
    labels = torch.arange(size) % 2
    ids[labels == 1, 1 + torch.randint(3, ((size + 1) // 2,), generator=g)[: int(labels.sum())]] = 5
    mask = (torch.arange(length) < torch.randint(5, length + 1, (size, 1), generator=g)).long()
    order = torch.arange(size)
    splits = {"train": order[:64], "validation": order[64:80], "test": order[80:]}
    return Examples("toy", {"input_ids": ids * mask, "attention_mask": mask}, labels, 2, splits)  # type: ignore[arg-type]


def images(size: int = 48) -> Examples:
    pixels = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    order = torch.arange(size)
    splits = {"train": order[:32], "validation": order[32:40], "test": order[40:]}
    return Examples("toy", {"pixel_values": pixels}, order % 2, 2, splits)  # type: ignore[arg-type]


def student_of(
    family: str = "bert",
    config: ModuleTrainConfig = TRAIN,
    attach: AttachConfig | None = None,
    teacher_family: str | None = None,
    loss: LossConfig | None = None,
    **changes: Any,
) -> ModuleStudent:
    data = images() if family in tiny_models.IMAGE_FAMILIES else texts()
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family in ("bert", "vit") else {}
    layers = 2 if family in tiny_models.CONV_FAMILIES else 3
    student = tiny_models.tiny(family, layers=layers, **(dropout | changes))
    teacher = tiny_models.tiny(teacher_family or family, seed=1, layers=layers)
    inputs = data.batch(data.splits["train"][:2])
    attach = attach or AttachConfig()
    plan, theirs = (make_plan(m, inputs, attach, data.num_positions) for m in (student, teacher))
    blocks = plan.blocks if attach.hints == "all" else plan.blocks[-1:]
    links = link_places(student, teacher, blocks, theirs.blocks, inputs, inputs)
    signals = module_signals(teacher, theirs, [k.teacher for k in links], data)
    made = ModuleStudent(Instrumented(student, plan, links), data, signals, config, 4, loss)
    made.reset([task(data)])
    return made


def task(data: Examples, seed: int = 0) -> Task:
    train = data.splits["train"]
    return Task(seed, 0, 0.0, train, data.labels[train], (0.6, 0.3, 0.1), 0.0)


def controls(**changes: float | list[float]) -> Controls:
    values: dict[str, Any] = {
        "weights": [0.25] * 4,
        "temperature": 2.0,
        "feature_keep": 1.0,
        "unit_keep": 1.0,
        "exit_threshold": 1.0,
        "learning_rate": 3e-3,
    }
    return Controls(**{k: torch.tensor([v]) for k, v in (values | changes).items()})


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)
