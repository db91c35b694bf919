"""Change values of nested, frozen config dataclasses by dotted names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlkd.errors import UserError, closest


def with_settings(config: Any, settings: Mapping[str, Any], what: str = "options") -> Any:
    """Return `config` with some values changed.

    Args:
        config: a dataclass, whose fields may be dataclasses.
        settings: values by dotted name (`"train.batch_size": 16`) or nested (`"train": {"batch_size": 16}`); lists
            become tuples, whole numbers become floats where the field is one.
        what: begins the messages.

    Raises:
        UserError: an unknown name, with the closest one, or a value of another type.
    """
    for name, value in settings.items():
        config = _with_setting(config, str(name).split("."), value, f"{what}: {name}")
    return config


def _with_setting(config: Any, path: list[str], value: Any, name: str) -> Any:
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        raise UserError(
            f"{name}: {type(config).__name__} has no {path[0]!r}; allowed: {', '.join(names)}{closest(path[0], names)}"
        )
    now = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(now):
            raise UserError(f"{name}: {path[0]} has no parts")
        value = _with_setting(now, path[1:], value, name)
    elif isinstance(value, Mapping) and dataclasses.is_dataclass(now):
        value = with_settings(now, value, name)
    else:
        value = _converted(now, value, name)
    return dataclasses.replace(config, **{path[0]: value})


def _converted(now: Any, value: Any, name: str) -> Any:
    """Convert a value to what a field that holds `now` takes; None, or a goal's reference, takes several types."""
    if isinstance(now, tuple) and isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(now, float) and type(value) is int:
        return float(value)
    if now is None or name.endswith(".reference") or type(value) is type(now):
        return value
    raise UserError(f"{name}: got {value!r:.60}; allowed: a value like {now!r:.60}")
