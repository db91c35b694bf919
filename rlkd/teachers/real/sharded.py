"""A frozen teacher whose weights are sharded over the processes of torchrun, which answer in lock-step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlkd.data.examples import to_device
from rlkd.errors import UserError
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.sharding import shard_weights

OPTION = "teacher_shard"
TOLERANCE = 1e-3  # of answers, relative to the largest


@torch.no_grad()
def shard_teacher(model: nn.Module, blocks: Sequence[str], inputs: Mapping[str, Tensor], device: torch.device) -> None:
    """Shard the weights of a teacher on the CPU, in place, and freeze them; every process must call this.

    Args:
        model: in evaluation mode afterwards.
        blocks: paths of its blocks.
        inputs: of a few samples, which are answered before and after.
        device: of this process.

    Raises:
        UserError: the teacher cannot be sharded, or answers otherwise then.
    """
    expected = logits_of(forward(model.eval().requires_grad_(False), inputs)).float()
    shard_weights(model, blocks, device, OPTION)
    found = logits_of(forward(model, to_device(inputs, device))).float().cpu()
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if not gap <= TOLERANCE:
        raise UserError(
            f"{OPTION}: the sharded teacher answers otherwise than the whole one, by {gap:.1e} of its largest answer; "
            "leave the option out"
        )
