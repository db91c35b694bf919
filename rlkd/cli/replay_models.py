"""`rlkd replay --data ...`: distil a real model under a policy that was learned on tiny students."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rlkd.agents.policy.bundle import Bundle, load_bundle
from rlkd.cli.arguments import add_run_options, new_parser
from rlkd.cli.progress import Bar
from rlkd.cli.replay import Watch, finish
from rlkd.cli.resume import is_finished, parse_run, resumable_folder
from rlkd.compression.real.cut import save_module_student
from rlkd.envs.real import RealConfig, build_real_scenario
from rlkd.errors import UserError
from rlkd.io.files import write_whole
from rlkd.io.journal import Journal
from rlkd.runs.distil import student_card
from rlkd.runs.distil_real import distil_module
from rlkd.runs.folder import use_one_thread
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile
from rlkd.students.real import processes


def run(argv: list[str]) -> int:
    """Distil one real model, write it, and print its figures."""
    config, options = parse_run(_parser, argv, RealConfig)
    bundle = load_bundle(options.policy)
    processes.join(config.train.device)
    config.check()
    use_one_thread()
    if processes.num_processes() > 1 and options.resume is not None:
        raise UserError("--resume: got several processes; allowed: one, which goes on where they stopped")
    if processes.index():  # the first process alone writes and speaks
        with tempfile.TemporaryDirectory() as scratch, _silent():
            return _replay(config, bundle, options, Path(scratch))
    with resumable_folder(options, "replay", options.out) as folder:
        return _replay(config, bundle, options, folder)


def _parser() -> ArgumentParser:
    parser = new_parser(
        "replay",
        "Distil a real model (transformers; text, images, language models) under a frozen policy, in one training run.",
        [
            "--policy runs/first/policy --teacher models/bert --data reviews.csv --cut.layers 2",
            "--policy runs/first/policy --teacher models/vit --data pictures --student models/small-vit",
            "--policy runs/first/policy --teacher models/bert --data reviews.csv --student small.json",
            "--policy runs/first/policy --teacher models/smollm --data novels --student small-llama.json",
            "--resume runs/mine",
        ],
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy bundle")
    add_run_options(parser)
    return parser


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing is printed inside the block; what it raises is."""
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _replay(config: RealConfig, bundle: Bundle, options: Namespace, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    with Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints, bar.say)
        if is_finished(folder, journal.finished):
            return 0
        packages = ("transformers", "tokenizers", "pyarrow")
        describe(journal, folder, config, options.seed, bar.say, packages, {"policy": str(options.policy)})
        controls, plan = bundle.policy.controls, bundle.policy.plan
        scenario = build_real_scenario(with_own_profile(config, folder), controls, plan, options.seed, bar.say)
        write_whole(folder / "mapping.txt", f"{scenario.tables}\n{scenario.report}")
        bar.say(scenario.tables)
        if not (folder / f"{PROFILE}.json").exists():
            scenario.profile.save(folder / f"{PROFILE}.json")
        remember(journal, "replay --data", scenario.tensors(), policy=bundle.digest)
        bar.phase("distilling", 1, config.num_windows)
        watch = Watch(folder, bundle, bar, journal)
        done = distil_module(scenario, bundle.policy.controller(), options.seed, watch.window, journal)
        watch.close(config, options.seed, done.figures)
    prepared = "arrays as they are given" if scenario.processor is None else "as the processor in model/ prepares them"
    card = {**student_card(done.figures, config.preference, bundle.digest), "input_scale": prepared}
    card["inputs"] = scenario.data.shape_of_texts()
    save_module_student(done.student, folder / "student", scenario.processor, card)
    task = {"data": config.data, "teacher": config.teacher, "student": config.student, "kind": scenario.kind}
    return finish(folder, config, task, watch, done.figures, done.measured, done.diverged)
