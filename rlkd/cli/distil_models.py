"""`rlkd distil --data ...`: distil a real model under a policy that was learned on tiny students."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rlkd.agents.evaluation.trackers import parse_names, tracking
from rlkd.agents.policy.bundle import Bundle
from rlkd.cli.arguments import add_policy_option, add_run_options, new_parser, policy_of, policy_option
from rlkd.cli.outcome import print_outcome, show_goal
from rlkd.cli.progress import Bar
from rlkd.cli.resume import is_finished, parse_run, resumable_folder
from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.io.journal import Journal
from rlkd.runs.folder import use_one_thread
from rlkd.runs.single import pretrained_scenario, ship_scenario, train_scenario

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Distil one real model, write it, and print its figures."""
    config, options = parse_run(_parser, argv, RealConfig)
    bundle = policy_of(options.policy)
    processes.join(config.train.device)
    config.check()
    use_one_thread()
    try:
        if processes.index():  # the first process alone writes and speaks
            with tempfile.TemporaryDirectory() as scratch, _silent():
                return _follow(config, bundle, options, Path(scratch))
        with resumable_folder(options, "distil", options.out) as folder:
            processes.wait()
            return _distil(config, bundle, options, folder)
    finally:
        processes.leave()


def _parser() -> ArgumentParser:
    parser = new_parser(
        "distil",
        "Distil a real model (transformers; text, images, language models) under a learned policy, in one run.",
        [
            "--goal.keep 0.98 --teacher models/bert --data reviews.csv --cut.layers 2",
            "--goal.keep 0.98 --teacher models/vit --data pictures --student models/small-vit",
            "--goal.keep 0.98 --teacher models/bert --data reviews.csv --student small.json",
            "--goal.keep 0.98 --teacher models/smollm --data novels --student small-llama.json",
            "--resume runs/mine",
        ],
    )
    add_policy_option(parser)
    add_run_options(parser)
    return parser


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing is printed inside the block; what it raises is."""
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _follow(config: RealConfig, bundle: Bundle, options: Namespace, scratch: Path) -> int:
    """Train beside the first process, from a copy of what a run that goes on has written; returns the exit code."""
    if options.resume is not None:
        if not options.resume.is_dir():
            raise UserError(f"--resume: {options.resume} is not here; allowed: a folder that every process can read")
        shutil.copytree(options.resume, scratch, dirs_exist_ok=True)
    processes.wait()  # from here on the first process writes to its folder
    journal = Journal(scratch, options.resume is not None, config.keep_checkpoints)
    if not journal.finished:
        scenario = pretrained_scenario(config, bundle, scratch, options.seed, journal=journal)
        with Bar(config.train.steps_per_window) as bar:
            train_scenario(scenario, config, bundle, scratch, options.seed, progress=bar, journal=journal)
    return 0


def _distil(config: RealConfig, bundle: Bundle, options: Namespace, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    with Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints)
        if is_finished(folder, journal.finished):
            return 0
        seed, remembered = options.seed, policy_option(options)
        scenario = pretrained_scenario(config, bundle, folder, seed, journal=journal, options=remembered)
        with tracking(parse_names(options.track), folder, config):
            learned = train_scenario(
                scenario, config, bundle, folder, seed, progress=bar, journal=journal, show=show_goal
            )
            processes.leave()  # the first process ships the student alone
            outcome = ship_scenario(learned, config, bundle, folder, seed)
    return print_outcome(outcome)
