"""Parsing shared by the verbs: dataclass configs from YAML and options, with one-line errors."""

import re
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

import rlkd.configs
from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.bundled import find_policy
from rlkd.cli.configfile import check_config_file, check_option_values, check_options, check_values
from rlkd.errors import UserError, closest
from rlkd.workers import WorkersConfig

Config = TypeVar("Config")
CONFIG_FOLDER = Path(rlkd.configs.__file__).parent


def config_names() -> list[str]:
    """Names of the configs that come with rlkd."""
    return sorted(str(path.relative_to(CONFIG_FOLDER).with_suffix("")) for path in CONFIG_FOLDER.rglob("*.yaml"))


def new_parser(verb: str, what: str, examples: Sequence[str]) -> ArgumentParser:
    """Return a parser that raises instead of exiting, with examples in its help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(
        prog=f"rlkd {verb}",
        description=what,
        epilog="Examples: " + " ;; ".join(f"rlkd {verb} {example}" for example in examples),
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        formatter_class=DefaultHelpFormatter,
    )


def parse(
    parser: ArgumentParser,
    argv: Sequence[str],
    config_class: type[Config] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Config | None, Namespace]:
    """Return the config that `argv` describes, and the other options.

    Args:
        parser: has the verb's own options.
        argv: options; `--config` takes a file or the name of a config that comes with rlkd.
        config_class: its fields become options.
        defaults: values that take the place of the class's own.

    Raises:
        UserError: one line that names the key, what was given, what is allowed, and the closest match.
    """
    if config_class is not None:
        parser.add_argument("--config", action="config", help="a YAML file, or a name from `rlkd list`")
        parser.add_class_arguments(config_class, None, as_group=False)
        for action in parser._actions:
            if action.help == "Path to a configuration file.":  # of a whole section, which `check_options` refuses
                action.help = SUPPRESS
        if defaults:
            parser.set_defaults(defaults)
    keys = [key for key in _keys(parser) if key not in ("help",)]
    resolved, files = _resolve_configs(argv)
    if config_class is not None:
        for file in files:
            check_config_file(file, config_class)
        check_options(resolved, config_class)
    check_option_values(resolved, parser)
    try:
        namespace = parser.parse_args(resolved)
        ready = parser.instantiate(namespace)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), keys)) from error
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        # jsonargparse lets these through for values of a kind that it does not expect
        raise UserError(f"options or config cannot be understood ({_one_line(str(error), keys)!s:.150})") from error
    if config_class is None:
        return None, ready
    fields = list(config_class.__dataclass_fields__)  # type: ignore[attr-defined]
    config = config_class(**{name: ready[name] for name in fields})
    check_values(config)
    return config, ready


def _keys(parser: ArgumentParser) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    return [option.removeprefix("--") for option in options if option.startswith("--")]


def _resolve_configs(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Replace names of configs that come with rlkd by their paths; return the options and the paths of all configs."""
    resolved, files = [], []
    for previous, given in zip(["", *argv], argv, strict=False):
        prefix, name = ("--config=", given[9:]) if given.startswith("--config=") else ("", given)
        is_config = bool(prefix) or previous == "--config"
        if is_config and not Path(name).exists():
            inside = CONFIG_FOLDER / f"{name}.yaml"
            if not inside.exists():
                raise UserError(
                    f"--config: no file {name!r}, and no config of that name; allowed: a YAML file, or one of "
                    f"{', '.join(config_names())}{closest(name, config_names())}"
                )
            name = str(inside)
        if is_config:
            files.append(Path(name))
        resolved.append(prefix + name if is_config else given)
    return resolved, files


