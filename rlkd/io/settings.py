"""Change values of nested, frozen config dataclasses by dotted names."""

import dataclasses
import math
import numbers
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlkd.errors import UserError, closest

_KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}
_MISFIT = object()  # what `_fitted` returns for a value of another type


def with_settings(config: Any, settings: Mapping[str, Any], what: str = "options") -> Any:
    """Return `config` with some values changed.

    Args:
        config: a dataclass, whose fields may be dataclasses.
        settings: values by dotted name (`"train.batch_size": 16`) or nested (`"train": {"batch_size": 16}`); lists
            become tuples, whole numbers become floats and paths texts where the field is one.
        what: begins the messages.

    Raises:
        UserError: an unknown name, with the closest one, or a value of another type, NaN and infinity among them.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{what}: got {settings!r:.60}; allowed: a mapping from names to values, such as {{'seed': 1}}")
    for name, value in settings.items():
        config = _with_setting(config, str(name).split("."), value, f"{what}: {name}")
    return config


def with_types(config: Any, what: str) -> Any:
    """Return `config` with values of the types that its fields have: lists as tuples, whole numbers as floats.

    Args:
        config: a dataclass, whose fields may be dataclasses.
        what: begins the messages.

    Raises:
        UserError: a value of another type, NaN and infinity among them.
    """
    return with_settings(config, {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, what)


def _with_setting(config: Any, path: list[str], value: Any, name: str) -> Any:
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        raise UserError(
            f"{name}: {type(config).__name__} has no {path[0]!r}; allowed: {', '.join(names)}{closest(path[0], names)}"
        )
    now, hint = getattr(config, path[0]), get_type_hints(type(config))[path[0]]
    if len(path) > 1:
        if not dataclasses.is_dataclass(now):
            raise UserError(f"{name}: {path[0]} has no parts")
        value = _with_setting(now, path[1:], value, name)
    elif dataclasses.is_dataclass(now) and isinstance(value, Mapping):
        value = with_settings(now, value, name)
    else:
        given, value = value, _fitted(value, hint, name)
        if value is _MISFIT:
            raise UserError(f"{name}: got {given!r:.60}; allowed: {_allowed(hint)}")
    return dataclasses.replace(config, **{path[0]: value})


def _fitted(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as a field with the type `hint` takes it, or _MISFIT."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next((v for v in (_fitted(value, part, name) for part in inner) if v is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if value in inner else _MISFIT
    if origin in (tuple, list):
        return _fitted_list(value, origin, inner, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return with_settings(hint(), value, name)
        if not isinstance(value, hint):
            return _MISFIT
        return with_types(value, name)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _MISFIT
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is str and isinstance(value, str | Path):
        return str(value)
    return value if hint in (bool, type(None), Path) and isinstance(value, hint) else _MISFIT


def _fitted_list(value: Any, kind: type[Any], inner: tuple[Any, ...], name: str) -> Any:
    """Return a tuple or list whose entries fit: any number of one type, or one entry for each type."""
    if not isinstance(value, list | tuple):
        return _MISFIT
    is_open = kind is list or inner[-1] is Ellipsis
    hints = [inner[0]] * len(value) if is_open else list(inner)
    if len(hints) != len(value):
        return _MISFIT
    entries = [_fitted(entry, hint, name) for entry, hint in zip(value, hints, strict=True)]
    return _MISFIT if any(entry is _MISFIT for entry in entries) else kind(entries)


def _allowed(hint: Any) -> str:
    """Say in words what a field with the type `hint` takes."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_allowed(part) for part in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (tuple, list):
        is_open = origin is list or inner[-1] is Ellipsis
        return f"a list, each entry {_allowed(inner[0])}" if is_open else f"a list of {len(inner)} entries"
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a {getattr(hint, '__name__', 'section')}, or a mapping with keys {keys}"
    return _KINDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
