"""A student as a chain of blocks (linear or convolutional) with early exits, maskable inputs and units.

One class serves the MLP and the small convolutional student. Training multiplies activations by masks, so all students
of a population have tensors of the same shapes; after training `rlkd.compression.compact` removes masked rows and
columns. Early exits follow BranchyNet (Teerapittayanon et al. 2016), but every head here is a single linear layer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.gate import START, ExitGate, GateConfig

WIDE = 128  # units; weights that read more of them learn in smaller steps, see `ChainStudent.rate_factors`
MAX_BLOCKS, MAX_WIDTH = 32, 4096  # two such neighbours hold 64 MiB of weights

Layer = nn.Linear | nn.Conv2d
Masks = tuple[Tensor, ...]  # one 0/1 float vector a group: the inputs, then the units of every block


class Outputs(NamedTuple):
    """Outputs of one forward pass."""

    logits: tuple[Tensor, ...]  # one [B, C] an exit, the last being the full student
    features: tuple[Tensor, ...]  # one [B, U] or [B, U, H, W] a block, after activation and mask
    gates: tuple[Tensor, ...] = ()  # one [B] an early exit, logits of leaving there; none without gates


@dataclass(frozen=True)
class StudentConfig:
    """The student's architecture."""

    kind: Literal["mlp", "conv"] = "mlp"
    """mlp: linear blocks. conv: 3x3 convolutions, each halving height and width; heads see every position."""
    widths: tuple[int, ...] = (48, 48)
    """Units (or channels) of each block, first to last."""
    exits: tuple[int, ...] = (1,)
    """After which blocks (counted from 1) an early exit stands; the last block always ends in the final head."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Small trained units at the early exits that decide which samples leave there; off by default."""
    unit_multiple: int = 1
    """Kept units are rounded up to multiples of this; hardware profiles say which multiples a target likes."""

    def check(self) -> None:
        """Raise UserError for impossible widths or exits."""
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"student.widths: got {list(self.widths)}; allowed: one or more widths of at least 1")
        if len(self.widths) > MAX_BLOCKS or max(self.widths) > MAX_WIDTH:
            raise UserError(
                f"student.widths: got {len(self.widths)} blocks of up to {max(self.widths)} units; "
                f"allowed: up to {MAX_BLOCKS} of up to {MAX_WIDTH}"
            )
        allowed = range(1, len(self.widths))
        if sorted(set(self.exits)) != list(self.exits) or not set(self.exits) <= set(allowed):
            rising = f"rising block numbers from 1 to {len(self.widths) - 1}" if allowed else "[]"
            raise UserError(
                f"student.exits: got {list(self.exits)}; allowed: {rising} (the last block has the final head)"
            )
        if not 1 <= self.unit_multiple <= MAX_WIDTH:
            raise UserError(f"student.unit_multiple: got {self.unit_multiple}; allowed: 1 to {MAX_WIDTH}")
        self.gate.check()
        if self.gate.enabled and not self.exits:
            raise UserError("student.gate.enabled: got true for a student without an early exit; allowed: false")


