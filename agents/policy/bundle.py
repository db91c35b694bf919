"""The policy bundle: a folder of safetensors and JSON. Loading it checks every name, shape and bound and runs no code.

stable-baselines3's own zip holds pickles, that is, code; it is never written nor read.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rlkd.agents.policy.policy import TENSORS, Policy, actor_shapes
from rlkd.envs.action import CONTROLS, ControlConfig
from rlkd.envs.observation import HIGH, LOW, OBSERVATIONS, VERSION
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
from rlkd.students.fusion import NUM_CUES

FORMAT = 4
MAX_HIDDEN = 4096
MAX_WEIGHT = 1e6  # far above any learned weight, and far below where sums of products overflow
_EXTRA = ("observation.mean", "observation.deviation", "start")
_TEACHERS = "teacher_weights"  # of policies that weigh several teachers


@dataclass(frozen=True)
class Bundle:
    """A loaded policy and what is known of it."""

    policy: Policy
    provenance: dict[str, Any]  # config, seed, versions, git commit, scores
    digest: str  # sha256 of the tensors


def save_bundle(policy: Policy, folder: Path | str, provenance: dict[str, Any]) -> str:
    """Write `policy.safetensors`, `bundle.json` and a card; returns the tensors' sha256.

    Args:
        policy: the actor, its normalisation and its start.
        folder: made if missing; existing files are replaced one by one, each whole.
        provenance: JSON-able; says from what, when and how well the policy was learned.
    """
    folder = Path(folder)
    extra = dict(zip(_EXTRA, (policy.mean, policy.deviation, policy.start), strict=True))
    if policy.teacher_weights is not None:
        extra[_TEACHERS] = policy.teacher_weights
    blob = save({name: tensor.float().contiguous() for name, tensor in {**policy.weights, **extra}.items()})
    digest = hashlib.sha256(blob).hexdigest()
    card = {
        "format": FORMAT,
        "sha256": digest,
        "observation": {
            "version": VERSION,
            "names": list(OBSERVATIONS),
            "low": LOW.tolist(),
            "high": HIGH.tolist(),
        },
        "action": {"names": list(CONTROLS), "low": -1.0, "high": 1.0, "controls": asdict(policy.controls)},
        "network": {"hidden": policy.weights["hidden.0.weight"].shape[0], "activation": "tanh"},
        **({"weighs_teachers": True} if policy.teacher_weights is not None else {}),
        "provenance": provenance,
    }
    write_whole(folder / "policy.safetensors", blob)
    write_whole(folder / "bundle.json", json.dumps(card, indent=1, allow_nan=False) + "\n")
    write_whole(folder / "README.md", _card(digest, provenance))
    return digest


def load_bundle(folder: Path | str) -> Bundle:
    """Read a bundle.

    Raises:
        UserError: a file is missing, damaged, too large or altered, or its schema is not this version's; the
            message names the field that differs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds bundle.json and policy.safetensors")
    card = read_json(inside(folder, "bundle.json"), "a policy bundle's card")
    weights_file = inside(folder, "policy.safetensors")
    blob = read_bytes(weights_file, MAX_TENSOR_BYTES)
    with refused_as(folder / "bundle.json", "a policy bundle's card"):
        _check_schema(folder, card)
        digest = hashlib.sha256(blob).hexdigest()
        if digest != card["sha256"]:
            raise UserError(f"{weights_file}: checksum differs from bundle.json; get the bundle anew")
        controls = _controls(card["action"]["controls"])
        hidden = whole(card["network"]["hidden"], "network.hidden", 1, MAX_HIDDEN)
        provenance = dict(card["provenance"])
        weighs_teachers = card.get("weighs_teachers", False)
        if not isinstance(weighs_teachers, bool):
            raise ValueError(f"weighs_teachers is {weighs_teachers!r:.20}; allowed: true, or no such key")
    schema = _schema(hidden)
    if weighs_teachers:
        schema[_TEACHERS] = (torch.float32, (NUM_CUES,))
    tensors = load_tensors(blob, schema, str(weights_file))
    _check_values(weights_file, tensors)
    weights = {name: tensors[name] for name in TENSORS}
    mean, deviation, start = (tensors[name] for name in _EXTRA)
    return Bundle(Policy(weights, mean, deviation, start, controls, tensors.get(_TEACHERS)), provenance, digest)


