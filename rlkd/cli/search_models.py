"""`rlkd search --data ...`: the cut of a transformers teacher under cost limits, before any distillation."""

import json
import shlex
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from rlkd.cli import distil
from rlkd.cli.arguments import check_seed, new_parser, parse
from rlkd.cli.search import add_search_options, reached, table_of_front, table_of_possible, wide_console
from rlkd.envs.real_config import RealConfig
from rlkd.io.records import plain, write_json
from rlkd.runs.candidates import front_of
from rlkd.runs.folder import run_folder, use_one_thread
from rlkd.runs.search_real import (
    CutCandidate,
    RealSearchConfig,
    build_space,
    distil_config,
    name_of,
    search,
)

Columns = dict[str, Callable[[CutCandidate], str]]
SHAPE: Columns = {"layers": lambda c: str(c.layers), "width": lambda c: f"{c.width:g}"}
STRUCTURE: Columns = {**SHAPE, "blocks": lambda c: c.keep, "exits": lambda c: str(list(c.exits))}


def run(argv: list[str]) -> int:
    """Search for a cut, print the front, and hand the winner to `rlkd distil`."""
    config, options = parse(_parser(), argv, RealSearchConfig)
    assert config is not None
    config.check()
    check_seed(options.seed)
    use_one_thread()
    console = wide_console()
    with run_folder(options.out, "search") as folder:
        space = build_space(config)
        shapes = {(c.layers, c.width): c for c in space.fitting()}  # blocks and exits cost the same
        console.print(table_of_possible(list(shapes.values()), space.limits, f"the teacher {config.teacher}", SHAPE))
        tried = search(space, options.seed, lambda c: print(f"{name_of(c)}: {reached(c)}"))
        front = front_of(tried)
        console.print(table_of_front(front, STRUCTURE))
        winner = front[-1]
        command = [*options_of(distil_config(space, winner)), "--seed", str(options.seed)]
        record = {"config": plain(config), "seed": options.seed, "tried": tried, "front": front}
        record |= {"teacher_latency_s": space.teacher_latency_s, "distil": command}
        write_json(folder / "search.json", record)
    print(f"winner: {name_of(winner)}; next: rlkd distil {shlex.join(command)}")
    if options.distil:
        return distil.run([*command, "--out", str(folder / "distil")])
    return 0


def _parser() -> ArgumentParser:
    parser = new_parser(
        "search",
        "Choose how a student is cut from a transformers teacher (layers, which ones, width, an early exit) under "
        "limits on latency, MACs, energy or size, by short plain distillations. What is possible is printed first.",
        [
            "--goal.latency 2x --teacher models/bert --data reviews.csv",
            "--goal.macs 0.4 --goal.size 0.7 --teacher models/vit --data pictures --space.layers [2,4,6] --distil",
        ],
    )
    add_search_options(parser)
    return parser


def options_of(config: RealConfig) -> list[str]:
    """Return the options of `rlkd distil` that make `config`: models, data, and what differs from the defaults."""
    default = plain(RealConfig(teacher="", data=""))
    options: list[str] = []

    def walk(prefix: str, given: dict[str, Any], usual: dict[str, Any]) -> None:
        for name, value in given.items():
            if isinstance(value, dict) and isinstance(usual[name], dict):
                walk(f"{prefix}{name}.", value, usual[name])
            elif value != usual[name]:
                options.extend((f"--{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))

    walk("", plain(config), default)
    return options
