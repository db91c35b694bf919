"""Cut units out of a model, so that its layers are physically smaller, and take parts out that are never reached.

`mask_groups` puts zeros before the layer that reads a unit; a model that is cut here gives the same answers without the
unit's weights. Rows of the layers that write a unit go, and columns of the layer that reads it; normalisations between
them follow, and attention is told its number of heads. Dependencies are those that `find_groups` wrote down.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.models.real.blocks import Group

NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads")  # what attention modules call their number of heads
SIZES = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
}


class Gone(nn.Module):
    """The place of a part that no sample reaches; it has no weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise RuntimeError: a shipped student stops ahead of this part."""
        raise RuntimeError("this part was cut out of the student, because every sample leaves ahead of it")


class Skipped(nn.Module):
    """The place of a block that is skipped: it hands on what enters, and has no weights."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the first argument."""
        return hidden_states


def kept_units(group: Group, mask: Tensor) -> Tensor:
    """Return the rising positions of the units that a cut leaves, [K] int64.

    A layer cannot lose all of its units, so the first one of a group stays where the mask leaves none. Heads that share
    keys and values stay in equal number for each of those that are still read, because attention repeats each equally
    often; those beyond the mask read as zeros.

    Args:
        group: of `find_groups`.
        mask: [size] of zeros and ones.
    """
    kept = mask.bool()
    if not bool(kept.any()):
        kept = torch.arange(group.size, device=mask.device) == 0
    if group.sharing > 1:
        rows = kept.reshape(-1, group.sharing)  # [keys and values, heads]
        most = int(rows.sum(1).max())
        order = rows.long().argsort(dim=1, descending=True, stable=True)  # kept ones first
        kept = torch.zeros_like(rows).scatter_(1, order[:, :most], value=True) & rows.any(1, keepdim=True)
        kept = kept.flatten()
    return kept.nonzero()[:, 0]


@torch.no_grad()
def cut_group(model: nn.Module, group: Group, mask: Tensor) -> None:
    """Leave of one group the units of `kept_units`; those of them that `mask` [size] leaves out read as zeros."""
    zero_group(model, group, mask)
    take_units(model, group, kept_units(group, mask))


@torch.no_grad()
def zero_group(model: nn.Module, group: Group, mask: Tensor) -> None:
    """Put zeros where the reader of a group reads units that `mask` [size] leaves out."""
    weight = torch.as_tensor(model.get_submodule(group.reader).weight)  # [out, size * width] or [out, size, H, W]
    wide = mask.repeat_interleave(group.width).to(weight)
    weight.mul_(wide.reshape(-1, *[1] * (weight.ndim - 2)))


def cut_to_shapes(model: nn.Module, groups: Sequence[Group], shapes: Mapping[str, Sequence[int]]) -> None:
    """Give layers of a whole model the sizes of one that was cut; which units stay does not matter here.

    Args:
        model: gets the smaller layers, whose weights are to be loaded afterwards.
        groups: of `find_groups` on the whole model.
        shapes: of the weights of the cut model, by name.

    Raises:
        ValueError: sizes that no cut leaves.
        KeyError: the weights of a layer are missing.
    """
    for group in groups:
        count, rest = divmod(int(shapes[f"{group.reader}.weight"][1]), group.width)
        mask = torch.zeros(group.size)
        if group.sharing == 1:
            mask[:count] = 1.0
        else:
            num_shared = int(shapes[f"{group.shared[0]}.weight"][0]) // group.width
            if num_shared:
                mask.view(-1, group.sharing)[:num_shared, : count // num_shared] = 1.0
        if rest or int(mask.sum()) != count or count < 1:
            raise ValueError(f"{group.reader} reads {count} of {group.size} units; no cut leaves that")
        take_units(model, group, kept_units(group, mask))


def take_out(model: nn.Module, paths: Sequence[str]) -> None:
    """Put `Gone` in the place of the modules at `paths`."""
    for path in paths:
        model.set_submodule(path, Gone())


def skip_blocks(model: nn.Module, paths: Sequence[str]) -> None:
    """Put `Skipped` in the place of the blocks at `paths`."""
    for path in paths:
        model.set_submodule(path, Skipped())


def take_units(model: nn.Module, group: Group, kept: Tensor) -> None:
    """Leave the units of one group at `kept` [K], in new tensors; tensors that other models share stay as they are."""
    if len(kept) == group.size:
        return
    channels = _channels(kept, group.width)
    for path in (*group.writers, *group.norms):
        module = model.get_submodule(path)
        # a channel that a linear layer reads at several positions has one row
        _take_rows(module, kept if _num_rows(module) == group.size else channels)
    left = torch.unique(kept // group.sharing)  # shared keys and values that are still read
    for path in group.shared:
        _take_rows(model.get_submodule(path), _channels(left, group.width))
    reader = model.get_submodule(group.reader)
    _replace(reader, "weight", torch.as_tensor(reader.weight)[:, channels.to(_device(reader))])
    setattr(reader, SIZES[type(reader)][1], len(channels))
    if group.kind == "heads":
        _set_heads(model.get_submodule(group.writers[0].rpartition(".")[0]), group, len(kept), len(left))


def _num_rows(module: nn.Module) -> int:
    """Return the outputs of a layer, or the channels of a batch norm."""
    return next(len(t) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.ndim)


def _channels(units: Tensor, width: int) -> Tensor:
    """Return the positions [K * width] of the channels of units [K]."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _take_rows(module: nn.Module, index: Tensor) -> None:
    """Leave the outputs at `index` [K] of a linear layer, a convolution (depthwise, too) or a batch norm."""
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.ndim:
            _replace(module, name, value[index.to(value.device)])
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = len(index)
    else:
        setattr(module, SIZES[type(module)][0], len(index))
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        module.groups = module.in_channels = len(index)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.detach().clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _device(module: nn.Module) -> torch.device:
    return torch.as_tensor(module.weight).device


def _set_heads(attention: Any, group: Group, num_heads: int, num_shared: int) -> None:
    """Set the numbers that an attention module keeps of its heads."""
    numbers = dict.fromkeys(NUM_HEADS, (group.size, num_heads))
    numbers["all_head_size"] = (group.size * group.width, num_heads * group.width)
    numbers["num_key_value_heads"] = (group.size // group.sharing, num_shared)
    numbers["num_key_value_groups"] = (group.sharing, num_heads // num_shared)
    for name, (before, after) in numbers.items():
        if getattr(attention, name, None) == before:
            setattr(attention, name, after)
