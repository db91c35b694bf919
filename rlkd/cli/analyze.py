"""`rlkd analyze`."""

from pathlib import Path

from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.cli.arguments import new_parser, parse


def run(argv: list[str]) -> int:
    """Draw the runs and print where."""
    parser = new_parser(
        "analyze",
        "Read TensorBoard event files and results back; write reward curves, controls, accuracy-cost plane, one page.",
        ["runs/first", "runs/first runs/second --out docs/two"],
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path | None, default=None, help="folder to write; by default the first run's")
    _, options = parse(parser, argv)
    runs = [read_run(Path(folder)) for folder in options.runs]
    for path in write_report(runs, options.out or runs[0].folder):
        print(path)
    return 0
