"""`rlkd search`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rlkd.cli import distil
from rlkd.cli.arguments import check_seed, new_parser, parse
from rlkd.cli.measure import shown
from rlkd.data.distribution import COSTS
from rlkd.io.files import write_whole
from rlkd.io.records import plain, write_json
from rlkd.runs.folder import run_folder, use_one_thread
from rlkd.runs.search import Candidate, Space, StructureConfig, build_space, check_satisfiable, front_of, search

NUM_SHOWN = 12  # structures of the table of what is possible
TABLE_WIDTH = 110


def run(argv: list[str]) -> int:
    """Search for a structure, print the front, and hand the winner to `rlkd distil`."""
    parser = new_parser(
        "search",
        "Choose depth, width and exits of a chain student under limits on latency, MACs, energy or size, by short "
        "trainings in lock-step. What is possible is printed first.",
        [
            "--goal.macs 2x",
            "--dataset letter --goal.latency 1.5x --num_candidates 40 --distil",
            "--reference.kind conv --reference.widths [8,16] --widths [4,32] --depths [1,3] --goal.size 0.5",
        ],
    )
    parser.add_argument("--out", type=Path | None, default=None, help="folder; by default runs/search-TIME")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals and the trainings")
    parser.add_argument("--distil", action="store_true", help="distil the winner at once, into OUT/distil")
    config, options = parse(parser, argv, StructureConfig)
    assert config is not None
    config.check()
    check_seed(options.seed)
    use_one_thread()
    console = Console(width=max(Console().width, TABLE_WIDTH))
    with run_folder(options.out, "search") as folder:
        space = build_space(config)
        fitting = check_satisfiable(space)
        console.print(_possible(space, fitting))
        tried = search(space, options.seed, lambda candidate: print(_line(candidate)))
        front = front_of(tried)
        console.print(_front(front))
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


def _line(candidate: Candidate) -> str:
    return (
        f"widths {list(candidate.widths)}, exits {list(candidate.exits)}: accuracy {candidate.accuracy:.4f}, latency "
        f"{shown(candidate.expected_latency_s, 's')}"
    )


def _possible(space: Space, fitting: Sequence[Candidate]) -> Table:
    """Return a table of structures within the limits, spread from the fastest to the slowest."""
    limits = ", ".join(f"{n} <= {v:.3g}" for n, v in zip(COSTS, space.limits, strict=True) if v != float("inf"))
    title = f"what is possible within {limits} of the reference {list(space.config.reference.widths)}"
    table = Table(title=title, title_justify="left")
    for column in ("widths", "a batch takes", *COSTS):
        table.add_column(column, justify="left" if column == "widths" else "right", no_wrap=True)
    step = max(1, -(-len(fitting) // NUM_SHOWN))
    for candidate in fitting[::step]:
        ratios = (f"{ratio:.3f}" for ratio in candidate.ratios)
        table.add_row(str(list(candidate.widths)), shown(candidate.latency_s, "s"), *ratios)
    return table


def _front(front: Sequence[Candidate]) -> Table:
    table = Table(title="the front: no candidate is both more accurate and faster", title_justify="left")
    for column in ("widths", "exits", "accuracy", "a batch takes", *COSTS):
        table.add_column(column, justify="left" if column in ("widths", "exits") else "right", no_wrap=True)
    for c in front:
        ratios = (f"{ratio:.3f}" for ratio in c.ratios)
        structure = (str(list(c.widths)), str(list(c.exits)))
        table.add_row(*structure, f"{c.accuracy:.4f}", shown(c.expected_latency_s, "s"), *ratios)
    return table
