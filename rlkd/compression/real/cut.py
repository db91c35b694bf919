"""A trained real student on disk and at inference: hidden units cut out, heads zeroed, exits and tokens as trained.

The folder holds `model/`, which transformers loads as it is, `exits.safetensors` and `student.json`. Hidden units are
cut where every block keeps equally many and the configuration has a size for them; transformers has none for heads
that differ in number from hidden size / head size, nor for a convolution's inner channels, so masked ones stay, as
zeros, and save nothing.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from rlkd.compression.real.shipped import Shipment, ShippedStudent, shipped_student
from rlkd.errors import UserError
from rlkd.io.files import (
    MAX_TENSOR_BYTES,
    inside,
    load_tensors,
    number,
    opened,
    read_bytes,
    read_json,
    reason,
    tensor_shapes,
    whole,
    write_error,
    write_whole,
)
from rlkd.models.chain import Masks
from rlkd.models.real.blocks import Group
from rlkd.models.real.hooks import resolve
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import AUTO_CLASSES, HIDDEN_UNITS, Kind, load_model, new_model, quiet

FORMAT = 2
WEIGHTS = ("exits.safetensors", "model/model.safetensors")
MAX_BLOCKS, MAX_WIDTH = 1024, 2**20
CHUNK_BYTES = 2**22
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # what transformers' configurations call it
SPARE_BLOCKS = 32  # layers beyond the card's blocks, such as those of an embedding


def cut_model(
    model: nn.Module, kind: Kind, groups: Sequence[Group], masks: Masks, *, cuts_units: bool = True
) -> nn.Module:
    """Return a model on the CPU that answers like `model` under `masks`, physically smaller where possible.

    Args:
        model: of transformers.
        kind: what it is for.
        groups: its groups.
        masks: one [size] a group.
        cuts_units: cut hidden units out where every block keeps equally many; else they stay, as zeros.
    """
    described: Any = copy.deepcopy(model.config)
    names = [name for name in HIDDEN_UNITS if isinstance(getattr(described, name, None), int)]
    counts = {int(mask.sum()) for group, mask in zip(groups, masks, strict=True) if group.kind == "units"}
    cuts_units = cuts_units and len(counts) == 1 and bool(names)
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    for group, mask in zip(groups, masks, strict=True):
        reader = f"{group.reader}.weight"
        if group.kind == "units" and cuts_units:
            kept = mask.bool()
            state[reader] = state[reader][:, kept]
            for name in (f"{path}.{part}" for path in group.writers for part in ("weight", "bias")):
                if name in state:
                    state[name] = state[name][kept]
        else:
            wide = mask.repeat_interleave(group.width)
            state[reader] = state[reader] * (wide[:, None, None] if state[reader].ndim == 4 else wide)
    if cuts_units:
        setattr(described, names[0], counts.pop())
    small = new_model(described, kind, seed=0)
    small.load_state_dict(state)
    return small


def ship(student: Instrumented, kind: Kind, unit_masks: Masks, keep: float, threshold: float) -> ShippedStudent:
    """Return the student as it will answer, on the CPU.

    Args:
        student: trained.
        kind: of its model.
        unit_masks: one [size] a group of its plan.
        keep: share of tokens.
        threshold: of the exits.
    """
    plan = student.plan
    shipment = Shipment(
        kind,
        plan.blocks,
        plan.attention,
        plan.exits,
        plan.patience,
        threshold,
        plan.select_after,
        keep,
        plan.num_classes,
        plan.drops_rows,
    )
    heads = copy.deepcopy(student.heads).cpu()
    return shipped_student(
        cut_model(student.model, kind, plan.groups, unit_masks, cuts_units=plan.cuts_units), heads, shipment
    )


def save_module_student(student: ShippedStudent, folder: Path, processor: Any, card: dict[str, Any]) -> None:
    """Write `model/` with its tokenizer or image processor, `exits.safetensors` and `student.json`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    model: Any = student.model
    with quiet():
        model.save_pretrained(folder / "model")
        if processor is not None:
            processor.save_pretrained(folder / "model")
    tensors = {name: value.contiguous() for name, value in student.heads.state_dict().items()}
    write_whole(folder / "exits.safetensors", save(tensors))
    sums = {name: _sha256(folder, name) for name in WEIGHTS}
    content = {"format": FORMAT, "sha256": sums, "shipment": asdict(student.shipment), **card}
    write_whole(folder / "student.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_module_student(folder: Path | str) -> ShippedStudent:
    """Read a folder of `save_module_student`; runs no code from it.

    Raises:
        UserError: a file is missing, damaged or altered.
    """
    folder = Path(folder)
    try:
        card = read_json(inside(folder, "student.json"), "a real student's card")
        if card["format"] != FORMAT:
            raise UserError(f"{folder}/student.json: format {card['format']!r:.20}; allowed: {FORMAT}; distil it anew")
        if set(card["sha256"]) != set(WEIGHTS):
            raise ValueError(f"sha256 names {sorted(card['sha256'])!s:.60}; allowed: {list(WEIGHTS)}")
        for name in WEIGHTS:
            if _sha256(folder, name) != card["sha256"][name]:
                raise UserError(f"{folder / name}: checksum differs from student.json; get the student anew")
        shipment = _shipment(card["shipment"])
        _check_model_folder(folder)
        _check_depth(folder, len(shipment.blocks))
        heads = _load_heads(folder, shipment)
        model = load_model(str(folder / "model"), shipment.kind)
        resolve(model, [*shipment.blocks, *shipment.attention])
        _check_outputs(model, heads, shipment)
        student = shipped_student(model, heads, shipment)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder}: not a student of a real model, or a damaged one ({reason(error):.120})") from error
    return student


