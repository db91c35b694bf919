"""Damage bytes, JSON trees and safetensors, as a defective disk, a careless hand or a hostile one would."""

import copy
import json
import random
import sys
from typing import Any

import torch
from safetensors.torch import load, save

HUGE: list[Any] = [
    10**30,
    -(10**30),
    2**63,
    2**31,
    10**400,
    1e308,
    -1e308,
    5e-324,
    1e-30,
    -1,
    0,
    float("inf"),
    float("nan"),
]
ODD: list[Any] = [
    None,
    True,
    "x",
    "",
    "1",
    [],
    {},
    [1],
    {"a": 1},
    [[[]]],
    "a\0b\x1b[2J\n",
    "../../etc/passwd",
    "\ud800",
    1.5,
]


def damaged_bytes(r: random.Random, blob: bytes) -> bytes:
    """`blob` with bits flipped, cut, filled, repeated or replaced."""
    data = bytearray(blob)
    place = r.randrange(len(data) + 1)
    size = r.choice([1, 4, 8, 64, 1000])
    kind = r.choice(["flip", "flip", "flip", "head", "cut", "hole", "put", "repeat", "zero", "random", "empty"])
    if kind in ("flip", "head") and data:
        reach = len(data) if kind == "flip" else min(len(data), 64)
        for _ in range(r.randint(1, 16)):
            data[r.randrange(reach)] ^= 1 << r.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "hole":
        del data[place : place + size]
    elif kind == "put":
        data[place:place] = r.randbytes(size)
    elif kind == "repeat":
        data[place:place] = data[place : place + size] * r.randint(1, 20)
    elif kind == "zero":
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif kind == "random":
        data = bytearray(r.randbytes(r.randrange(5000)))
    elif kind == "empty":
        data = bytearray()
    return bytes(data)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        pairs = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        found += [(node, key) for key, _ in pairs]
        waiting += [value for _, value in pairs]
    return found


def damaged_tree(r: random.Random, tree: Any) -> Any:
    """A copy of `tree` with one value swapped, gone, renamed, nested, or of another kind or size."""
    tree = copy.deepcopy(tree)
    found = places(tree)
    if not found:
        return r.choice(ODD)
    node, key = r.choice(found)
    kind = r.choice(["swap", "huge", "huge", "odd", "odd", "gone", "new", "deep", "long", "nudge"])
    if kind == "swap":
        other, place = r.choice(found)
        node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
    elif kind == "huge":
        node[key] = r.choice(HUGE)
    elif kind == "odd":
        node[key] = copy.deepcopy(r.choice(ODD))
    elif kind == "gone":
        del node[key]
    elif kind == "new" and isinstance(node, dict):
        node[r.choice(["more", "", "x" * 300, "__class__", "format"])] = r.choice(ODD)
    elif kind == "deep":
        for _ in range(r.choice([10, 40, 90])):
            node[key] = [node[key]] if r.random() < 0.5 else {"a": node[key]}
    elif kind == "long":
        node[key] = r.choice(["x" * 100_000, [0] * 50_000, 10**4000])
    elif isinstance(node[key], int | float) and not isinstance(node[key], bool) and abs(node[key]) < 2**53:
        node[key] = node[key] * r.choice([-1, 2, 0.5, 1000]) + r.choice([0, 1, -1])
    return tree


def damaged_text(r: random.Random, tree: Any) -> bytes:
    """JSON of a damaged tree, or a text that no tree makes."""
    for _ in range(r.randint(1, 3)):
        tree = damaged_tree(r, tree)
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    if limit:
        sys.set_int_max_str_digits(0)  # only for writing: what reads it keeps its limit
    try:
        blob = json.dumps(tree, indent=r.choice([None, 1])).encode()
    finally:
        if limit:
            sys.set_int_max_str_digits(limit)
    if r.random() < 0.1:
        blob = r.choice(
            [b"[" * 100_000, b'{"a":' * 50_000, blob + blob, b"\xef\xbb\xbf" + blob, b" " * 2**21, blob[1:]]
        )
    return blob


def damaged_tensors(r: random.Random, blob: bytes) -> bytes:
    """safetensors with damaged bytes, another header, or other tensors."""
    kind = r.choice(["bytes", "header", "values", "tensors"])
    if kind == "bytes":
        return damaged_bytes(r, blob)
    length = int.from_bytes(blob[:8], "little")
    if kind == "header":
        header = damaged_text(r, json.loads(blob[8 : 8 + length]))
        size = r.choice([len(header)] * 4 + [0, 2**63, 2**31, len(header) + 1])
        return size.to_bytes(8, "little") + header + blob[8 + length :]
    tensors = {name: tensor.clone() for name, tensor in load(blob).items()}
    name = r.choice(sorted(tensors))
    if kind == "values":
        flat = tensors[name].flatten()
        value = r.choice([float("nan"), float("inf"), 3e38, -3e38, 1e-45, -1.0, 0.0, 2.0, 1e5])
        if not flat.is_floating_point():
            value = r.choice([-1, 2**62, 0, 64, 10**6])
        flat[: r.choice([1, len(flat)])] = value
        if flat.is_floating_point() and r.random() < 0.5:
            flat[:: r.randint(2, 3)] *= -1  # sums of both signs: infinity less infinity is no number
        tensors[name] = flat.reshape(tensors[name].shape)
    else:
        change = r.choice(["gone", "type", "more", "shape", "swap"])
        other = r.choice(sorted(tensors))
        if change == "gone":
            del tensors[name]
        elif change == "type":
            tensors[name] = tensors[name].to(r.choice([torch.float64, torch.float16, torch.int64, torch.bool]))
        elif change == "more":
            tensors["more"] = torch.zeros(3)
        elif change == "shape":
            tensors[name] = tensors[name].flatten()[: r.randint(0, 3)].contiguous()
        else:
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    return save(tensors)
