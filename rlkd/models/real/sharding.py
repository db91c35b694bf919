"""Weights that are sharded over processes (FSDP2): each process holds some rows of every tensor.

torch's `fully_shard` gathers the whole weights of a block while the block computes, forwards and backwards. Layers
outside the blocks (embeddings, heads) are gathered for a whole pass. A gradient is summed over the processes, each of
which keeps its rows. Functions here leave tensors alone that are not sharded.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rlkd.errors import UserError
from rlkd.models.real.pretrained import as_user_error

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def shard_weights(model: nn.Module, blocks: Iterable[str], device: torch.device, option: str) -> None:
    """Shard the weights of `model`, in place, and move them to `device`; every process must call this.

    Args:
        model: every pass goes through its own `forward` from now on.
        blocks: paths of the modules whose weights are gathered one module at a time.
        device: of this process.
        option: begins the message.

    Raises:
        UserError: a model that cannot be sharded.
    """
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise UserError(
            f"{option}: got a model with batch norms, whose running statistics each process keeps by itself; leave the "
            "option out"
        )
    with as_user_error(f"{option}: the weights of this model cannot be sharded; leave the option out"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # no output is written to
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for module in (*(model.get_submodule(path) for path in blocks), model):
            sharded: Any = fully_shard(module, mesh=mesh)
            # sums as of weights that are whole; of the default, means, gloo silently gives sums
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)


def hold(model: nn.Module) -> None:
    """Gather the whole weights of the layers outside the blocks, as a pass does; the next backward pass frees them."""
    sharded: Any = model
    sharded.unshard()


def release(model: nn.Module) -> None:
    """Free the whole weights of the layers outside the blocks, which a pass without gradients leaves gathered."""
    sharded: Any = model
    if hasattr(model, "reshard"):
        sharded.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are sharded over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole; every process must call this."""
    sharded: Any = tensor
    return torch.as_tensor(sharded.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def part(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor; they share its memory."""
    sharded: Any = tensor
    return torch.as_tensor(sharded.to_local()) if hasattr(tensor, "to_local") else tensor


def sharded_like(own: Tensor, value: Tensor) -> Tensor:
    """Return the whole `value`, which every process has, sharded as `own` is; nothing is sent."""
    sharded: Any = own
    if not hasattr(own, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    given = value.detach().to(own.device)
    return distribute_tensor(given, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Copy `module.state_dict()` to the CPU, every tensor whole; every process must call this."""
    return {name: whole(value.detach()).to("cpu", copy=True) for name, value in module.state_dict().items()}


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the whole tensors of a `whole_state` in their places; other keys of `state` are left alone.

    Raises:
        ValueError: a tensor of another shape.
    """
    for name, own in module.state_dict().items():
        if state[name].shape != own.shape:
            raise ValueError(f"{name}: got shape {list(state[name].shape)}; allowed: {list(own.shape)}")
        own.copy_(sharded_like(own, state[name]))
