"""The policy bundle: a folder of safetensors and JSON. Loading it checks every name, shape and bound and runs no code.

stable-baselines3's own zip holds pickles, that is, code; it is never written nor read.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rlkd.agents.policy import TENSORS, Policy
from rlkd.agents.search import Shortlist
from rlkd.envs.action import CONTROLS, ControlConfig
from rlkd.envs.observation import HIGH, LOW, OBSERVATIONS, VERSION
from rlkd.errors import UserError

FORMAT = 2
MAX_BYTES = 64 * 2**20
_EXTRA = ("observation.mean", "observation.deviation", "plan", "static.points", "static.terms")


@dataclass(frozen=True)
class Bundle:
    """A loaded policy and what is known of it."""

    policy: Policy
    provenance: dict[str, Any]  # config, seed, versions, git commit, scores
    digest: str  # sha256 of the tensors


def save_bundle(policy: Policy, folder: Path, provenance: dict[str, Any]) -> str:
    """Write `policy.safetensors`, `bundle.json` and a card; returns the tensors' sha256.

    Args:
        policy: the actor, its normalisation, its start setting and its static rivals.
        folder: made if missing; existing files are replaced one by one, each whole.
        provenance: JSON-able; says from what, when and how well the policy was learned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    extra = (policy.mean, policy.deviation, policy.plan, policy.static.points, policy.static.terms)
    tensors = {**policy.weights, **dict(zip(_EXTRA, extra, strict=True))}
    blob = save({name: tensor.float().contiguous() for name, tensor in tensors.items()})
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
        "provenance": provenance,
    }
    _replace(folder / "policy.safetensors", blob)
    _replace(folder / "bundle.json", (json.dumps(card, indent=1) + "\n").encode())
    _replace(folder / "README.md", _card(digest, provenance).encode())
    return digest


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle.

    Raises:
        UserError: a file is missing, damaged, too large or altered, or its schema is not this version's; the
            message names the field that differs.
    """
    card, blob = _read(folder)
    try:
        _check_schema(folder, card)
        digest = hashlib.sha256(blob).hexdigest()
        if digest != card["sha256"]:
            raise UserError(f"{folder}/policy.safetensors: checksum differs from bundle.json; get the bundle anew")
        tensors = load(blob)
        _check_shapes(folder, tensors, int(card["network"]["hidden"]))
        ranges: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in card["action"]["controls"].items()
        }
        controls = ControlConfig(**ranges)
        controls.check()
        provenance = dict(card["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: not a policy bundle, or a damaged one ({error!r:.200})") from error
    static = Shortlist(tensors["static.points"], tensors["static.terms"])
    weights = {name: tensors[name] for name in TENSORS}
    mean, deviation = tensors["observation.mean"], tensors["observation.deviation"]
    policy = Policy(weights, mean, deviation, tensors["plan"], static, controls)
    return Bundle(policy, provenance, digest)


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    try:
        for name in ("bundle.json", "policy.safetensors"):
            size = (folder / name).stat().st_size
            if size > MAX_BYTES:
                raise UserError(f"{folder / name}: {size} bytes; allowed: at most {MAX_BYTES}")
        card = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        blob = (folder / "policy.safetensors").read_bytes()
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot read the policy ({error.strerror}); "
            "give the folder that holds bundle.json and policy.safetensors"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}/bundle.json: not JSON, or damaged ({error!s:.100})") from error
    if not isinstance(card, dict):
        raise UserError(f"{folder}/bundle.json: not a policy bundle; expected an object")
    return card, blob


def _check_schema(folder: Path, card: dict[str, Any]) -> None:
    expected = {
        "format": (card["format"], FORMAT),
        "observation.version": (card["observation"]["version"], VERSION),
        "observation.names": (card["observation"]["names"], list(OBSERVATIONS)),
        "observation.low": (card["observation"]["low"], LOW.tolist()),
        "observation.high": (card["observation"]["high"], HIGH.tolist()),
        "action.names": (card["action"]["names"], list(CONTROLS)),
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


def _check_shapes(folder: Path, tensors: dict[str, Tensor], hidden: int) -> None:
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    num_settings = len(tensors["static.terms"])
    wanted = {
        "hidden.0.weight": (hidden, num_seen),
        "hidden.0.bias": (hidden,),
        "hidden.1.weight": (hidden, hidden),
        "hidden.1.bias": (hidden,),
        "action.weight": (num_set, hidden),
        "action.bias": (num_set,),
        "observation.mean": (num_seen,),
        "observation.deviation": (num_seen,),
        "plan": (len(tensors["plan"]), num_set),
        "static.points": (num_settings, num_set),
        "static.terms": (num_settings, 3),
    }
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or num_settings < 1:
            given = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise UserError(f"{folder}/policy.safetensors: {name} is {given}; expected float32 {list(shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}/policy.safetensors: {name} holds a non-finite value")
    if not (tensors["observation.deviation"] > 0).all():
        raise UserError(f"{folder}/policy.safetensors: observation.deviation must be above 0")


def _card(digest: str, provenance: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = ["# rlkd policy", "", f"sha256 of the tensors: `{digest}`", ""]
    scores = provenance.get("scores", {})
    if scores:
        lines += ["Held-out tasks, test data:", "", "| comparison | difference in J | 95 % interval |", "|---|---|---|"]
        for name, row in scores.items():
            low, high = row["ci95"]
            lines.append(f"| {name} | {row['difference']:+.4f} | {low:+.4f} to {high:+.4f} |")
        lines.append("")
    lines += [f"- trained on: {json.dumps(provenance.get('task', {}))}", f"- seed: {provenance.get('seed')}"]
    lines += [
        f"- versions: {json.dumps(provenance.get('versions', {}))}",
        "",
        "Replay: `rlkd replay --policy FOLDER`",
        "",
    ]
    return "\n".join(lines)
