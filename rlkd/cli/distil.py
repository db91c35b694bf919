"""`rlkd distil`: on a student that is a chain, or, with `--data`, on a real model (`rlkd.cli.distil_models`)."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.bundled import find_policy
from rlkd.cli.arguments import add_run_options, new_parser
from rlkd.cli.outcome import Watch, finish, show_goal
from rlkd.cli.progress import Bar
from rlkd.cli.resume import is_finished, is_of_real_model, parse_run, resumable_folder
from rlkd.configs import DistilConfig
from rlkd.cost import save_profile
from rlkd.envs.scenario import build_scenario
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.io.records import plain
from rlkd.runs.distil import check_shipped, distil, write_student
from rlkd.runs.folder import use_one_thread
from rlkd.runs.goals import with_goal
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile

POLICY_HELP = "a run folder of rlkd train, or a folder of a policy; by default the policy that comes with rlkd"


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
    bundle = find_policy(options.policy)
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
    parser.add_argument("--policy", type=Path | None, default=None, help=POLICY_HELP)
    add_run_options(parser)
    return parser


def policy_option(options: Namespace) -> dict[str, str]:
    """Return the `--policy` that a run records: its path, or nothing for a policy that comes with rlkd."""
    return {} if options.policy is None else {"policy": str(options.policy)}


def _distil(config: DistilConfig, bundle: Bundle, options: Namespace, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    with Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints)
        if is_finished(folder, journal.finished):
            return 0
        describe(journal, folder, config, options.seed, options=policy_option(options))
        env = with_own_profile(config.env(bundle.policy.controls), folder)
        scenario = build_scenario(env, bundle.policy.start)
        scenario = with_goal(scenario, config.goal, config.preference)
        save_profile(scenario.profile, folder / f"{PROFILE}.json")
        remember(journal, "distil", scenario.tensors(), costs=plain(scenario.profile), policy=bundle.digest)
        dense = show_goal(scenario, config.goal, options.seed, journal)
        bar.phase("distilling", 1, config.num_windows)
        watch = Watch(folder, bundle, bar, journal)
        done = distil(scenario, bundle.policy.controller(), options.seed, watch.window, journal, config.guard)
        watch.close(config, options.seed, done.figures)
    weights = config.goal.weights(config.preference)
    write_student(folder / "student", done, weights, bundle.digest)
    return finish(
        folder,
        config,
        plain(config.task),
        watch,
        done,
        weights=weights,
        dense=dense,
        broken=check_shipped(done.figures),
    )