def _controls(given: dict[str, Any]) -> ControlConfig:
    """Return the ranges of the controls; raise ValueError or UserError for anything else."""
    names = {field.name for field in fields(ControlConfig)}
    if set(given) != names:
        raise ValueError(f"action.controls has {sorted(given)!s:.60}; allowed: {sorted(names)}")
    ranges: dict[str, Any] = {}
    for name, value in given.items():
        if name == "step":
            ranges[name] = number(value, "action.controls.step")
        elif not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"action.controls.{name} is {value!r:.40}; allowed: [low, high]")
        else:
            ranges[name] = tuple(number(side, f"action.controls.{name}") for side in value)
    controls = ControlConfig(**ranges)
    controls.check()
    return controls


def _check_schema(folder: Path, card: dict[str, Any]) -> None:
    if card["format"] != FORMAT:
        raise UserError(
            f"{folder}/bundle.json: format is {card['format']!r:.20}, this version of rlkd reads {FORMAT}; "
            "train the policy anew with rlkd train, or use the rlkd version that made the bundle"
        )
    expected = {
        "observation.version": (card["observation"]["version"], VERSION),
        "observation.names": (card["observation"]["names"], list(OBSERVATIONS)),
        "observation.low": (card["observation"]["low"], LOW.tolist()),
        "observation.high": (card["observation"]["high"], HIGH.tolist()),
        "action.names": (card["action"]["names"], list(CONTROLS)),
        "action.low": (card["action"]["low"], -1.0),
        "action.high": (card["action"]["high"], 1.0),
        "network.activation": (card["network"]["activation"], "tanh"),
    }
    for field, (given, wanted) in expected.items():
        if given != wanted:
            shown = f"{given!r:.60}, this version of rlkd has {wanted!r:.60}"
            if isinstance(given, list) and isinstance(wanted, list):
                index = next((i for i, (g, w) in enumerate(zip(given, wanted, strict=False)) if g != w), None)
                shown = (
                    f"{len(given)} entries, this version of rlkd has {len(wanted)}"
                    if index is None
                    else f"{given[index]!r:.60} at {index}, this version of rlkd has {wanted[index]!r:.60}"
                )
            raise UserError(f"{folder}/bundle.json: {field} is {shown}; use the rlkd version that made the bundle")


def _schema(hidden: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, types and shapes of the tensors of a policy with `hidden` units a layer."""
    seen = (len(OBSERVATIONS),)
    extra = dict(zip(_EXTRA, (seen, seen, (len(CONTROLS),)), strict=True))
    return {name: (torch.float32, shape) for name, shape in {**actor_shapes(hidden), **extra}.items()}


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for values that no training writes, with which the policy's actions would be meaningless."""
    deviation = tensors["observation.deviation"]
    if not ((deviation > 0) & deviation.isfinite()).all():
        raise UserError(f"{path}: observation.deviation must be finite and above 0")
    if not ((tensors["start"] >= 0) & (tensors["start"] <= 1)).all():
        raise UserError(f"{path}: start holds a value outside of 0 to 1")
    for name, tensor in tensors.items():
        # observations that a policy was not shown have a huge deviation, so that they read 0
        if name != "observation.deviation" and not (tensor.abs() <= MAX_WEIGHT).all():
            raise UserError(f"{path}: {name} holds a value beyond {MAX_WEIGHT:g} either way")


def _card(digest: str, provenance: dict[str, Any]) -> str:
    """Return the policy's card in Markdown."""
    lines = ["# rlkd policy", "", f"sha256 of the tensors: `{digest}`", ""]
    scores = provenance.get("scores", {})
    if scores:
        lines += ["Held-out tasks, test data:", "", "| comparison | difference in score | 95 % interval |"]
        lines.append("|---|---|---|")
        for name, row in scores.items():
            low, high = row["ci95"]
            lines.append(f"| {name} | {row['difference']:+.4f} | {low:+.4f} to {high:+.4f} |")
        lines.append("")
    lines += [f"- trained on: {json.dumps(provenance.get('task', {}))}", f"- seed: {provenance.get('seed')}"]
    lines += [
        f"- versions: {json.dumps(provenance.get('versions', {}))}",
        "",
        "Use: `rlkd distil --policy FOLDER --goal.keep 0.98`",
        "",
    ]
    return "\n".join(lines)
