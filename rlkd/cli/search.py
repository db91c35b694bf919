"""`rlkd search`: of a chain, or, with `--data`, of a real model (`rlkd.cli.search_models`)."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from rlkd.cli import distil
from rlkd.cli.arguments import check_seed, new_parser, parse
from rlkd.cli.measure import shown
from rlkd.cli.resume import is_of_real_model
from rlkd.data.distribution import COSTS
from rlkd.errors import UserError
from rlkd.io.files import write_whole
from rlkd.io.records import plain, write_json
from rlkd.runs.candidates import AnyCandidate, front_of
from rlkd.runs.folder import run_folder, use_one_thread
from rlkd.runs.search import Candidate, StructureConfig, build_space, check_satisfiable, search

NUM_SHOWN = 12  # structures of the table of what is possible
TABLE_WIDTH = 110
Shown = TypeVar("Shown", bound=AnyCandidate)


def run(argv: list[str]) -> int:
    """Search for a structure, print the front, and hand the winner to `rlkd distil`."""
    if is_of_real_model(argv):
        from rlkd.cli import search_models

        return search_models.run(argv)
    if any(given.split("=")[0] == "--teacher" for given in argv):
        raise UserError("--teacher: names a real model, which needs --data FILE_OR_FOLDER, too")
    parser = new_parser(
        "search",
        "Choose depth, width and exits of a chain student under limits on latency, MACs, energy or size, by short "
        "trainings in lock-step. What is possible is printed first. With --data, the cut of a transformers teacher: "
        "`rlkd search --data FILE --help` tells its options.",
        [
            "--goal.macs 2x",
            "--dataset letter --goal.latency 1.5x --num_candidates 40 --distil",
            "--reference.kind conv --reference.widths [8,16] --widths [4,32] --depths [1,3] --goal.size 0.5",
            "--goal.latency 2x --teacher models/bert --data reviews.csv",
        ],
    )
    add_search_options(parser)
    config, options = parse(parser, argv, StructureConfig)
    assert config is not None
    config.check()
    check_seed(options.seed)
    use_one_thread()
    console = wide_console()
    with run_folder(options.out, "search") as folder:
        space = build_space(config)
        fitting = check_satisfiable(space)
        reference = f"the reference {list(config.reference.widths)}"
        console.print(table_of_possible(fitting, space.limits, reference, {"widths": _widths}))
        tried = search(space, options.seed, lambda candidate: print(_line(candidate)))
        front = front_of(tried)
        console.print(table_of_front(front, {"widths": _widths, "exits": lambda c: str(list(c.exits))}))
        winner = front[-1]
        file = folder / "student.yaml"
        structure = {"kind": config.reference.kind, "widths": list(winner.widths), "exits": list(winner.exits)}
        write_whole(file, yaml.safe_dump({"student": structure, "task": {"dataset": config.dataset}}, sort_keys=False))
        write_json(
            folder / "search.json", {"config": plain(config), "seed": options.seed, "tried": tried, "front": front}
        )
    command = ["--config", str(file), "--seed", str(options.seed), "--goal.keep", "0.98", "--goal.reference", "dense"]
    print(f"winner: widths {list(winner.widths)}, exits {list(winner.exits)}; next: rlkd distil {shlex.join(command)}")
    if options.distil:
        return distil.run([*command, "--out", str(folder / "distil")])
    return 0


def add_search_options(parser: ArgumentParser) -> None:
    """--out, --seed and --distil."""
    parser.add_argument("--out", type=Path | None, default=None, help="folder; by default runs/search-TIME")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals and the trainings")
    parser.add_argument("--distil", action="store_true", help="distil the winner at once, into OUT/distil")


def wide_console() -> Console:
    """Return a console that the tables fit in."""
    return Console(width=max(Console().width, TABLE_WIDTH))


def _line(candidate: Candidate) -> str:
    return f"widths {list(candidate.widths)}, exits {list(candidate.exits)}: {reached(candidate)}"


def _widths(candidate: Candidate) -> str:
    return str(list(candidate.widths))


def reached(candidate: AnyCandidate) -> str:
    """Return what the short training of a candidate reached."""
    return f"accuracy {candidate.accuracy:.4f}, latency {shown(candidate.expected_latency_s, 's')}"


def table_of_possible(
    fitting: Sequence[Shown], limits: Sequence[float], reference: str, columns: Mapping[str, Callable[[Shown], str]]
) -> Table:
    """Return a table of structures within the limits, spread from the fastest to the slowest.

    Args:
        fitting: the fastest first.
        limits: ratios in the order of COSTS; inf: none.
        reference: that ratios refer to.
        columns: what a structure is built of, by the title of its column.
    """
    asked = ", ".join(f"{n} <= {v:.3g}" for n, v in zip(COSTS, limits, strict=True) if v != float("inf"))
    table = _table(f"what is possible within {asked} of {reference}", columns, ("a batch takes", *COSTS))
    for candidate in fitting[:: max(1, -(-len(fitting) // NUM_SHOWN))]:
        ratios = (f"{ratio:.3f}" for ratio in candidate.ratios)
        table.add_row(*(text(candidate) for text in columns.values()), shown(candidate.latency_s, "s"), *ratios)
    return table


def table_of_front(front: Sequence[Shown], columns: Mapping[str, Callable[[Shown], str]]) -> Table:
    """Return a table of the front; `columns` as in `table_of_possible`."""
    title = "the front: no candidate is both more accurate and faster"
    table = _table(title, columns, ("accuracy", "a batch takes", *COSTS))
    for c in front:
        structure, ratios = (text(c) for text in columns.values()), (f"{ratio:.3f}" for ratio in c.ratios)
        table.add_row(*structure, f"{c.accuracy:.4f}", shown(c.expected_latency_s, "s"), *ratios)
    return table


def _table(title: str, columns: Iterable[str], others: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table
