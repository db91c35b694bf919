"""Look at a config before the parser does: text, size, depth, tags and sections, each refused in one clear line."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from rlkd.errors import UserError
from rlkd.io.files import MAX_DEPTH, read_bytes

MAX_CONFIG_BYTES = 16 * 2**10  # ours have less than 1 KiB; the parser takes a second for 64
LARGEST = 2**31 - 1


def check_config_file(path: Path, config_class: type[Any]) -> None:
    """Raises UserError for a file that is no config: too large, not text, not YAML, or with a value for a section."""
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
    """Raises UserError for a value given to a whole section, as in `--task 3`; jsonargparse would take a file there."""
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


def plain_yaml(text: str, complaint: str) -> Any:
    """YAML with every scalar as a text; without tags, aliases or deep nesting, which rlkd's configs do not need.

    Raises:
        UserError: anything else; `complaint` begins the message.
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
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{complaint}: not YAML ({error.problem}{line})") from error
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise UserError(f"{complaint}: not YAML ({' '.join(str(error).split())!s:.80})") from error


def check_sections(tree: Mapping[str, Any], config_class: type[Any], prefix: str = "") -> None:
    """Raises UserError where a value stands in the place of a section, or nothing in the place of a value.

    Unknown keys are left to the parser.
    """
    sections = _sections(config_class)
    for name, hint in get_type_hints(config_class).items():
        if name in tree and name in sections:
            check_section(prefix + name, tree[name], sections[name])
        elif name in tree and tree[name] == "" and hint is not str:  # the parser tells '' from nothing
            _refuse_nothing(prefix + name, hint)


def check_section(name: str, given: Any, section: type[Any]) -> None:
    """Raises UserError unless `given` is a mapping, down to its own sections."""
    keys = [field.name for field in fields(section)]
    if not isinstance(given, Mapping):
        shown = "nothing" if given in (None, "") else f"{given!r:.40}"
        raise UserError(f"{name}: got {shown}; allowed: a section with keys {', '.join(keys)}")
    check_sections(given, section, f"{name}.")


def check_values(config: Any, prefix: str = "") -> None:
    """Raises UserError for what the parser lets through: nothing at all, infinity, NaN, integers of many digits."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if is_dataclass(value):
            check_values(value, f"{name}.")
        if value is None:
            _refuse_nothing(name, hints[field.name])
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and not -LARGEST <= part <= LARGEST:
                shown = f"{part:g}" if isinstance(part, float) else f"an integer of {len(str(part))} digits"
                raise UserError(f"{name}: got {shown}; allowed: numbers from -{LARGEST} to {LARGEST}")


def _refuse_nothing(name: str, hint: Any) -> None:
    if type(None) not in get_args(hint):
        raise UserError(f"{name}: got nothing; allowed: {getattr(hint, '__name__', 'a value')}, or leave the key out")


def _sections(config_class: type[Any]) -> dict[str, type[Any]]:
    hints: dict[str, Any] = get_type_hints(config_class)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def _line(event: yaml.Event) -> int:
    return 1 + (event.start_mark.line if event.start_mark else 0)
