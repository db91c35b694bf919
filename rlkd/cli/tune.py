"""`rlkd tune`."""

from pathlib import Path

from rlkd.cli.arguments import check_seed, new_parser, parse
from rlkd.cli.progress import Bar
from rlkd.configs import ExperimentConfig
from rlkd.io.lock import hold
from rlkd.runs.folder import use_one_thread
from rlkd.runs.tune import tune


def run(argv: list[str]) -> int:
    """Search PPO's hyperparameters and write the best ones."""
    parser = new_parser(
        "tune",
        "Search PPO's hyperparameters with Optuna: trials are scored on the validation scenarios, bad ones are stopped "
        "early. The same command goes on with a search that was stopped.",
        ["--config default --num_trials 20 --out runs/tuned"],
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="folder of the study")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler and of every trial")
    parser.add_argument("--num_trials", type=int, default=20, help="in all, earlier calls included")
    config, options = parse(parser, argv, ExperimentConfig)
    assert config is not None
    check_seed(options.seed)
    use_one_thread()
    config.check()
    is_new = not options.out.exists()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with hold(options.out, resume=True), Bar(config.steps_per_window) as bar:
            tuned = tune(config, options.out, options.seed, options.num_trials, bar)
    finally:
        if is_new and options.out.is_dir() and not any(options.out.iterdir()):
            options.out.rmdir()
    print(
        f"best score on validation {tuned.score:.4f} of {tuned.num_trials} trials, {tuned.num_pruned} stopped early; "
        f"train with it: rlkd train --config {options.out / 'best.yaml'}"
    )
    return 0
