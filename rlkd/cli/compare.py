"""`rlkd compare`."""

from pathlib import Path

from rich.console import Console

from rlkd.agents.bundle import load_bundle
from rlkd.agents.methods import METHODS
from rlkd.agents.runs import run_folder, use_one_thread
from rlkd.agents.study import compare_methods
from rlkd.cli.arguments import add_run_options, check_seed, closest, new_parser, parse
from rlkd.cli.progress import Bar, comparison_table
from rlkd.configs import CompareConfig
from rlkd.errors import UserError


def run(argv: list[str]) -> int:
    """Compare, write JSON and CSV, print the table."""
    parser = new_parser(
        "compare",
        "Train the same held-out tasks under several controllers and compare them in pairs, on test data.",
        [
            "--methods static,published,schedule --seeds 2",
            "--policy runs/first/policy --methods policy,static,open_loop,mean_action --seeds 5",
        ],
    )
    parser.add_argument("--methods", type=str, default="static,published,schedule", help="comma-separated (rlkd list)")
    parser.add_argument("--seeds", type=int, default=1, help="sets of comparison.num_tasks fresh tasks")
    add_run_options(parser)
    config, options = parse(parser, argv, CompareConfig)
    assert config is not None
    check_seed(options.seed)
    config.check()
    names = list(dict.fromkeys(name.strip() for name in options.methods.split(",")))
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: got {name!r}; allowed: {', '.join(METHODS)}{closest(name, METHODS)}")
    if options.seeds < 1:
        raise UserError(f"--seeds: got {options.seeds}; allowed: at least 1")
    bundle = load_bundle(Path(config.policy)) if config.policy else None
    if bundle is None and (needy := [name for name in names if name in ("policy", "open_loop", "mean_action")]):
        raise UserError(f"--methods: {needy[0]} needs a policy; give its folder with --policy")
    use_one_thread()
    with run_folder(options.out, "compare") as folder, Bar(config.train.steps_per_window) as bar:
        result = compare_methods(config, bundle, names, options.seeds, folder, options.seed, bar)
    console = Console(width=None if Console().is_terminal else 150)
    num_tasks = result["num_tasks"] * result["num_seeds"]
    for weight, entry in result["preferences"].items():
        console.print(comparison_table(f"accuracy weight {weight}: {num_tasks} held-out tasks, test", entry))
    console.print(f"figures: {folder / 'result.json'}, {folder / 'result.csv'}", highlight=False)
    return 0
