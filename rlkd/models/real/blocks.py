"""The parts of a real model that can be switched off: blocks, attention heads, hidden units, inner channels.

A unit is removed by putting zeros before the layer that reads it, which equals cutting it out. Where the parts lie
is written down: a family of transformers in `LAYOUTS`, the inner layers of convolutional blocks in `CHANNELS`. A model
of none of them keeps all its units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlkd.errors import UserError
from rlkd.models.chain import Masks
from rlkd.models.real.sharding import whole

KINDS = ("units", "heads", "channels")  # of groups
LARGE = 0.25  # of the largest list's weights


@dataclass(frozen=True)
class Layout:
    """Paths inside one block."""

    attention: str  # its output is (features, weights [B, heads, L, L])
    queries: tuple[str, ...]  # layers that write heads: query, key, value
    out: str  # the layer that reads heads
    up: tuple[str, ...]  # layers that write hidden units
    down: str  # the layer that reads them


LAYOUTS = {
    "bert": Layout(
        "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
    ),
    "distilbert": Layout(
        "attention",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        ("ffn.lin1",),
        "ffn.lin2",
    ),
    "vit": Layout(
        "attention",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        ("mlp.fc1",),
        "mlp.fc2",
    ),
    "llama": Layout(
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
}


@dataclass(frozen=True)
class ChannelLayout:
    """Paths inside one convolutional layer whose inner channels nothing else reads."""

    writers: tuple[
        str, ...
    ]  # what makes the channels, one after the other; normalisation and activation keep them apart
    reader: str


CHANNELS = {
    "resnet bottleneck": ChannelLayout(("layer.1.convolution",), "layer.2.convolution"),
    "resnet basic": ChannelLayout(("layer.0.convolution",), "layer.1.convolution"),
    "convnext": ChannelLayout(("pwconv1",), "pwconv2"),
    "mobilenet v2": ChannelLayout(("expand_1x1.convolution", "conv_3x3.convolution"), "reduce_1x1.convolution"),
}


@dataclass(frozen=True)
class Group:
    """Units of one kind in one block, or in one layer of a convolutional block."""

    kind: str  # of KINDS
    block: int  # from 0
    reader: str  # path of the layer that reads them
    writers: tuple[str, ...]  # paths of the layers whose rows are cut with them
    size: int
    width: int  # channels a unit: 1, a head's dimension, or the positions of a channel that a linear layer reads
    norms: tuple[str, ...] = ()  # paths of normalisations that keep channels apart and are cut with them
    shared: tuple[str, ...] = ()  # paths of layers that write keys and values which several heads share
    sharing: int = 1  # heads that share one of those keys and values

    def settled(self, count: float) -> float:
        """Return how many units stay where `count` are asked for: equally many heads for each shared key and value."""
        if self.sharing == 1:
            return count
        num_shared = self.size // self.sharing
        return num_shared * min(max((int(count) + num_shared // 2) // num_shared, 1), self.sharing)

    def multiple(self, num_channels: int) -> int:
        """Return the number of units whose multiples give layers with multiples of `num_channels` channels.

        A head is as many channels as it is wide. Of heads that share keys and values, equally many stay for each.
        """
        units = num_channels // math.gcd(num_channels, self.width) if self.kind == "heads" else num_channels
        return units if self.sharing == 1 or units == 1 else math.lcm(units, self.size // self.sharing)


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the model's blocks: the children of its last large `nn.ModuleList`, or else `nn.Sequential`.

    A list is large with a quarter of the largest one's weights; the last one is the decoder of an encoder-decoder.
    Children that are lists themselves give way to their own children. Empty where there is no list.
    """
    for kind in (nn.ModuleList, nn.Sequential):
        lists: dict[str, int] = {}
        for name, module in model.named_modules():
            is_inside = any(not outer or name.startswith(f"{outer}.") for outer in lists)
            if isinstance(module, kind) and len(module) and not is_inside:
                lists[name] = sum(p.numel() for p in module.parameters())
        if lists:
            largest = max(lists.values())
            return _flat(model, [name for name, size in lists.items() if size >= LARGE * largest][-1])
    return []


def _flat(model: nn.Module, path: str) -> list[str]:
    """Paths of a list's children, those of lists inside it in their place."""
    paths = []
    for name, child in model.get_submodule(path).named_children():
        inner = f"{path}.{name}" if path else name
        paths += _flat(model, inner) if isinstance(child, nn.ModuleList) else [inner]
    return paths


