"""A real student on disk: `model/`, `exits.safetensors` and `student.json`.

Where transformers' configuration can say the new sizes, `model/` is a plain folder that transformers loads as it is. A
configuration has one size for all blocks, and most have none for heads that are fewer than hidden size / head size or
for a convolution's inner channels: then the weights are called `cut.safetensors`, which transformers does not read;
`load_module_student` cuts a whole model to their shapes.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rlkd.compression.real.cut import fits, shapes_of
from rlkd.compression.real.own import load_own_module, own_weights
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
from rlkd.models.real.blocks import find_groups, layout_of
from rlkd.models.real.hooks import resolve
from rlkd.models.real.pretrained import AUTO_CLASSES, load_config, load_model, new_model, on_meta, quiet
from rlkd.models.real.shrink import cut_to_shapes, skip_blocks, take_out

FORMAT = 4
OLDER: dict[int, dict[str, Any]] = {2: {"gone": [], "skipped": []}, 3: {"skipped": []}}  # what their cards do not have
FORMATS = (*OLDER, FORMAT)
EXITS, PLAIN, CUT = "exits.safetensors", "model/model.safetensors", "model/cut.safetensors"
MAX_SHRINKAGE = 1000  # weights of a whole model for each one that a cut leaves
MAX_BLOCKS, MAX_WIDTH = 1024, 2**20
CHUNK_BYTES = 2**22
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # what transformers' configurations call it
SPARE_BLOCKS = 32  # layers beyond the card's blocks, such as those of an embedding


def save_module_student(student: ShippedStudent, folder: Path, processor: Any, card: dict[str, Any]) -> None:
    """Write `model/` with its tokenizer or image processor, `exits.safetensors` and `student.json`.

    The card's `loads_with` says whether transformers alone can read `model/`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    model: Any = student.model
    if student.shipment.kind == "module":
        card = {**card, "class": type(model).__qualname__, "loads_with": "rlkd, into a module of the class"}
        weights = PLAIN
        write_whole(folder / PLAIN, own_weights(model))
    else:
        weights, loads_with = _save_pretrained(student, processor, folder)
        card = {**card, "loads_with": loads_with}
    tensors = {name: value.contiguous() for name, value in student.heads.state_dict().items()}
    write_whole(folder / EXITS, save(tensors))
    sums = {name: _sha256(folder, name) for name in (EXITS, weights)}
    content = {"format": FORMAT, "sha256": sums, "shipment": asdict(student.shipment), **card}
    write_whole(folder / "student.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def _save_pretrained(student: ShippedStudent, processor: Any, folder: Path) -> tuple[str, str]:
    """Write `model/` of a transformers model; returns the file of its weights, and which packages read it."""
    model: Any = student.model
    is_plain = not student.shipment.gone and fits(model.config, student.shipment.kind, model)
    with quiet():
        if is_plain:
            model.save_pretrained(folder / "model")
        else:
            described = copy.deepcopy(model.config)
            described.architectures = [type(model).__name__]
            described.save_pretrained(folder / "model")
            write_whole(folder / CUT, save({k: v.contiguous() for k, v in _own_state(model).items()}))
        if processor is not None:
            processor.save_pretrained(folder / "model")
    return (PLAIN, "transformers (without exits and tokens), rlkd") if is_plain else (CUT, "rlkd")


def load_module_student(folder: Path | str, own: nn.Module | None = None) -> ShippedStudent:
    """Read a folder of `save_module_student`; runs no code from it.

    Args:
        folder: of the student.
        own: a module of the class that the student was made of, where that is a user's own; it is not changed.

    Raises:
        UserError: a file is missing, damaged or altered, or `own` is missing or of another structure.
    """
    folder = Path(folder)
    with _refused(folder):
        card, shipment, weights = _checked(folder)
        heads = _load_heads(folder, shipment)
        if shipment.kind == "module":
            model = _load_own(folder, card, shipment, own)
        else:
            model = (
                load_model(str(folder / "model"), shipment.kind) if weights == PLAIN else _load_cut(folder, shipment)
            )
            _check_outputs(model, heads, shipment)
        inside = tuple(f"{path}." for path in shipment.skipped)
        resolve(model, [*shipment.blocks, *(a for a in shipment.attention if not a.startswith(inside))])
        return shipped_student(model, heads, shipment)


def check_module_student(folder: Path) -> None:
    """Check all of a student's folder that needs neither transformers nor a module of the user's class.

    Raises:
        UserError: a file is missing, damaged or altered.
    """
    with _refused(folder):
        _load_heads(folder, _checked(folder)[1])


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Turn what a damaged folder raises into one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder}: not a student of a real model, or a damaged one ({reason(error):.120})") from error


def _checked(folder: Path) -> tuple[dict[str, Any], Shipment, str]:
    """Return the card, its shipment and the name of its weights, once format, checksums and sizes are checked."""
    card: dict[str, Any] = read_json(inside(folder, "student.json"), "a real student's card")
    if card["format"] not in FORMATS:
        raise UserError(f"{folder}/student.json: format {card['format']!r:.20}; allowed: {FORMATS}; distil it anew")
    weights = CUT if CUT in card["sha256"] else PLAIN
    if set(card["sha256"]) != {EXITS, weights}:
        raise ValueError(f"sha256 names {sorted(card['sha256'])!s:.60}; allowed: {[EXITS, weights]}")
    for name in (EXITS, weights):
        if _sha256(folder, name) != card["sha256"][name]:
            raise UserError(f"{folder / name}: checksum differs from student.json; get the student anew")
    shipment = _shipment({**OLDER.get(card["format"], {}), **card["shipment"]})
    if shipment.kind != "module":
        _check_model_folder(folder)
        _check_depth(folder, weights, len(shipment.blocks))
    return card, shipment, weights


