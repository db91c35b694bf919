"""The student that ships: without masked rows and columns, and without exits that never or always fire.

Unlike `torch.nn.utils.prune`, which only masks, this makes the tensors smaller, so the latency falls.
"""

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from rlkd.compression.selection import exit_ends
from rlkd.errors import UserError
from rlkd.io.files import (
    MAX_TENSOR_BYTES,
    inside,
    load_tensors,
    number,
    read_bytes,
    read_json,
    refused_as,
    whole,
    write_whole,
)
from rlkd.losses.hard_label import log_probabilities
from rlkd.models import ChainStudent, ExitGate, Layer, Masks, layers_of, num_positions

FORMAT = 2
MAX_SIZE = 2**20


class CompactStudent(nn.Module):
    """A physically small student for inference; samples leave one by one at the exits.

    Args:
        layers, heads, exits: as in `ChainStudent`, with the heads of used exits alone; the last exit is the final one.
        input_shape: shape that one (full) sample is reshaped to.
        kept_inputs: indices of the flat inputs that are read, or None for all.
        threshold: confidence at which a sample leaves at an early exit.
        gates: one for each early exit in use; if given, they decide instead of the threshold.
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
        gates: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.gates = nn.ModuleList(gates)
        self.exits = tuple(exits)
        self.input_shape = tuple(input_shape)
        self.register_buffer("kept_inputs", kept_inputs)
        self.threshold = threshold
        self._log_threshold = math.log(max(threshold, 1e-9))
        self.is_conv = isinstance(layers[0], nn.Conv2d)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [B, C], each from the exit where the sample of inputs [B, *input_shape] leaves."""
        x = inputs.reshape(inputs.shape[0], *self.input_shape)
        if self.kept_inputs is not None:
            x = x.index_select(1, self.kept_inputs)  # [B, D']
        answers: Tensor | None = None
        waiting: Tensor | None = None  # [R] rows without an answer; None for all rows
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
                stay = torch.nonzero(self.stays(logits, self.exits.index(block)))[:, 0]  # [R']
                if len(stay) == 0:
                    return answers
                x = x[stay]
                waiting = stay if waiting is None else waiting[stay]
        assert answers is not None  # the last block always has an exit
        return answers

    def stays(self, logits: Tensor, exit_index: int) -> Tensor:
        """Return [R] bool, samples that go on behind the early exit `exit_index` (from 0), for its logits [R, C]."""
        if self.gates:
            return torch.as_tensor(self.gates[exit_index](logits) < 0)
        return log_probabilities(logits).amax(0) < self._log_threshold

    def architecture(self) -> dict[str, Any]:
        """Describe the student for `load_student`, without the tensors."""
        return {
            "kind": "conv" if self.is_conv else "mlp",
            "input_shape": list(self.input_shape),
            "num_kept_inputs": None if self.kept_inputs is None else len(self.kept_inputs),
            "widths": [layer.weight.shape[0] for layer in layers_of(self.layers)],
            "exits": list(self.exits),
            "num_classes": layers_of(self.heads)[-1].weight.shape[0],
            "threshold": self.threshold,
            **({"gated": True} if self.gates else {}),
        }


@torch.no_grad()
def compact(student: ChainStudent, masks: Masks, threshold: float) -> CompactStudent:
    """Build the small student without the masked parts of a trained student.

    Its answers equal the masked student's under the same exit threshold, to float tolerance.

    Args:
        student: trained; not changed.
        masks: one [G] a group.
        threshold: 1/C or less ends the student at its first exit, 1 or more drops its early exits.
    """
    exits, heads, gates = list(student.exits), layers_of(student.heads), [copy.deepcopy(g) for g in student.gates]
    always, never = exit_ends(torch.tensor(threshold), student.num_classes)
    if never:
        exits, heads, gates = exits[-1:], heads[-1:], []
    elif always:
        exits, heads, gates = exits[:1], heads[:1], []
    kept = [torch.nonzero(mask)[:, 0] for mask in masks]
    layers: list[nn.Module] = []
    for block, layer in enumerate(layers_of(student.layers)[: exits[-1]]):
        weight, bias = layer.weight[kept[block + 1]], _bias(layer)[kept[block + 1]]
        layers.append(_layer_of(weight if student.is_conv and block == 0 else weight[:, kept[block]], bias))
    small_heads = [
        _layer_of(_columns(student, h, block, kept[block]), _bias(h)) for h, block in zip(heads, exits, strict=True)
    ]
    all_inputs = student.is_conv or len(kept[0]) == len(masks[0])
    kept_inputs = None if all_inputs else kept[0]
    small = CompactStudent(layers, small_heads, exits, student.input_shape, kept_inputs, threshold, gates)
    return small.requires_grad_(False)


