"""`rlkd compare`."""

from pathlib import Path

from rich.console import Console

from rlkd.agents.bundle import load_bundle
from rlkd.agents.runs import run_folder, use_one_thread
from rlkd.agents.study import compare_methods
from rlkd.cli.arguments import add_run_options, check_seed, new_parser, parse
from rlkd.cli.progress import Bar, comparison_table, front_table
from rlkd.configs import CompareConfig


def run(argv: list[str]) -> int:
    """Compare, write JSON and CSV, print the tables; once, or once for each config file that `argv` begins with."""
    num_files = next((i for i, given in enumerate(argv) if given.startswith("-")), len(argv))
    files, options = argv[:num_files], argv[num_files:]
    if not files:
        return _run_one(options, None)
    for file in files:
        _run_one(["--config", file, *options], Path(file).stem)
    return 0


def _run_one(argv: list[str], name: str | None) -> int:
    parser = new_parser(
        "compare",
        "Train the same held-out tasks under several controllers and compare them in pairs, on test data.",
        [
            "--methods static,published,annealed --num_seeds 2",
            "--policy runs/first/policy --methods policy,static,open_loop,tpe_25 --num_seeds 5",
            "configs/compare/*.yaml --policy runs/first/policy --out runs/compare  (one folder a file)",
        ],
    )
    add_run_options(parser)
    config, options = parse(parser, argv, CompareConfig)
    assert config is not None
    check_seed(options.seed)
    config.check()
    bundle = load_bundle(Path(config.policy)) if config.policy else None
    use_one_thread()
    out = options.out / name if name and options.out else options.out
    with run_folder(out, "compare") as folder, Bar(config.train.steps_per_window) as bar:
        result = compare_methods(config, bundle, folder, options.seed, bar)
    console = Console(width=None if Console().is_terminal else 150)
    num_tasks = result["num_tasks"] * result["num_seeds"]
    for weight, entry in result["preferences"].items():
        console.print(comparison_table(f"accuracy weight {weight}: {num_tasks} held-out tasks, test", entry))
    if result["front"]:
        console.print(front_table(f"accuracy-cost plane: {num_tasks} held-out tasks, test", result["front"]))
    console.print(f"figures: {folder / 'result.json'}, {folder / 'result.csv'}", highlight=False)
    return 0