class ChainStudent(nn.Module):
    """A chain of blocks, each a weighted layer and a ReLU, with a head for each exit.

    Args:
        layers: `nn.Linear`s, or `nn.Conv2d`s of 3x3 with stride 2 and padding 1, all with biases.
        heads: the `nn.Linear` of each exit, in order, the final one last; after a convolution its inputs are the
            flattened channels and positions.
        exits: the block (from 1) behind which each head stands; the last equals len(layers).
        input_shape: [D] or [channels, height, width] that one sample is reshaped to.
        gate: how the gates of the early exits are trained, where it is enabled; by default there are none.
        unit_multiple: kept units are rounded up to multiples of this.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear | nn.Conv2d],
        heads: Sequence[nn.Linear],
        exits: Sequence[int],
        input_shape: Sequence[int],
        *,
        gate: GateConfig | None = None,
        unit_multiple: int = 1,
    ) -> None:
        super().__init__()
        for layer in layers:
            if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.padding) != (
                (3, 3),
                (2, 2),
                (1, 1),
            ):
                raise ValueError(f"layers: got {layer}; allowed: 3x3 convolutions with stride 2 and padding 1")
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.exits = tuple(exits)
        self.input_shape = tuple(input_shape)
        self.is_conv = isinstance(layers[0], nn.Conv2d)
        self.gate = gate or GateConfig()
        self.unit_multiple = unit_multiple
        self.gates = nn.ModuleList(ExitGate(self.num_classes) for _ in self.exits[:-1] if self.gate.enabled)
        # Leaving pixels out of a convolution saves nothing, so the inputs are one group of size 1.
        num_inputs = 1 if self.is_conv else math.prod(self.input_shape)
        self.group_sizes = (num_inputs, *(layer.weight.shape[0] for layer in layers))

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return layers_of(self.heads)[-1].weight.shape[0]

    def rate_factors(self) -> dict[str, float]:
        """Return the factors below 1 on the step size of weights that read more than WIDE units, by parameter name.

        A step of Adam changes each weight by as much, so that the output of a layer changes in proportion to the units
        that it reads. Divided by their number, wide students learn at the same rates as narrow ones (Yang et al. 2022,
        https://arxiv.org/abs/2203.03466, table 3, hidden and output weights under Adam).
        """
        read = {f"layers.{i}.weight": self.group_sizes[i] for i in range(1, len(self.layers))}
        read |= {f"heads.{i}.weight": self.group_sizes[block] for i, block in enumerate(self.exits)}
        return {name: WIDE / units for name, units in read.items() if units > WIDE}

    def full_masks(self) -> Masks:
        """Return masks that keep everything."""
        return tuple(torch.ones(size) for size in self.group_sizes)

    def forward(self, inputs: Tensor, masks: Masks) -> Outputs:
        """Return logits of all exits and features of all blocks for inputs [B, *any], prod(any) = prod(input_shape)."""
        x = inputs.reshape(inputs.shape[0], *self.input_shape)  # [B, D] or [B, channels, H, W]
        x = x if self.is_conv else x * masks[0]
        logits, features = [], []
        for block, layer in enumerate(self.layers, start=1):
            x = F.relu(layer(x))  # [B, U] or [B, U, H, W]
            x = x * (masks[block][:, None, None] if self.is_conv else masks[block])
            features.append(x)
            if block in self.exits:
                logits.append(self.heads[self.exits.index(block)](x.flatten(1)))  # [B, C]
        gates = tuple(gate(z) for gate, z in zip(self.gates, logits, strict=False))
        return Outputs(tuple(logits), tuple(features), gates)


def num_positions(is_conv: bool, input_shape: Sequence[int], block: int) -> int:
    """Return height times width after `block` convolutions of stride 2; 1 for linear layers."""
    if not is_conv:
        return 1
    height, width = input_shape[-2:]
    shrink = 1 << block
    return math.ceil(height / shrink) * math.ceil(width / shrink)


def layers_of(modules: nn.ModuleList) -> list[Layer]:
    """Return the weighted layers in a `ModuleList` with their type."""
    return cast("list[Layer]", list(modules))


def build_student(config: StudentConfig, input_shape: Sequence[int], num_classes: int) -> ChainStudent:
    """Build a student with uninitialised parameters (`initialise` fills them).

    Raises:
        UserError: impossible widths or exits, or more halvings than the images' size allows.
    """
    config.check()
    exits = (*config.exits, len(config.widths))
    layers: list[Layer]
    if config.kind == "mlp":
        shape: tuple[int, ...] = (math.prod(input_shape),)
        sizes = (shape[0], *config.widths)
        layers = [nn.Linear(a, b, device="meta") for a, b in pairwise(sizes)]
    else:
        if len(input_shape) not in (2, 3):
            raise UserError(f"student.kind: got conv for inputs of shape {list(input_shape)}; allowed: mlp")
        shape = tuple(input_shape) if len(input_shape) == 3 else (1, *input_shape)
        if min(shape[1:]) >> (len(config.widths) - 1) < 1:
            raise UserError(
                f"student.widths: got {len(config.widths)} convolutional blocks, each halving images of "
                f"{shape[1]}x{shape[2]}; allowed: at most {min(shape[1:]).bit_length()}"
            )
        sizes = (shape[0], *config.widths)
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1, device="meta") for a, b in pairwise(sizes)]
    heads = [
        nn.Linear(
            config.widths[block - 1] * num_positions(config.kind == "conv", shape, block), num_classes, device="meta"
        )
        for block in exits
    ]
    return ChainStudent(
        layers, heads, exits, input_shape=shape, gate=config.gate, unit_multiple=config.unit_multiple
    ).to_empty(device="cpu")


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter from `generator`: He-uniform weights (He et al. 2015), zero biases.

    Gates begin as a threshold without a random draw, so a student has the same weights with and without gates.
    """
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.zero_()
    for part in module.modules():
        if isinstance(part, ExitGate):
            part.stand_for(START)
    draw_weights([module.get_parameter(name) for name in drawn_names(module)], generator)


def drawn_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that `initialise` draws, in order."""
    gates = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, ExitGate))
    return [name for name, p in module.named_parameters() if p.ndim > 1 and not name.startswith(gates)]


@torch.no_grad()
def draw_weights(weights: Iterable[Tensor], generator: torch.Generator) -> None:
    """Fill weights [outputs, inputs, *] from `generator`, He-uniform."""
    for weight in weights:
        bound = math.sqrt(6.0 / weight[0].numel())
        weight.uniform_(-bound, bound, generator=generator)
