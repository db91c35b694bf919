"""Match the labels of a data set with a model's classes. This file holds the one rule, and the only copy of it.

The names of the classes come from `id2label` of the model's configuration. A label is matched, in this order,

1. by its exact name;
2. as a number that is the name of a class: 1, 1.0 and "1" are the class "1";
3. only where every class is called LABEL_<i>: as the number i ("1", 1.0 and 1 are LABEL_1);
4. by its name in other case, with spaces at its ends or with its accents in another encoding (NFC, NFD), as long as no
   two names and no two labels become one.

`--columns.classes [a,b,...]` tells the names of the numbers 0, 1, ... where the data or the model have numbers only;
then a number in the data stands for that name, and so does a class LABEL_<i>. Everything else is refused with the
number of its row: other names, fractions, lists (one-hot rows, several labels), missing labels. Names in
`--columns.classes` that no label needs are refused, too, because the user meant something by them.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkd.errors import UserError

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)
DEFAULT_NAME = re.compile(r"LABEL_(0|[1-9]\d*)", re.ASCII)
BY_NAME, BY_NUMBER = "name", "number that is a name"
BY_DEFAULT, BY_OPTION = "number in LABEL_<i>", "number, by --columns.classes"
FOLDED = "name, spelled otherwise"
MOST_NAMES = 12  # names that a message lists


@dataclass(frozen=True)
class NumberedName:
    """A cell with a name and a number: of a ClassLabel column, or a truth value (True is 1, False is 0)."""

    name: str
    number: int

    def __str__(self) -> str:
        return self.name


Label = str | int | float | Decimal | NumberedName
Place = tuple[str, int]  # a file and the number of a row in it, from 1; 0 for a file that is one sample


@dataclass(frozen=True)
class Match:
    """One label of the data and the class that it means."""

    label: str
    num_rows: int
    number: int  # of the class
    name: str  # of the class
    how: str


def class_names(config: Any, model: str) -> tuple[str, ...]:
    """Names of the classes of a model with one label a sample, in the order of its outputs.

    Args:
        config: the model's configuration.
        model: begins the messages.

    Raises:
        UserError: several labels a sample, a regression, numbers that are not 0 to C - 1, names that are not unique, or
            `id2label` and `label2id` that contradict each other.
    """
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise UserError(
            f"{model}: got a model for {str(problem).replace('_', ' ')}; allowed: one label a sample, by softmax "
            "(problem_type single_label_classification or none)"
        )
    names = _numbered(config.id2label, model)
    if len(names) < 2:
        raise UserError(
            f"{model}: got a model with {len(names)} output, as a regression has; allowed: at least two classes"
        )
    given: Mapping[Any, Any] = config.label2id or {}
    is_default = all(name == f"LABEL_{number}" for name, number in given.items())
    if not is_default and all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        names = _numbered({number: name for name, number in given.items()}, model, len(names))
    elif not is_default and {str(name): number for name, number in given.items()} != {
        name: i for i, name in enumerate(names)
    }:
        raise UserError(
            f"{model}: id2label {_list(names)} and label2id {dict(given)!s:.200} contradict each other; correct its "
            "config.json"
        )
    return names


def _numbered(id2label: Mapping[Any, Any] | None, model: str, wanted: int | None = None) -> tuple[str, ...]:
    """Names by number; UserError unless the numbers are 0 to C - 1 and the names are unique texts or whole numbers."""
    table = {str(number): name for number, name in (id2label or {}).items()}
    size = len(id2label or {}) if wanted is None else wanted
    if sorted(table) != sorted(str(i) for i in range(size)):
        raise UserError(
            f"{model}: got class numbers {_list(sorted(table))} in id2label; allowed: 0 to {size - 1}, each once; "
            "correct its config.json"
        )
    names = [table[str(i)] for i in range(size)]
    for name in names:
        if not isinstance(name, str) and (isinstance(name, bool) or not isinstance(name, int)):
            raise UserError(
                f"{model}: got class name {name!r:.60} in id2label; allowed: a text; correct its config.json"
            )
    texts = tuple(str(name) for name in names)
    double = [name for name, count in Counter(texts).items() if count > 1]
    if double:
        raise UserError(f"{model}: two classes are called {double[0]!r:.60} in id2label; correct its config.json")
    return texts


def match_labels(
    labels: Sequence[Any], names: Sequence[str], places: Sequence[Place], *, classes: Sequence[str] | None = None
) -> tuple[Tensor, list[Match]]:
    """Class numbers [S] int64 of the labels, and how every distinct label was matched.

    Args:
        labels: S cells of the data.
        names: C names of the model's classes, of `class_names`.
        places: where each label stands, for messages.
        classes: names of the numbers 0, 1, ..., of `--columns.classes`.

    Raises:
        UserError: a label that no class or more than one has, with its row; or `classes` that no label needs.
    """
    rule = _Rule(names, classes)
    found: dict[Hashable, tuple[int, str]] = {}
    count: Counter[Hashable] = Counter()
    numbers = torch.empty(len(labels), dtype=torch.int64)
    for row, cell in enumerate(labels):
        label = clean_label(cell, places[row])
        key = (type(label), label)
        count[key] += 1
        if key not in found:
            found[key] = rule.match(label, places[row])
        numbers[row] = found[key][0]
    matches = [Match(str(key[1]), count[key], number, names[number], how) for key, (number, how) in found.items()]  # type: ignore[index]
    _check_merges(matches, places)
    rule.check_used(matches)
    return numbers, sorted(matches, key=lambda match: (match.number, match.label))


def _check_merges(matches: Sequence[Match], places: Sequence[Place]) -> None:
    """Refuse two labels of one class of which one was matched by folding its case: they may be two classes."""
    for match in matches:
        others = [m.label for m in matches if m.number == match.number and m.label != match.label]
        if match.how == FOLDED and others:
            raise UserError(
                f"{places[0][0]}: labels {match.label!r} and {others[0]!r} would both be the class {match.name!r}; "
                "write the labels as the model's classes are written"
            )


class _Rule:
    """The rule of this file for one model."""

    def __init__(self, names: Sequence[str], classes: Sequence[str] | None) -> None:
        self.names, self.classes = list(names), classes
        defaults = [DEFAULT_NAME.fullmatch(name) for name in names]
        self.by_default = {int(m[1]): i for i, m in enumerate(defaults) if m} if all(defaults) else {}
        called = self.names if classes is None else self._called(classes)
        self.exact = {name: i for i, name in [*enumerate(self.names), *enumerate(called)]}
        self.numeric = _unique((_number(name), i) for i, name in enumerate(called))
        self.folded = _unique((_fold(name), i) for i, name in enumerate(called))

    def _called(self, classes: Sequence[str]) -> list[str]:
        """Return the data's names of the model's classes, where `classes` names the numbers."""
        if len(set(classes)) != len(classes):
            raise UserError(f"columns.classes: got {_list(classes)}; allowed: every name once")
        if not self.by_default:
            return self.names
        if len(classes) != len(self.names) or sorted(self.by_default) != list(range(len(self.names))):
            raise UserError(
                f"columns.classes: got {len(classes)} names; allowed: {len(self.names)}, one for each of the model's "
                f"classes {_list(self.names)}"
            )
        return [classes[number] for number in sorted(self.by_default, key=lambda number: self.by_default[number])]

    def check_used(self, matches: Sequence[Match]) -> None:
        """Raise UserError where `classes` were given and each label is a name of the model's own classes."""
        needed = [m for m in matches if m.how == BY_OPTION or (self.by_default and m.label not in self.names)]
        if self.classes is not None and matches and not needed:
            raise UserError(
                f"columns.classes: got {_list(self.classes)}, which no label needs: all are names of the model's "
                f"classes {_list(self.names)}; leave it out"
            )

    def match(self, label: Label, place: Place) -> tuple[int, str]:
        """Return the class of a label and the step of the rule that found it."""
        found = self._find_numbered(label, place) if isinstance(label, NumberedName) else self._find(label)
        if found is None:
            raise UserError(f"{say_place(place)}: got label {str(label)!r:.60}; {self._allowed(label)}")
        return found

    def _find(self, label: str | int | float | Decimal) -> tuple[int, str] | None:
        if isinstance(label, str) and label in self.exact:
            return self.exact[label], BY_NAME
        number = _number(label)
        if number is not None and self.classes is not None:
            is_place = number == int(number) and 0 <= number < len(self.classes)
            index = self._find_name(self.classes[int(number)]) if is_place else None
            return None if index is None else (index, BY_OPTION)
        steps = [(self.numeric.get(number), BY_NUMBER), (self.by_default.get(number), BY_DEFAULT)]  # type: ignore[call-overload]
        if number is None:
            steps = [(self.folded.get(_fold(str(label))), FOLDED)]
        return next(((index, how) for index, how in steps if index is not None), None)

    def _find_name(self, name: str) -> int | None:
        return self.exact[name] if name in self.exact else self.folded.get(_fold(name))

    def _find_numbered(self, label: NumberedName, place: Place) -> tuple[int, str] | None:
        """Find the class of a cell with name and number: by its name, or by the number where no class has that name."""
        by_name = self._find(label.name)
        if by_name is not None and by_name[1] in (BY_NAME, BY_NUMBER, FOLDED):
            return by_name
        by_number = self._find(label.number)
        if by_name is not None and by_number is not None and by_name[0] != by_number[0]:
            raise UserError(
                f"{say_place(place)}: the column calls the number {label.number} {label.name!r}, and the model's "
                f"classes are {_list(self.names)}: name and number mean two classes; tell the names of the model's "
                "classes with --columns.classes"
            )
        return by_name or by_number

    def _allowed(self, label: Label) -> str:
        text = f"allowed: the model's classes {_list(self.names)}"
        if self.classes is not None:
            return f"{text}, or their names and numbers in --columns.classes {_list(self.classes)}"
        is_number = isinstance(label, NumberedName) or _number(label) is not None
        if bool(self.by_default) == is_number:
            return text
        return f"{text}; --columns.classes [a,b,...] tells the names of the numbers 0, 1, ..."