def _columns(student: ChainStudent, head: Layer, block: int, kept: Tensor) -> Tensor:
    """Return [C, kept units x positions], the weights of a head for the units `kept` of its block."""
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
    """Write `student.safetensors` and `student.json` (architecture, checksum of both, and `extra`) into `folder`."""
    blob = save({name: t.contiguous() for name, t in student.state_dict().items()})
    architecture = student.architecture()
    card = {"format": FORMAT, "sha256": _digest(architecture, blob), "architecture": architecture, **extra}
    write_whole(folder / "student.safetensors", blob)
    write_whole(folder / "student.json", json.dumps(card, indent=2, allow_nan=False) + "\n")


def _digest(architecture: dict[str, Any], blob: bytes) -> str:
    """Return the sha256 of architecture and tensors together; another threshold makes another student."""
    text = json.dumps(architecture, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode() + b"\n" + blob).hexdigest()


def load_student(folder: Path | str) -> CompactStudent:
    """Load the student that `save_student` wrote, without running code from the files.

    Raises:
        UserError: a file is missing, altered, too large or of another format, or the architecture is impossible.
    """
    folder = Path(folder)
    card = read_json(inside(folder, "student.json"), "a student's card")
    weights = inside(folder, "student.safetensors")
    blob = read_bytes(weights, MAX_TENSOR_BYTES)
    if card.get("format") != FORMAT:
        raise UserError(
            f"{folder}/student.json: student of format {card.get('format')!r:.20}; allowed: {FORMAT}; distil it anew"
        )
    with refused_as(folder / "student.json", "a student's card"):
        architecture = card["architecture"]
        if _digest(architecture, blob) != card["sha256"]:
            raise UserError(f"{folder}: the student was altered after it was saved (checksum); get it anew")
        _check_architecture(architecture)
    with torch.device("meta"):  # shapes alone: no memory is allocated before the sizes on the card are checked
        skeleton = _empty(architecture)
    schema = {name: (t.dtype, tuple(t.shape)) for name, t in skeleton.state_dict().items()}
    tensors = load_tensors(blob, schema, str(weights))
    kept = tensors.get("kept_inputs")
    num_inputs = math.prod(architecture["input_shape"])
    if kept is not None and not (((kept >= 0) & (kept < num_inputs)).all() and (kept.diff() > 0).all()):
        raise UserError(f"{weights}: kept_inputs must be rising indices below {num_inputs}")
    skeleton.load_state_dict(tensors, assign=True)
    return skeleton.requires_grad_(False)


def _check_architecture(a: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError for an impossible architecture."""
    if a["kind"] not in ("mlp", "conv"):
        raise ValueError(f"kind is {a['kind']!r:.20}; allowed: mlp, conv")
    is_conv = a["kind"] == "conv"
    shape, widths, exits = a["input_shape"], a["widths"], a["exits"]
    for name, sizes, highest in (("input_shape", shape, MAX_SIZE), ("widths", widths, MAX_SIZE), ("exits", exits, 64)):
        if not isinstance(sizes, list) or not 1 <= len(sizes) <= 64:
            raise ValueError(f"{name} is {sizes!r:.40}; allowed: a list of 1 to 64 sizes")
        for size in sizes:
            whole(size, name, 1, highest)
    if exits != sorted(set(exits)) or exits[-1] != len(widths):
        raise ValueError(f"exits is {exits!r:.40}; allowed: rising block numbers, the last {len(widths)}")
    num_inputs = math.prod(shape)
    if num_inputs > MAX_SIZE or (is_conv and len(shape) != 3):
        raise ValueError(f"input_shape is {shape!r:.40}; allowed: up to {MAX_SIZE} values, three sizes for conv")
    if a["num_kept_inputs"] is not None:
        if is_conv:
            raise ValueError("num_kept_inputs is given; a convolution reads all inputs")
        whole(a["num_kept_inputs"], "num_kept_inputs", 1, num_inputs)
    whole(a["num_classes"], "num_classes", 1, MAX_SIZE)
    number(a["threshold"], "threshold", 0.0, 1.0)
    if a.get("gated", True) is not True:  # absent where the threshold decides
        raise ValueError(f"gated is {a['gated']!r:.20}; allowed: true, or no such key")


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
    gates = [ExitGate(a["num_classes"]) for _ in a["exits"][:-1] if "gated" in a]
    return CompactStudent(layers, heads, a["exits"], shape, index, a["threshold"], gates)
