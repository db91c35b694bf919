"""`rlkd analyze`."""

import sys
from pathlib import Path

from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.cli.arguments import new_parser, parse
from rlkd.errors import UserError
from rlkd.runs.folder import new_folder


def run(argv: list[str]) -> int:
    """Draw the runs and print where."""
    parser = new_parser(
        "analyze",
        "Read TensorBoard event files and results back; write reward curves, controls, accuracy-cost plane, one page.",
        ["runs/first", "runs/first runs/second --out docs/two"],
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    text = "folder to write; by default the run's own, or for several runs runs/analyze-TIME"
    parser.add_argument("--out", type=Path | None, default=None, help=text)
    _, options = parse(parser, argv)
    folders = [Path(folder) for folder in options.runs]
    out = options.out
    if len(folders) > 1 and out is not None and out.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--out: {out} is one of the runs, whose own report would be lost; choose another folder")
    runs = [read_run(folder) for folder in folders]
    for note in (note for run in runs for note in run.notes):
        print(f"rlkd: note: {note}", file=sys.stderr)
    if out is None:
        out = folders[0] if len(folders) == 1 else new_folder("analyze")
    for path in write_report(runs, out):
        print(path)
    return 0
