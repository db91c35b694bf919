"""Find NaN and infinity in a configuration."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from rlkd.errors import UserError


def numbers_in(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield every number in dataclasses, tuples, lists and dicts with its dotted name, which a list's parts share."""
    if is_dataclass(value):
        for field in fields(value):
            yield from numbers_in(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers_in(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from numbers_in(inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def check_finite(config: Any) -> None:
    """Raise UserError for the first number in a configuration that is NaN or infinite."""
    for name, number in numbers_in(config):
        if not math.isfinite(number):
            raise UserError(f"{name}: got {number}; allowed: finite numbers")
