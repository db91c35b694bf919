"""`rlkd compare --data ...`: the same real student under several ways of setting its controls."""

from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from rlkd.cli.arguments import add_policy_option, add_run_options, new_parser, policy_of, policy_option
from rlkd.cli.progress import Bar
from rlkd.cli.resume import is_finished, parse_run, resumable_folder
from rlkd.io.journal import Journal
from rlkd.runs.compare_real import compare_real
from rlkd.runs.folder import use_one_thread
from rlkd.runs.real_methods import RealCompareConfig
from rlkd.runs.resume import describe

PACKAGES = ("transformers", "tokenizers", "pyarrow")


def run(argv: list[str]) -> int:
    """Compare, write `result.json`, print one table."""
    config, options = parse_run(_parser, argv, RealCompareConfig)
    config.check()
    bundle = policy_of(options.policy)
    use_one_thread()
    with resumable_folder(options, "compare", options.out) as folder, Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints)
        if is_finished(folder, journal.finished):
            return 0
        describe(journal, folder, config, options.seed, PACKAGES, policy_option(options))
        result = compare_real(config, bundle, folder, seed=options.seed, progress=bar)
        journal.finish()
    console = Console(width=None if Console().is_terminal else 190)
    console.print(_table(result))
    console.print(f"metrics: {folder / 'result.json'}", highlight=False)
    return 0


def _parser() -> ArgumentParser:
    parser = new_parser(
        "compare",
        "Train the same real student under several controllers and compare them in pairs, on test data.",
        [
            "--teacher models/bert --data reviews.csv --cut.layers 2 --goal.keep 0.98",
            "--teacher models/vit --data pictures --methods policy,cubic,smaller --num_seeds 5 --goal.keep 0.99",
            "--resume runs/compare/bert",
        ],
    )
    add_policy_option(parser)
    add_run_options(parser)
    return parser


def _table(result: dict[str, Any]) -> Table:
    """Return one row a method: accuracy, goals met, costs, measured speed and the policy's lead."""
    table = Table(title=f"{result['num_seeds']} seeds, test")
    for name in ("method", "trainings", "accuracy", "goal met", "shortfall", "MACs", "over teacher", "J", "lead in J"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, entry in result["methods"].items():
        pair = next((p for key, p in result["paired"].items() if key.split("-", 1)[1] == name), None)
        lead = f"{pair['difference']:+.3f} ({pair['ci95'][0]:+.3f}, {pair['ci95'][1]:+.3f})" if pair else ""
        speed = entry.get("speedup_over_teacher")
        table.add_row(
            name,
            f"{entry['trainings_per_task']:.0f}",
            f"{entry['accuracy']['mean']:.4f}",
            f"{entry['goal_met']:.0%}",
            f"{entry['shortfall']:.4f}",
            f"{entry['macs_ratio']['mean']:.3f}",
            "" if speed is None else f"{speed:.2f} x",
            f"{entry['score']['mean']:.3f}",
            lead,
        )
    return table
