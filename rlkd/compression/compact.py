"""The student that ships: masked rows and columns are cut out, exits that never or always fire are resolved.

Unlike `torch.nn.utils.prune`, which only masks, this makes the tensors smaller, so that the latency falls.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlkd.compression.selection import exit_ends
from rlkd.errors import UserError
from rlkd.models import ChainStudent, Layer, Masks, layers_of, num_positions
from rlkd.objectives.hard_label import log_probabilities

FORMAT = 1


class CompactStudent(nn.Module):
    """A physically small student for inference; samples leave one by one at the exits.

    Args:
        layers, heads, exits: as in `ChainStudent`, heads of exits in use only; the last exit is the final one.
        input_shape: shape that one (full) sample is reshaped to.
        kept_inputs: indices of the flat inputs that are read, or None for all.
        threshold: confidence at which a sample leaves at an early exit.
    """

    kept_inputs: Tensor | None

    def __init__(
        self,
        layers: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        exits: Sequence[int],
        input_shape: Sequence[int],
        kept_inputs: Tensor | None,
        threshold: float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.exits = tuple(exits)
        self.input_shape = tuple(input_shape)
        self.register_buffer("kept_inputs", kept_inputs)
        self.threshold = threshold
        self._log_threshold = math.log(max(threshold, 1e-9))
        self.is_conv = isinstance(layers[0], nn.Conv2d)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, C] of the exit that each sample of inputs [B, *input_shape] left at."""
        x = inputs.reshape(inputs.shape[0], *self.input_shape)
        if self.kept_inputs is not None:
            x = x.index_select(1, self.kept_inputs)  # [B, D']
        answers: Tensor | None = None
        waiting: Tensor | None = None  # [R] rows not answered yet, None while that is all of them
        for block, layer in enumerate(self.layers, start=1):
            x = F.relu(layer(x))
            if block not in self.exits:
                continue
            logits = self.heads[self.exits.index(block)](x.flatten(1))  # [R, C]
            if answers is None:
                answers = logits
            else:
                answers[waiting] = logits
            if block != self.exits[-1]:
                confidence = log_probabilities(logits).amax(0)  # [R]
                stay = torch.nonzero(confidence < self._log_threshold)[:, 0]  # [R']
                if len(stay) == 0:
                    return answers
                x = x[stay]
                waiting = stay if waiting is None else waiting[stay]
        assert answers is not None  # the last block always has an exit
        return answers

    def architecture(self) -> dict[str, Any]:
        """All that `load_student` needs besides the tensors."""
        return {
            "kind": "conv" if self.is_conv else "mlp",
            "input_shape": list(self.input_shape),
            "num_kept_inputs": None if self.kept_inputs is None else len(self.kept_inputs),
            "widths": [layer.weight.shape[0] for layer in layers_of(self.layers)],
            "exits": list(self.exits),
            "num_classes": layers_of(self.heads)[-1].weight.shape[0],
            "threshold": self.threshold,
        }


@torch.no_grad()
def compact(student: ChainStudent, masks: Masks, threshold: float) -> CompactStudent:
    """Cut everything masked out of a trained student.

    Its answers equal the masked student's under the same exit threshold, to float tolerance.

    Args:
        student: trained; not changed.
        masks: one [G] a group.
        threshold: 1/C or less ends the student at its first exit, 1 or more drops its early exits.
    """
    exits, heads = list(student.exits), layers_of(student.heads)
    always, never = exit_ends(torch.tensor(threshold), student.num_classes)
    if never:
        exits, heads = exits[-1:], heads[-1:]
    elif always:
        exits, heads = exits[:1], heads[:1]
    kept = [torch.nonzero(mask)[:, 0] for mask in masks]
    layers: list[nn.Module] = []
    for block, layer in enumerate(layers_of(student.layers)[: exits[-1]]):
        weight, bias = layer.weight[kept[block + 1]], _bias(layer)[kept[block + 1]]
        layers.append(_layer_of(weight if student.is_conv and block == 0 else weight[:, kept[block]], bias))
    small_heads = [
        _layer_of(_columns(student, h, block, kept[block]), _bias(h)) for h, block in zip(heads, exits, strict=True)
    ]
    all_inputs = student.is_conv or len(kept[0]) == len(masks[0])
    return CompactStudent(layers, small_heads, exits, student.input_shape, None if all_inputs else kept[0], threshold)


def _columns(student: ChainStudent, head: Layer, block: int, kept: Tensor) -> Tensor:
    """[C, kept units x positions], the weights of a head that read the units `kept` of its block."""
    positions = num_positions(student.is_conv, student.input_shape, block)
    by_unit = head.weight.reshape(len(head.weight), -1, positions)  # [C, U, positions]
    return by_unit[:, kept].flatten(1)


def _bias(layer: Layer) -> Tensor:
    assert layer.bias is not None  # `build_student` makes no layer without one
    return layer.bias


def _layer_of(weight: Tensor, bias: Tensor) -> Layer:
    out_size, in_size = weight.shape[:2]
    layer = nn.Linear(in_size, out_size) if weight.ndim == 2 else nn.Conv2d(in_size, out_size, 3, stride=2, padding=1)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def save_student(student: CompactStudent, folder: Path, extra: dict[str, Any]) -> None:
    """Write `student.safetensors` and `student.json` (architecture, checksum and `extra`) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "student.safetensors"
    partial = weights.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in student.state_dict().items()}, partial)
    os.replace(partial, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card = {"format": FORMAT, "sha256": digest, "architecture": student.architecture(), **extra}
    (folder / "student.json").write_text(json.dumps(card, indent=2) + "\n")


def load_student(folder: Path) -> CompactStudent:
    """The student that `save_student` wrote; runs no code from the files.

    Raises:
        UserError: a file is missing, altered or of another format.
    """
    try:
        card = json.loads((folder / "student.json").read_text())
        blob = (folder / "student.safetensors").read_bytes()
        if card["format"] != FORMAT or hashlib.sha256(blob).hexdigest() != card["sha256"]:
            raise UserError(f"{folder}: not a student of format {FORMAT}, or altered after it was saved")
        student = _empty(card["architecture"])
        student.load_state_dict(load_file(folder / "student.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot read the student ({error})") from error
    return student


def _empty(a: dict[str, Any]) -> CompactStudent:
    shape, widths, kept = a["input_shape"], a["widths"], a["num_kept_inputs"]
    if a["kind"] == "conv":
        first, dims = shape[0], 4
    else:
        first, dims = (math.prod(shape) if kept is None else kept), 2
    tail = (3, 3) if dims == 4 else ()
    sizes = [first, *widths]
    layers = [_layer_of(torch.empty(o, i, *tail), torch.empty(o)) for i, o in zip(sizes, widths, strict=False)]
    seen = [widths[b - 1] * num_positions(dims == 4, shape, b) for b in a["exits"]]
    heads = [_layer_of(torch.empty(a["num_classes"], size), torch.empty(a["num_classes"])) for size in seen]
    index = None if kept is None else torch.empty(kept, dtype=torch.int64)
    return CompactStudent(layers, heads, a["exits"], shape, index, a["threshold"])