def _one_line(message: str, keys: Sequence[str]) -> str:
    """jsonargparse's message on one line, in plain words, with the closest match for a key that does not exist."""
    line = " ".join(message.split())
    line = re.sub(r"<class '(\w+)'>", r"\1", line).replace("typing.", "")
    unknown = re.match(r"unrecognized arguments: (\S+)", line)
    if unknown:
        given = unknown.group(1).split("=")[0]
        if not given.startswith("-"):
            return f"got {given!r}, which no option takes; options look like --section.key value (--help lists them)"
        return f"no option {given}{_meant(given, [f'--{key}' for key in keys])} (--help lists all)"
    missing = re.match(r"argument (\S+): expected (?:one|at least one) argument", line)
    if missing:
        name = missing.group(1).split("/")[0]
        return f"{name}: got no value; give one; a value that begins with - is given as {name}=-VALUE"
    option = re.search(
        r"(?:[Gg]roup '([\w.]+)'|[Kk]ey '([\w.]+)'|^)\s*does not accept (?:option|nested key) '(\S+)'", line
    )
    needed = re.match(r"the following arguments are required: (.+)", line)
    if needed:
        names = [f"--{name}" if name in keys else name.upper() for name in needed.group(1).split(", ")]
        return f"{' and '.join(names)}: got nothing; allowed: a value (--help has examples)"
    top = re.match(r"Option '(\S+)' is not accepted", line)
    if top:
        return f"no key {top.group(1)!r} in the config{closest(top.group(1), [key.split('.')[0] for key in keys])}"
    if option:
        section = option.group(1) or option.group(2) or ""
        given = f"{section}.{option.group(3)}".lstrip(".")
        return f"no key {given!r} in the config{closest(given, keys)}"
    wrong = re.match(r'Parser key "([^"]+)": Expected an? (.*?)\. Got value: (.*)', line)
    nested = re.match(r"NestedArg\(key='([^']+)'", wrong.group(3)) if wrong else None
    if wrong and nested:
        section = wrong.group(1)
        return f"no option --{section}.{nested.group(1)}; --{section} takes one value here (--help lists all)"
    if wrong:
        kind = re.sub(r"Literal\[(.*)\]", r"\1", wrong.group(2))
        kind = {"tuple": "a list, such as [1,2]", "list": "a list, such as [a,b]"}.get(kind, kind)
        kind = re.sub(r"^tuple with", "a list of", kind)
        return f"{wrong.group(1)}: got {wrong.group(3)!r:.80}; allowed: {kind}"
    union = re.match(r'Parser key "([^"]+)": Does not validate .*? Subtypes: \[(.*?)\].* Given value: (.*)', line)
    if union:
        kinds = union.group(2).replace("NoneType", "null").replace(", ", " or ")
        return f"{union.group(1)}: got {union.group(3)!r:.80}; allowed: {kinds}"
    return line


def _meant(given: str, options: Sequence[str]) -> str:
    """Return a hint at the options that end like the one that was given, or at the closest one."""
    name = given.lstrip("-")
    same = [option for option in options if option.rpartition(".")[2] == name and option != given]
    if same:
        return f"; did you mean {' or '.join(sorted(same, key=lambda o: not o.startswith('--goal.'))[:3])}?"
    return closest(given, options)


def policy_of(given: Path | str | None) -> Bundle:
    """Load the policy that a command names, by default the one that comes with rlkd.

    Raises:
        UserError: as of `rlkd.load_policy`.
    """
    if given is None:
        return find_policy(None)
    from rlkd.api import load_policy  # takes longer to import than the other commands should

    return load_policy(str(given))


def add_run_options(parser: ArgumentParser) -> None:
    """--out, --seed and --resume."""
    parser.add_argument("--out", type=Path | None, default=None, help="run folder; by default runs/VERB-TIME")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    text = "folder of a run that was stopped or killed: go on with it, by its own config"
    parser.add_argument("--resume", type=Path | None, default=None, help=text)
    text = "trackers that get what TensorBoard gets: wandb, mlflow, trackio, or several with commas (extras)"
    parser.add_argument("--track", type=str | None, default=None, help=text)


def add_policy_option(parser: ArgumentParser) -> None:
    """--policy, which may be left out."""
    text = "a name of rlkd policies, a run folder of rlkd train, or a folder of a policy; by default: default"
    parser.add_argument("--policy", type=Path | None, default=None, help=text)


def policy_option(options: Namespace) -> dict[str, str]:
    """Return the `--policy` that a run records: its path, or nothing for a policy that comes with rlkd."""
    return {} if options.policy is None else {"policy": str(options.policy)}


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that generators do not take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed: got {seed}; allowed: 0 to {2**32 - 1}")


def add_workers_options(parser: ArgumentParser) -> None:
    """--workers, --num_workers, --ray_address and --gpu_share."""
    text = "who trains the students: none (this process), processes (on this machine) or ray (extra ray); same results"
    parser.add_argument("--workers", type=str, default="none", help=text)
    text = "workers; by default one for every processor. A run can be resumed with another number"
    parser.add_argument("--num_workers", type=int | None, default=None, help=text)
    text = "of a running Ray cluster, such as auto or 10.0.0.1:6379; by default one is started on this machine"
    parser.add_argument("--ray_address", type=str | None, default=None, help=text)
    text = "share of a GPU for every worker, where students train on a GPU"
    parser.add_argument("--gpu_share", type=float, default=0.0, help=text)


def workers_of(options: Namespace, device: str) -> WorkersConfig:
    """Return the workers that a command asks for.

    Args:
        options: of a parser with `add_workers_options`.
        device: that students train on.

    Raises:
        UserError: as of `WorkersConfig.check`.
    """
    workers = WorkersConfig(options.workers, options.num_workers, options.ray_address, options.gpu_share)
    workers.check(device)
    return workers
