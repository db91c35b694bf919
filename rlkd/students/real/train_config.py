"""How a real student trains between two decisions, and on which samples it is evaluated."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlkd.data import Split
from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.students.interface import TrainConfig


@dataclass(frozen=True)
class ModuleTrainConfig(TrainConfig):
    """How a real student is trained between two decisions."""

    steps_per_window: int = 100
    """Optimizer steps of one window, which is one environment step; what a window costs besides is then below 5 %."""
    batch_size: int = 32
    """Samples of one optimizer step, drawn with replacement from the training samples."""
    micro_batches: int = 1
    """Parts that a batch is computed in; the loss is the same, the memory smaller."""
    optimizer: Literal["adamw", "lion"] = "adamw"
    learning_rate: float = 0.0
    """Step size that a training starts with; the policy's control moves it from there. 0: a range test finds one."""
    rate_exponent: float = 0.5
    """How strongly the control moves the step size: by (control / the control at the start) to this power; 0: not at
    all."""
    weight_decay: float = 0.01
    """Decoupled, on matrices alone."""
    warmup: float = 0.06
    """Share of all steps in which the learning rate rises in a line; then it falls along half a cosine."""
    floor: float = 0.1
    """Factor on the learning rate at the end of that."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products (autocast); parameters and losses stay float32."""
    gradient_checkpointing: bool = False
    """Keep blocks' inputs alone for the backward pass, which computes the blocks again: less memory, more time."""
    shard: bool = False
    """Cut the student's weights, their gradients and the optimizer's moments over the processes of torchrun (FSDP2):
    each process holds a part of every tensor. One process alone holds everything."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..., or auto: what accelerate chooses, one device a process."""
    evaluation_batch_size: int = 64
    validation_size: int = 512
    """Samples of the validation split, evenly spread over it, that every window ends with an evaluation on; 0: all."""
    confirm_size: int = 2048
    """Samples of it that a window must meet its goal on, too, before it can ship; 0: all."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        if not 1 <= self.micro_batches <= self.batch_size:
            raise UserError(
                f"train.micro_batches: got {self.micro_batches}; allowed: 1 to {self.batch_size}, the batch"
            )
        if not (self.learning_rate >= 0 and self.clip_norm > 0 and self.weight_decay >= 0):
            raise UserError(
                f"train: got learning_rate {self.learning_rate:g}, clip_norm {self.clip_norm:g}, weight_decay "
                f"{self.weight_decay:g}; allowed: at least 0 (0: a range test), above 0, at least 0"
            )
        if not 0 <= self.rate_exponent <= 1:
            raise UserError(f"train.rate_exponent: got {self.rate_exponent:g}; allowed: 0 to 1")
        for name in ("validation_size", "confirm_size"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name}: got {getattr(self, name)}; allowed: at least 1, or 0 for all")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1 and self.evaluation_batch_size >= 1):
            raise UserError(
                f"train: got warmup {self.warmup:g}, floor {self.floor:g}, evaluation_batch_size "
                f"{self.evaluation_batch_size}; allowed: 0 to below 1, 0 to 1, at least 1"
            )

    def torch_device(self) -> torch.device:
        """Return the device.

        Raises:
            UserError: it is not there, or lacks bfloat16.
        """
        try:
            device = processes.placed() if self.device == "auto" else torch.device(self.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"train.device: got {self.device!r}, which torch cannot use here; try cpu") from error
        if self.precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError("train.precision: got bfloat16, which this GPU lacks; allowed here: float32")
        return device


def evaluated_samples(index: Tensor, split: Split, config: ModuleTrainConfig) -> Tensor:
    """Select the samples of a split at `index` [S] for evaluation: `validation_size` of validation, all of others."""
    return _spread_out(index, config.validation_size) if split == "validation" else index


def confirming_samples(index: Tensor, config: ModuleTrainConfig) -> Tensor:
    """Select `confirm_size` samples of the validation split at `index` [S]; those of `evaluated_samples` at least."""
    some, more = evaluated_samples(index, "validation", config), _spread_out(index, config.confirm_size)
    return more if len(more) > len(some) else some


def _spread_out(index: Tensor, count: int) -> Tensor:
    """Return `count` of the samples at `index` [S], evenly spread; all for 0 or where there are not as many."""
    return index[torch.arange(count) * len(index) // count] if 0 < count < len(index) else index