def _load_own(folder: Path, card: Mapping[str, Any], shipment: Shipment, own: nn.Module | None) -> nn.Module:
    """Return a copy of `own` with the sizes and weights of the folder."""
    if own is None:
        raise UserError(
            f"{folder}: holds the weights of your own class {str(card['class'])[:80]}; give a module of it: "
            "rlkd.load_student(FOLDER, model=...)"
        )
    path = inside(folder / "model", "model.safetensors")
    return load_own_module(
        own, read_bytes(path, MAX_TENSOR_BYTES), str(path), gone=shipment.gone, skipped=shipment.skipped
    )


def _shipment(given: Any) -> Shipment:
    """Return the card's entry as it was written; raise ValueError, KeyError or TypeError for wrong values."""
    values = dict(given)
    if set(values) != {f.name for f in fields(Shipment)}:
        raise ValueError(f"shipment has {sorted(values)!s:.60}; allowed: {[f.name for f in fields(Shipment)]!s:.200}")
    kinds = (*AUTO_CLASSES, "module")
    if values["kind"] not in kinds:
        raise ValueError(f"shipment.kind is {values['kind']!r:.40}; allowed: {', '.join(kinds)}")
    for name in ("blocks", "attention", "exits", "gone", "skipped"):
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
    skipped, may_be = values["skipped"], set(values["blocks"]) - set(values["gone"])
    if values["select_after"] is not None:
        may_be -= {values["blocks"][values["select_after"] - 1]}
    if len(set(skipped)) != len(skipped) or not set(skipped) <= may_be:
        raise ValueError(
            f"shipment.skipped is {list(skipped)!r:.60}; allowed: blocks that are there and select no tokens"
        )
    if not isinstance(values["drops_rows"], bool):
        raise ValueError(f"shipment.drops_rows is {values['drops_rows']!r:.40}; allowed: true, false")
    return Shipment(**values)


def _load_cut(folder: Path, shipment: Shipment) -> nn.Module:
    """Return a whole model of the configuration, cut to the shapes of the weights in `cut.safetensors`.

    Raises:
        UserError, ValueError, KeyError: weights that no cut of that model has.
    """
    described = load_config(str(folder / "model"))
    shapes = {name: shape for name, (_, shape) in _header(folder / CUT).items()}
    bare = on_meta(described, shipment.kind)
    if bare is None:
        raise ValueError("no model can be built of model/config.json")
    num_whole, num_cut = (sum(map(math.prod, s.values())) for s in (shapes_of(_own_state(bare)), shapes))
    if num_whole > MAX_SHRINKAGE * num_cut:
        raise ValueError(f"the configuration has {num_whole} weights, the file {num_cut}")
    model = new_model(described, shipment.kind, seed=0)
    groups = find_groups(model, shipment.blocks, layout_of(model, shipment.blocks))
    skip_blocks(model, shipment.skipped)
    take_out(model, shipment.gone)
    absent = {*shipment.gone, *shipment.skipped}
    cut_to_shapes(model, [g for g in groups if shipment.blocks[g.block] not in absent], shapes)
    own = _own_state(model)
    differ = sorted(set(shapes_of(own).items()) ^ set(shapes.items()))
    if differ:
        raise ValueError(f"{differ[0][0]} of {CUT} does not fit model/config.json")
    state = load_file(folder / CUT)
    model.load_state_dict(state, strict=False)  # tied weights stand in the file once
    if not all(bool(torch.isfinite(value).all()) for value in state.values() if value.is_floating_point()):
        raise ValueError(f"{CUT} holds a non-finite value")
    return model.eval()


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers as in `state_dict`, tied ones once."""
    state, seen = model.state_dict(keep_vars=True), set()
    own = {}
    for name, value in state.items():
        if id(value) not in seen:
            own[name] = value.detach()
        seen.add(id(value))
    return own


def _check_model_folder(folder: Path) -> None:
    """Raise UserError for an entry of `model/` that leads out of it, is no file, or is too large."""
    inside(folder, "model")
    for path in sorted((folder / "model").iterdir()):
        is_weights = f"model/{path.name}" in (PLAIN, CUT)
        with opened(inside(folder / "model", path.name), None if is_weights else MAX_TENSOR_BYTES):
            pass


def _check_depth(folder: Path, weights: str, num_blocks: int) -> None:
    """ValueError for a model of far more layers than there are blocks or tensors: all would be built first."""
    config = read_json(inside(folder / "model", "config.json"), "a model's configuration")
    num_tensors = len(_header(folder / weights))
    depths = config.get("depths")
    claimed = {name: config.get(name) for name in DEPTHS}
    if isinstance(depths, list):
        claimed["depths"] = len(depths) + sum(d for d in depths if isinstance(d, int))
    for name, value in claimed.items():
        if isinstance(value, int) and value > max(num_blocks, num_tensors) + SPARE_BLOCKS:
            raise ValueError(
                f"{name} is {value!s:.20}; the card has {num_blocks} blocks and the weights {num_tensors} tensors"
            )


def _header(path: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return types and shapes of a file of weights."""
    with opened(path) as (file, _):
        head = file.read(8)
        length = min(int.from_bytes(head, "little"), MAX_TENSOR_BYTES)
        return tensor_shapes(head + file.read(length), str(path))


def _load_heads(folder: Path, shipment: Shipment) -> nn.ModuleList:
    """One layer an exit: linear, [C, width], or a language model's norm, [width]."""
    path = inside(folder, EXITS)
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
