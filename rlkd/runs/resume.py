"""What a run does at its beginning, whether it is new or goes on after it was stopped (`--resume`)."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlkd.io.files import inside, read_json
from rlkd.io.journal import Journal, digest
from rlkd.runs.folder import describe_run

logger = logging.getLogger(__name__)

PROFILE = "cost_profile"
Config = TypeVar("Config")


def describe(
    journal: Journal,
    folder: Path,
    config: Any,
    seed: int,
    extra: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Describe a new run; for a resumed one, return the recorded versions and warn if they have changed."""
    path = folder / "versions.json"
    if not (journal.resumes and path.exists()):
        return describe_run(folder, config, seed, extra, options, command=command)
    began = read_json(inside(folder, path.name), "a run's versions")
    now = describe_run(folder, config, seed, extra, options, write=False)
    changed = [f"{name} {began.get(name)!s:.40} -> {now[name]!s:.40}" for name in now if began.get(name) != now[name]]
    if changed:
        logger.warning(f"note: not what the run began with, so that its end may differ: {', '.join(changed)}")
    return began


def with_own_profile(config: Config, folder: Path, name: str = PROFILE) -> Config:
    """Return the config, a dataclass with a section `cost`, with the cost profile that the run wrote, if any."""
    path = folder / f"{name}.json"
    if not path.exists():
        return config
    known: Any = config
    cost = dataclasses.replace(known.cost, profile=str(inside(folder, path.name)))
    changed: Config = dataclasses.replace(known, cost=cost)
    return changed


def remember(journal: Journal, verb: str, tensors: Mapping[str, Tensor], **features: Any) -> None:
    """Write the journal's first entry: the verb, and digests of its data, teachers and policy.

    Raises:
        UserError: the run that is resumed had begun with others.
    """
    inputs = {**features, **{name: digest(tensor) for name, tensor in tensors.items()}}
    journal.arrays(f"rlkd {verb}, its data and models", inputs, {}, dict)
