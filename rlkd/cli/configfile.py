"""Look at a config before the parser does: text, size, depth, tags and sections, each refused in one clear line."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from rlkd.errors import UserError
from rlkd.io.files import MAX_DEPTH, read_bytes
from rlkd.io.numbers import numbers_in

MAX_CONFIG_BYTES = 16 * 2**10  # those of rlkd have less than 1 KiB; the parser takes a second for 64
LARGEST = 2**31 - 1

# Scalars without quotes that YAML 1.1 reads as octal or sexagesimal numbers, truth values or dates; 1.2 does not.
_AMBIGUOUS = re.compile(
    r"[-+]?(0[0-9_]+|0[oObB][0-9_]+|[0-9][0-9_.]*_[0-9_.eE+-]*|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
    r"|yes|no|on|off|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*|<<|=",
    re.IGNORECASE,
)


def check_config_file(path: Path, config_class: type[Any]) -> None:
    """Raise UserError for a file that is no config: too large, not text, not YAML, or with a value for a section."""
    try:
        blob = read_bytes(path, MAX_CONFIG_BYTES)
    except UserError as error:
        raise UserError(f"--config: {error}; give a YAML file") from error
    try:
        text = blob.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--config: {path}: not UTF-8 text (byte {error.start}); give a YAML file") from error
    tree = plain_yaml(text, f"--config: {path}")
    if tree is None or tree == "":
        raise UserError(f"--config: {path}: holds nothing; allowed: sections and keys, or no --config at all")
    if not isinstance(tree, Mapping):
        raise UserError(f"--config: {path}: holds {tree!r:.40}; allowed: sections and keys, such as 'num_windows: 12'")
    check_sections(tree, config_class)


def check_options(argv: list[str], config_class: type[Any]) -> None:
    """Raise UserError for a value given to a whole section, as in `--task 3`; jsonargparse would take a file there."""
    hints = _sections(config_class)
    for i, given in enumerate(argv):
        name, equals, value = given.partition("=")
        section: type[Any] | None = None
        for part in name.removeprefix("--").split("."):
            section = hints.get(part) if section is None else _sections(section).get(part)
            if section is None:
                break
        if name.startswith("--") and section is not None:
            shown = value if equals else "".join(argv[i + 1 : i + 2])
            check_section(name.removeprefix("--"), plain_yaml(shown, name), section)


def check_option_values(argv: list[str], parser: ArgumentParser) -> None:
    """Raise UserError for an option's value that YAML's versions read differently, or with a key twice.

    Options whose values are texts or paths are taken as they are.
    """
    for i, given in enumerate(argv):
        name, equals, value = given.partition("=")
        action = parser._option_string_actions.get(name.removesuffix("+"))
        hint = getattr(action, "_typehint", None)
        if hint in (None, str, Path) or hint == Path | None or hint == str | None:
            continue
        plain_yaml(value if equals else "".join(argv[i + 1 : i + 2]), name)


def plain_yaml(text: str, complaint: str) -> Any:
    """Return YAML with every scalar as a text.

    Raises:
        UserError: the text has tags, aliases, deep nesting, a key twice in one section, or a scalar that versions of
            YAML read differently, such as 010 or yes; `complaint` begins the message.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(f"{complaint}: has an alias or anchor (line {_line(event)}); write the value out")
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
                raise UserError(f"{complaint}: has a tag {event.tag:.60} (line {_line(event)}); allowed: plain values")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise UserError(f"{complaint}: nested deeper than {MAX_DEPTH} (line {_line(event)})")
            depth -= isinstance(event, yaml.CollectionEndEvent)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        if root is not None:
            _check_nodes(root, complaint)
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{complaint}: not YAML ({error.problem}{line})") from error
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise UserError(f"{complaint}: not YAML ({' '.join(str(error).split())!s:.80})") from error


def _check_nodes(node: yaml.Node, complaint: str) -> None:
    """Raise UserError for a key that appears twice in one section, or a scalar that can be read in two ways."""
    if isinstance(node, yaml.ScalarNode) and node.style is None and _AMBIGUOUS.fullmatch(node.value):
        raise UserError(
            f"{complaint}: has {node.value!r:.40} (line {node.start_mark.line + 1}), which versions of YAML read "
            "differently; allowed: decimal numbers without leading zeros, underscores or colons, true, false, and "
            "texts in quotes"
        )
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check_nodes(inner, complaint)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            _check_nodes(key, complaint)
            _check_nodes(value, complaint)
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise UserError(
                    f"{complaint}: has the key {name!r:.60} twice (lines {lines[name]} and {line}); keep one"
                )
            lines[name] = line


def check_sections(tree: Mapping[str, Any], config_class: type[Any], prefix: str = "") -> None:
    """Raise UserError where a value stands in the place of a section, or nothing in the place of a value.

    Unknown keys are left to the parser.
    """
    sections = _sections(config_class)
    for name, hint in get_type_hints(config_class).items():
        if name in tree and name in sections:
            check_section(prefix + name, tree[name], sections[name])
        elif name in tree and tree[name] == "" and hint is not str:  # the parser tells '' from nothing
            _refuse_nothing(prefix + name, hint)


def check_section(name: str, given: Any, section: type[Any]) -> None:
    """Raise UserError unless `given` is a mapping, down to its own sections."""
    keys = [field.name for field in fields(section)]
    if not isinstance(given, Mapping):
        shown = "nothing" if given in (None, "") else f"{given!r:.40}"
        raise UserError(f"{name}: got {shown}; allowed: a section with keys {', '.join(keys)}")
    check_sections(given, section, f"{name}.")


def check_values(config: Any, prefix: str = "") -> None:
    """Raise UserError for what the parser lets through: nothing at all, infinity, NaN, integers of many digits."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part):
                check_values(part, f"{name}.")
        if value is None:
            _refuse_nothing(name, hints[field.name])
    for name, number in numbers_in(config, prefix.rstrip(".")):
        if not -LARGEST <= number <= LARGEST:
            shown = f"{number:g}" if isinstance(number, float) else f"an integer of {len(str(number))} digits"
            raise UserError(f"{name}: got {shown}; allowed: numbers from -{LARGEST} to {LARGEST}")


def _refuse_nothing(name: str, hint: Any) -> None:
    if type(None) not in get_args(hint):
        raise UserError(f"{name}: got nothing; allowed: {getattr(hint, '__name__', 'a value')}, or leave the key out")


def _sections(config_class: type[Any]) -> dict[str, type[Any]]:
    hints: dict[str, Any] = get_type_hints(config_class)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def _line(event: yaml.Event) -> int:
    return 1 + (event.start_mark.line if event.start_mark else 0)
