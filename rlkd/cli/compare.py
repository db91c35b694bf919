"""`rlkd compare`."""

from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from rlkd.cli.arguments import add_run_options, add_workers_options, new_parser, policy_of, workers_of
from rlkd.cli.progress import Bar, print_comparison, print_front
from rlkd.cli.resume import is_finished, is_of_real_model, parse_run, resumable_folder, resumed
from rlkd.configs import CompareConfig
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.runs.compare import compare_methods
from rlkd.runs.folder import use_one_thread
from rlkd.workers import open_workers


def run(argv: list[str]) -> int:
    """Compare, write JSON and CSV, print the tables; once, or once for each config file that `argv` begins with."""
    if is_of_real_model(argv):
        from rlkd.cli import compare_models

        return compare_models.run(argv)
    num_files = next((i for i, given in enumerate(argv) if given.startswith("-")), len(argv))
    files, options = argv[:num_files], argv[num_files:]
    if files and resumed(options):
        raise UserError("--resume: got config files, too; a run goes on by its own config: give its folder alone")
    if not files:
        return _run_one(options, None)
    for file in files:
        _run_one(["--config", file, *options], Path(file).stem)
    return 0


def _run_one(argv: list[str], name: str | None) -> int:
    config, options = parse_run(_parser, argv, CompareConfig)
    config.check()
    bundle, blind = (policy_of(place) if place else None for place in (config.policy, config.blind))
    use_one_thread()
    workers = workers_of(options, config.train.device)
    out = options.out / name if name and options.out else options.out
    with resumable_folder(options, "compare", out) as folder, Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None)
        if is_finished(folder, journal.finished):
            return 0
        with open_workers(workers) as who:
            result = compare_methods(
                config, bundle, folder, seed=options.seed, progress=bar, journal=journal, blind=blind, workers=who
            )
    console = Console(width=None if Console().is_terminal else 190)
    num_tasks = result["num_tasks"] * result["num_seeds"]
    for entry in result["goals"]:
        title = f"{entry['name']}: {num_tasks} held-out tasks ({entry['num_feasible']} feasible), test"
        print_comparison(console, title, entry)
    if result["front"]:
        print_front(console, f"accuracy-cost plane: {num_tasks} held-out tasks, test", result["front"])
    console.print(f"metrics: {folder / 'result.json'}, {folder / 'result.csv'}", highlight=False)
    return 0


def _parser() -> ArgumentParser:
    parser = new_parser(
        "compare",
        "Train the same held-out tasks under several controllers and compare them in pairs, on test data. With --data, "
        "a real model: `rlkd compare --data FILE --help` lists its options.",
        [
            "--methods constant,nncf,cubic --comparison.keeps [0.98] --num_seeds 2",
            "--policy runs/first/policy --methods policy,constant,nncf,open_loop,tpe_25 --num_seeds 5",
            "configs/compare/*.yaml --policy runs/first/policy --out runs/compare  (one folder a file)",
            "--resume runs/compare/baselines",
        ],
    )
    add_run_options(parser)
    add_workers_options(parser)
    return parser
