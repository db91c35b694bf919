"""Units of a user's own module, found by tracing it: a layer that writes them and the one layer that reads them.

`torch.fx` records the graph of the forward pass. A unit that only normalisation, activations, pooling and flattening
separate from its reader can be masked there, and cut out of writer and reader alike. A module that cannot be traced
(control flow that depends on data) keeps all its units.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from rlkd.models.real.blocks import Group

WRITERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Sigmoid),
    *(nn.Softplus, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
FUNCTIONS = (
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.dropout, F.dropout2d, F.tanh),
    *(torch.relu, torch.tanh, torch.sigmoid, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
)
METHODS = ("relu", "tanh", "sigmoid", "contiguous")


def is_own_module(model: nn.Module) -> bool:
    """Whether a model is a user's own module, as opposed to one of transformers."""
    return not hasattr(model, "save_pretrained")


def traced_groups(model: nn.Module, blocks: Sequence[str]) -> list[Group]:
    """Find units between a writer inside a block and its one reader; empty where the model cannot be traced."""
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception:  # a forward pass with control flow: fx raises whatever that raises
        return []
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    modules = dict(model.named_modules())
    groups = []
    for node in graph.nodes:
        group = _group(node, modules, blocks) if node.op == "call_module" else None
        if group is not None and all(counts[p] == 1 for p in (*group.writers, group.reader, *group.norms)):
            groups.append(group)
    return groups


def _group(node: torch.fx.Node, modules: dict[str, nn.Module], blocks: Sequence[str]) -> Group | None:
    """Return the group that the layer at `node` writes; None where its units have no single reader."""
    writer = modules[str(node.target)]
    block = block_of(str(node.target), blocks)
    if not isinstance(writer, WRITERS) or getattr(writer, "groups", 1) != 1 or block is None:
        return None
    size, followers, is_flat, now = len(writer.weight), [], isinstance(writer, nn.Linear), node
    while len(now.users) == 1:
        now = next(iter(now.users))
        module = modules.get(str(now.target)) if now.op == "call_module" else None
        if isinstance(module, NORMS) and not (is_flat and not isinstance(writer, nn.Linear)):
            followers.append(str(now.target))
        elif isinstance(module, nn.Flatten) or _is_flatten(now):
            if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
                return None
            is_flat = True
        elif isinstance(module, WRITERS) and getattr(module, "groups", 1) == 1:
            return _with_reader(module, str(now.target), str(node.target), size, tuple(followers), block, is_flat)
        elif not (isinstance(module, ELEMENTWISE) or _is_elementwise(now)):
            return None
    return None


def _with_reader(
    reader: nn.Module, path: str, writer: str, size: int, followers: tuple[str, ...], block: int, is_flat: bool
) -> Group | None:
    read = torch.as_tensor(reader.weight).shape[1]
    if read % size or (read != size and not isinstance(reader, nn.Linear)):
        return None
    if isinstance(reader, nn.Linear) is not is_flat:  # a linear layer over the last axis of an image reads no channels
        return None
    kind = "units" if read == size and isinstance(reader, nn.Linear) else "channels"
    return Group(kind, block, path, (writer,), size, read // size, norms=followers)


def _is_flatten(node: torch.fx.Node) -> bool:
    """Whether a call flattens everything behind the batch."""
    is_call = (node.op == "call_function" and node.target is torch.flatten) or (
        node.op == "call_method" and node.target == "flatten"
    )
    arguments: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    return is_call and arguments == (1,)


def _is_elementwise(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in METHODS
    return node.op == "call_function" and node.target in FUNCTIONS and node.target is not operator.add


def block_of(path: str, blocks: Sequence[str]) -> int | None:
    """Return the block (from 0) that a module path lies in; None where it lies in none."""
    return next((i for i, block in enumerate(blocks) if path == block or path.startswith(f"{block}.")), None)


def free_exits(groups: Sequence[Group], blocks: Sequence[str]) -> list[int]:
    """Return the blocks (from 1, without the last one) whose output has no unit of a group: an exit may stand there."""
    crossed: set[int] = set()
    for group in groups:
        reader = block_of(group.reader, blocks)
        crossed |= set(range(group.block + 1, (len(blocks) if reader is None else reader) + 1))
    return [block for block in range(1, len(blocks)) if block not in crossed]
