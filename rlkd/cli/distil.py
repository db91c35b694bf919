"""`rlkd distil`: on a student that is a chain, or, with `--data`, on a real model (`rlkd.cli.distil_models`)."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rlkd.agents.evaluation.trackers import parse_names, tracking
from rlkd.agents.policy.bundle import Bundle
from rlkd.cli.arguments import add_policy_option, add_run_options, new_parser, policy_of, policy_option
from rlkd.cli.outcome import print_outcome, show_goal
from rlkd.cli.progress import Bar
from rlkd.cli.resume import is_finished, is_of_real_model, parse_run, resumable_folder
from rlkd.configs import DistilConfig
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.runs.folder import use_one_thread
from rlkd.runs.single import distil_chain


def run(argv: list[str]) -> int:
    """Distil one student, write it, and print what it reached."""
    if is_of_real_model(argv):
        from rlkd.cli import distil_models

        return distil_models.run(argv)
    for name in ("--teacher", "--student"):
        if any(given.split("=")[0] == name for given in argv):
            raise UserError(f"{name}: names a real model, which needs --data FILE_OR_FOLDER, too")
    config, options = parse_run(_parser, argv, DistilConfig)
    config.check()
    bundle = policy_of(options.policy)
    use_one_thread()
    with resumable_folder(options, "distil", options.out) as folder:
        return _distil(config, bundle, options, folder)


def _parser() -> ArgumentParser:
    parser = new_parser(
        "distil",
        "Distil a new student under a learned policy, in one training run. With --data, a real model: "
        "`rlkd distil --data FILE --help` tells its options.",
        [
            "--goal.keep 0.98",
            "--goal.keep 0.98 --goal.reference dense --goal.latency 2x --student.widths [96,64,32] "
            "--student.exits [1,2]",
            "--preference.accuracy 0.9 --policy runs/first --config conv",
            "--goal.keep 0.98 --teacher models/bert --data reviews.csv --cut.layers 2",
            "--resume runs/mine",
        ],
    )
    add_policy_option(parser)
    add_run_options(parser)
    return parser


def _distil(config: DistilConfig, bundle: Bundle, options: Namespace, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    with Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints)
        if is_finished(folder, journal.finished):
            return 0
        with tracking(parse_names(options.track), folder, config):
            outcome = distil_chain(
                config,
                bundle,
                folder,
                options.seed,
                progress=bar,
                journal=journal,
                show=show_goal,
                options=policy_option(options),
            )
    return print_outcome(outcome)
