"""Hardware profiles: what a target is measured with, which sizes it likes, and which operators it has.

A profile is a short YAML file. `cpu`, `gpu` and `edge` stand beside this module; a path names one of your own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rlkd.errors import UserError, closest
from rlkd.io.files import read_bytes, whole

FOLDER = Path(__file__).parent
MAX_PROFILE_BYTES = 2**16
DEVICES = ("cpu", "gpu")
PRECISIONS = ("float32", "float16", "int8")
ALL = "all"


@dataclass(frozen=True)
class Hardware:
    """One target."""

    name: str
    device: str  # "cpu" or "gpu"
    batch_sizes: tuple[int, ...]  # samples that one call answers, to be measured
    threads: int
    channel_multiple: int  # kept units are rounded up to multiples of this
    precisions: tuple[str, ...]
    operators: tuple[str, ...] | None  # of ONNX; None: all

    def missing_operators(self, used: Iterable[str]) -> list[str]:
        """Return those of the operators `used` that this target lacks, sorted."""
        return [] if self.operators is None else sorted(set(used) - set(self.operators))


def hardware_names() -> list[str]:
    """Return the names of the profiles that come with rlkd."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """Load a profile by its name, or from a YAML file.

    Raises:
        UserError: there is no such profile, or its content cannot be read for certain.
    """
    path = FOLDER / f"{name}.yaml" if name in hardware_names() else Path(name)
    if not path.is_file():
        names = hardware_names()
        raise UserError(f"hardware: got {name!r}; allowed: {', '.join(names)}, or a YAML file{closest(name, names)}")
    try:
        tree = yaml.safe_load(read_bytes(path, MAX_PROFILE_BYTES).decode())
        return _hardware(path.stem, tree)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a hardware profile ({line:.160}); compare it with {FOLDER / 'cpu.yaml'}"
        ) from error


def _hardware(name: str, tree: Any) -> Hardware:
    """Build the profile of a YAML tree; raise ValueError for anything else."""
    wanted = {field.name for field in fields(Hardware)} - {"name"}
    if not isinstance(tree, dict) or set(tree) != wanted:
        got = sorted(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"has {got}; allowed: the keys {sorted(wanted)}")
    if tree["device"] not in DEVICES:
        raise ValueError(f"device is {tree['device']!r:.40}; allowed: {', '.join(DEVICES)}")
    operators = None if tree["operators"] == ALL else tuple(_texts(tree["operators"], "operators"))
    precisions = tuple(_texts(tree["precisions"], "precisions"))
    if not set(precisions) <= set(PRECISIONS):
        raise ValueError(f"precisions is {list(precisions)!r:.80}; allowed: {', '.join(PRECISIONS)}")
    sizes = tree["batch_sizes"]
    if not isinstance(sizes, list) or not sizes:
        raise ValueError(f"batch_sizes is {sizes!r:.40}; allowed: a list of sizes")
    return Hardware(
        name=name,
        device=tree["device"],
        batch_sizes=tuple(whole(size, "batch_sizes", 1, 65_536) for size in sizes),
        threads=whole(tree["threads"], "threads", 1, 1024),
        channel_multiple=whole(tree["channel_multiple"], "channel_multiple", 1, 1024),
        precisions=precisions,
        operators=operators,
    )


def _texts(given: Any, name: str) -> list[str]:
    if not isinstance(given, list) or not given or not all(isinstance(entry, str) for entry in given):
        raise ValueError(
            f"{name} is {given!r:.40}; allowed: a list of names{f', or {ALL}' if name == 'operators' else ''}"
        )
    return given
