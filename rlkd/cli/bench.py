"""`rlkd bench`."""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlkd.agents.benchmark import bench
from rlkd.agents.runs import write_json
from rlkd.cli.arguments import new_parser, parse
from rlkd.envs.world import EnvConfig
from rlkd.errors import UserError


def run(argv: list[str]) -> int:
    """Measure and print ratios."""
    parser = new_parser(
        "bench",
        "Student updates/s of the lock-step population, a one-student loop and SubprocVecEnv, in one run.",
        ["", "--threads 2 --num_students 256", "--out bench.json"],
    )
    parser.add_argument("--num_students", type=int, default=128, help="students in lock-step")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are reported")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in this process")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the figures as JSON")
    config, options = parse(parser, argv, EnvConfig)
    assert config is not None
    config.check()
    if min(options.num_students - 1, options.rounds, options.threads) < 1:
        raise UserError("bench: allowed: --num_students at least 2, --rounds and --threads at least 1")
    torch.set_num_threads(options.threads)
    result = bench(config, options.num_students, options.rounds, lambda line: print(line, file=sys.stderr))
    table = Table(title=f"student updates/s, {options.threads} thread(s), medians of {options.rounds} rounds")
    for column in ("way", "updates/s", "lowest", "highest", "lock-step is"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in result["updates_per_s"].items():
        ratio = result["ratio_of_lock_step"].get(name)
        table.add_row(name, *(f"{row[k]:,.0f}" for k in ("median", "low", "high")), f"{ratio:.1f} x" if ratio else "")
    console = Console()
    console.print(table)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["step_share"].items())
    console.print(f"an environment step spends its time on: {shares}", highlight=False)
    if options.out:
        write_json(options.out, result)
    return 0