def _shipment(given: Any) -> Shipment:
    """Return the card's entry as it was written; raise ValueError, KeyError or TypeError for wrong values."""
    values = dict(given)
    if set(values) != {f.name for f in fields(Shipment)}:
        raise ValueError(f"shipment has {sorted(values)!s:.60}; allowed: {[f.name for f in fields(Shipment)]!s:.200}")
    if values["kind"] not in AUTO_CLASSES:
        raise ValueError(f"shipment.kind is {values['kind']!r:.40}; allowed: {', '.join(AUTO_CLASSES)}")
    for name in ("blocks", "attention", "exits"):
        entries, wanted = values[name], int if name == "exits" else str
        if not isinstance(entries, list) or len(entries) > MAX_BLOCKS or any(type(e) is not wanted for e in entries):
            raise ValueError(f"shipment.{name} is {entries!r:.40}; allowed: a list of up to {MAX_BLOCKS}")
        values[name] = tuple(entries)
    num_blocks, exits = len(values["blocks"]), values["exits"]
    if not num_blocks or list(exits) != sorted({e for e in exits if 1 <= e < num_blocks}):
        raise ValueError(f"shipment.exits is {list(exits)!r:.40}; allowed: rising block numbers below {num_blocks}")
    whole(values["patience"], "shipment.patience", 0, MAX_BLOCKS)
    whole(values["num_classes"], "shipment.num_classes", 1, MAX_WIDTH)
    number(values["threshold"], "shipment.threshold", 0.0, 1.0)
    number(values["keep"], "shipment.keep", 0.0, 1.0)
    if values["select_after"] is not None:
        whole(values["select_after"], "shipment.select_after", 1, min(num_blocks, len(values["attention"])))
    if not isinstance(values["drops_rows"], bool):
        raise ValueError(f"shipment.drops_rows is {values['drops_rows']!r:.40}; allowed: true, false")
    return Shipment(**values)


def _check_model_folder(folder: Path) -> None:
    """Raise UserError for an entry of `model/` that leads out of it, is no file, or is too large."""
    inside(folder, "model")
    for path in sorted((folder / "model").iterdir()):
        with opened(
            inside(folder / "model", path.name), None if path.name == "model.safetensors" else MAX_TENSOR_BYTES
        ):
            pass


def _check_depth(folder: Path, num_blocks: int) -> None:
    """ValueError for a model of far more layers than there are blocks or tensors: all would be built first."""
    config = read_json(inside(folder / "model", "config.json"), "a model's configuration")
    num_tensors = _num_tensors(folder / "model" / "model.safetensors")
    depths = config.get("depths")
    claimed = {name: config.get(name) for name in DEPTHS}
    if isinstance(depths, list):
        claimed["depths"] = len(depths) + sum(d for d in depths if isinstance(d, int))
    for name, value in claimed.items():
        if isinstance(value, int) and value > max(num_blocks, num_tensors) + SPARE_BLOCKS:
            raise ValueError(
                f"{name} is {value!s:.20}; the card has {num_blocks} blocks and the weights {num_tensors} tensors"
            )


def _num_tensors(path: Path) -> int:
    with opened(path) as (file, _):
        head = file.read(8)
        length = min(int.from_bytes(head, "little"), MAX_TENSOR_BYTES)
        return len(tensor_shapes(head + file.read(length), str(path)))


def _load_heads(folder: Path, shipment: Shipment) -> nn.ModuleList:
    """One layer an exit: linear, [C, width], or a language model's norm, [width]."""
    path = inside(folder, "exits.safetensors")
    blob = read_bytes(path, MAX_TENSOR_BYTES)
    found = tensor_shapes(blob, str(path))
    schema: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    made: list[nn.Module] = []
    for i in range(len(shipment.exits)):
        shape = found.get(f"{i}.weight", (None, (0,)))[1]
        width = whole(shape[-1] if shape else 0, f"the width of exit {i + 1}", 1, MAX_WIDTH)
        if shipment.kind == "causal_lm":
            schema |= {f"{i}.weight": (torch.float32, (width,))}
            made.append(nn.RMSNorm(width))
        else:
            schema |= {f"{i}.weight": (torch.float32, (shipment.num_classes, width))}
            schema |= {f"{i}.bias": (torch.float32, (shipment.num_classes,))}
            made.append(nn.Linear(width, shipment.num_classes))
    tensors = load_tensors(blob, schema, str(path))
    heads = nn.ModuleList(made)
    heads.load_state_dict(tensors)
    return heads


def _check_outputs(model: Any, heads: nn.ModuleList, shipment: Shipment) -> None:
    """Raise ValueError where the model has other classes than its card, or cannot answer at its exits."""
    is_causal = shipment.kind == "causal_lm"
    num_outputs = model.config.vocab_size if is_causal else model.config.num_labels
    if num_outputs != shipment.num_classes:
        raise ValueError(f"num_classes is {shipment.num_classes}; the model has {num_outputs}")
    if not is_causal:
        return
    if shipment.select_after is not None:
        raise ValueError("shipment.select_after is a block; allowed: null, for a language model answers every token")
    read = getattr(model.get_output_embeddings(), "in_features", None)
    for exit_number, head in enumerate(heads, start=1):
        if tuple(head.normalized_shape) != (read,):  # type: ignore[arg-type]
            raise ValueError(f"exit {exit_number} has shape {head.normalized_shape}; the model's head reads {read}")


def _sha256(folder: Path, name: str) -> str:
    digest = hashlib.sha256()
    with opened(inside(folder, name)) as (file, _):
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