def _number(label: str | int | float | Decimal) -> Decimal | None:
    """Return the exact value of a number or of a text that is one; None for other texts."""
    if isinstance(label, str):
        return Decimal(label.strip()) if NUMBER.fullmatch(label.strip()) else None
    return Decimal(repr(label)) if isinstance(label, float) else Decimal(label)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip().casefold())


def _unique(pairs: Iterable[tuple[Hashable, int]]) -> dict[Hashable, int]:
    """Return a table without keys that are None or stand for two values."""
    listed = list(pairs)
    count = Counter(key for key, _ in listed)
    return {key: value for key, value in listed if count[key] == 1 and key is not None}


def _list(names: Iterable[str]) -> str:
    given = list(names)
    more = f", ... ({len(given)} in all)" if len(given) > MOST_NAMES else ""
    return f"[{', '.join(' '.join(str(name).split())[:40] for name in given[:MOST_NAMES])}{more}]"


def clean_label(value: Any, place: Place) -> Label:
    """One cell as a text, a number or a numbered name.

    Raises:
        UserError: it is missing, a list, bytes, a date, or a number that is not finite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return NumberedName(str(value), int(value))
    if isinstance(value, str | int | NumberedName):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return value
    kind = "no label" if is_missing(value) else f"a label of type {type(value).__name__} ({value!s:.40})"
    raise UserError(
        f"{say_place(place)}: got {kind}; allowed: one text or one number; give every row one label, or leave rows out "
        "with --columns.broken skip where labels are missing"
    )


def is_missing(value: Any) -> bool:
    """Whether a cell of a table is empty: null, NaN or a text without a character."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float | Decimal) and value != value)


def say_place(place: Place) -> str:
    """Return file and row as a text for messages."""
    return f"{place[0]}: row {place[1]}" if place[1] else place[0]


def describe_matches(matches: Sequence[Match]) -> str:
    """Return the table of `mapping.txt`: every label of the data, its rows, its class and how it was matched."""
    if not matches:
        return ""
    header = ("label in the data", "rows", "class", "name of the class", "matched by")
    rows = [header, *((m.label, str(m.num_rows), str(m.number), m.name, m.how) for m in matches)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
