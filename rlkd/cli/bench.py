"""`rlkd bench`."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlkd.agents.evaluation.benchmark import bench
from rlkd.cli.arguments import new_parser, parse
from rlkd.envs.scenario import EnvConfig
from rlkd.errors import UserError
from rlkd.io.records import write_json
from rlkd.runs.folder import use_one_thread


def run(argv: list[str]) -> int:
    """Measure and print ratios."""
    parser = new_parser(
        "bench",
        "Student updates/s of the lock-step population, a one-student loop and SubprocVecEnv, in one run.",
        ["", "--num_students 256 --rounds 15", "--train.device cuda --device_students [512,8192] --out bench.json"],
    )
    parser.add_argument("--num_students", type=int, default=128, help="students in lock-step")
    text = "with --train.device: sizes of the populations there, which train from reset to end; by default num_students"
    parser.add_argument("--device_students", type=tuple[int, ...], default=(), help=text)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are reported")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the figures as JSON")
    config, options = parse(parser, argv, EnvConfig)
    assert config is not None
    config.check()
    if min(options.num_students - 1, options.rounds, *(n - 1 for n in options.device_students)) < 1:
        raise UserError("bench: allowed: --num_students and --device_students at least 2, --rounds at least 1")
    if options.device_students and config.train.device == "cpu":
        raise UserError("bench: got --device_students without a GPU; allowed: with --train.device cuda or cuda:N")
    use_one_thread()
    result = bench(config, options.num_students, options.rounds, options.device_students)
    table = Table(title=f"student updates/s, {options.num_students} in lock-step, medians of {options.rounds} rounds")
    table.add_column("way", overflow="fold")
    for column in ("updates/s", "lowest", "highest", "trainings/s", *(f"{name} is" for name in result["ratio"])):
        table.add_column(column, justify="right", overflow="fold")
    for name, row in result["updates_per_s"].items():
        ratios = (f"{r[name]:.1f} x" if name in r else "" for r in result["ratio"].values())
        rates = [f"{row[k]:,.0f}" for k in ("median", "low", "high")]
        table.add_row(name, *rates, f"{row['trainings_per_s']:,.1f}", *ratios)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["step_share"].items())
    console.print(f"an environment step spends its time on: {shares}", highlight=False)
    if options.out:
        write_json(options.out, result)
    return 0