def layout_of(model: nn.Module, blocks: Sequence[str]) -> Layout | None:
    """Return the layout that fits every block, or None."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for layout in LAYOUTS.values():
        paths = (*layout.queries, layout.out, *layout.up, layout.down)
        if blocks and all(f"{block}.{path}" in names for block in blocks for path in paths):
            return layout
    return None


def find_groups(model: nn.Module, blocks: Sequence[str], layout: Layout | None) -> list[Group]:
    """Hidden units, then heads, of every block; without a layout, inner channels, where there are any.

    The number of heads comes from `model.config.num_attention_heads`. Keys and values that several heads share
    (grouped-query attention) are no writers, because a head that goes leaves them to the others.
    """
    if layout is None:
        return _channel_groups(model, blocks)
    groups = []
    for index, block in enumerate(blocks):
        down, out = linear(model, f"{block}.{layout.down}"), linear(model, f"{block}.{layout.out}")
        up = tuple(f"{block}.{path}" for path in layout.up)
        if all(linear(model, path).out_features == down.in_features for path in up):
            groups.append(Group("units", index, f"{block}.{layout.down}", up, down.in_features, 1))
        num_heads = getattr(model.config, "num_attention_heads", None)
        if not isinstance(num_heads, int) or num_heads < 1 or out.in_features % num_heads:
            continue
        writers = tuple(
            f"{block}.{path}"
            for path in layout.queries
            if linear(model, f"{block}.{path}").out_features == out.in_features
        )
        if writers:
            width = out.in_features // num_heads
            shared = tuple(f"{block}.{path}" for path in layout.queries if f"{block}.{path}" not in writers)
            sizes = {linear(model, path).out_features for path in shared}
            sharing = out.in_features // min(sizes, default=out.in_features)
            if sizes and (len(sizes) > 1 or num_heads % sharing or sharing * min(sizes) != out.in_features):
                continue
            reader = f"{block}.{layout.out}"
            groups.append(Group("heads", index, reader, writers, num_heads, width, shared=shared, sharing=sharing))
    return groups


def _channel_groups(model: nn.Module, blocks: Sequence[str]) -> list[Group]:
    """Inner channels of every layer of a convolutional block that one of `CHANNELS` describes."""
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    batch_norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    groups = []
    for index, block in enumerate(blocks):
        inside = (name for name, _ in model.get_submodule(block).named_modules(prefix=block))
        for path in inside:
            for layout in CHANNELS.values():
                reader, writers = f"{path}.{layout.reader}", tuple(f"{path}.{name}" for name in layout.writers)
                if reader not in weights or not all(name in weights for name in writers):
                    continue
                size = weights[reader].shape[1]
                if all(len(weights[name]) == size for name in writers):
                    norms = tuple(
                        n for n in (f"{w.rpartition('.')[0]}.normalization" for w in writers) if n in batch_norms
                    )
                    groups.append(Group("channels", index, reader, writers, size, 1, norms))
                    break  # a bottleneck's first pair of convolutions looks like a basic layer's
    return groups


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return a language model's output layer, which its exits answer through; None where it has none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    layer: nn.Module | None = get() if get is not None else None
    return layer


def linear(model: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at `path`."""
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def group_importance(model: nn.Module, groups: Sequence[Group]) -> Masks:
    """Return each unit's importance: mean absolute weight that writes it plus mean absolute weight that reads it.

    Coupled weights are judged together, as in DepGraph (Fang et al. 2023), by magnitude (Li et al. 2017).

    Returns:
        One [size] a group, on the CPU.
    """
    scores = []
    for group in groups:
        written = [_magnitude(model, path).mean(1) for path in group.writers]  # each [size * width]
        read = _magnitude(model, group.reader).mean(0)  # [size * width]
        if len(written[0]) != len(read):  # a channel that is read at several positions
            read = read.reshape(group.size, group.width).mean(1)
            scores.append((torch.stack(written).mean(0) + read).float().cpu())
            continue
        total = torch.stack(written).mean(0) + read
        scores.append(total.reshape(group.size, group.width).mean(1).float().cpu())
    return tuple(scores)


def _magnitude(model: nn.Module, path: str) -> Tensor:
    """[out, in], absolute weights of the layer at `path`, a sharded one gathered, means over a convolution's kernel."""
    weight = whole(torch.as_tensor(model.get_submodule(path).weight)).abs()
    return weight.flatten(2).mean(-1) if weight.ndim > 2 else weight


def mask_groups(
    model: nn.Module, groups: Sequence[Group], masks: Callable[[], Sequence[Tensor]]
) -> list[RemovableHandle]:
    """Multiply what every reader reads by its group's mask in all forward passes until the handles are removed.

    Args:
        model: has the groups.
        groups: of `find_groups`.
        masks: gives the current masks, one [size] a group.
    """
    handles = []
    for index, group in enumerate(groups):
        reader = model.get_submodule(group.reader)

        def hook(
            _: nn.Module,
            args: tuple[Any, ...],
            index: int = index,
            width: int = group.width,
            num_axes: int = 2 if isinstance(reader, nn.Conv2d) else 1 if isinstance(reader, nn.Conv1d) else 0,
        ) -> tuple[Any, ...]:
            mask = masks()[index].to(args[0])  # [size]
            if width > 1:
                mask = mask.repeat_interleave(width)  # [size * width]
            return (args[0] * mask.reshape(-1, *[1] * num_axes), *args[1:])

        handles.append(reader.register_forward_pre_hook(hook))
    return handles


def checkpoint_blocks(model: nn.Module) -> None:
    """Let a model of transformers compute its blocks again in backward passes of training.

    Raises:
        UserError: another model, or one that has no gradient checkpointing.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"train.gradient_checkpointing: {type(model).__name__} has none; allowed: models of transformers that "
            "support it, or --train.micro_batches"
        )
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer name first
    enable: Any = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})
