"""`rlkd replay --data ...`: distil a real model under a policy that was learned on tiny students."""

import time
from pathlib import Path

from rlkd.agents.bundle import Bundle, load_bundle
from rlkd.agents.replay import student_card
from rlkd.agents.replay_modules import distil_module
from rlkd.agents.runs import describe_run, run_folder, use_one_thread
from rlkd.cli.arguments import add_run_options, check_seed, new_parser, parse
from rlkd.cli.progress import Bar
from rlkd.cli.replay import Watch, finish
from rlkd.compression.modules import save_module_student
from rlkd.envs.modules import ModuleConfig, build_module_world
from rlkd.files import write_whole


def run(argv: list[str]) -> int:
    """Distil one real model, write it, and print its figures."""
    parser = new_parser(
        "replay",
        "Distil a real model (transformers; text or images) under a frozen policy, in one training run.",
        [
            "--policy runs/first/policy --teacher models/bert --data reviews.csv --cut.layers 2",
            "--policy runs/first/policy --teacher models/vit --data pictures --student models/small-vit",
            "--policy runs/first/policy --teacher models/bert --data reviews.csv --student small.json",
        ],
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy bundle")
    add_run_options(parser)
    config, options = parse(parser, argv, ModuleConfig)
    assert config is not None
    check_seed(options.seed)
    bundle = load_bundle(options.policy)
    config.check()
    use_one_thread()
    with run_folder(options.out, "replay") as folder:
        return _replay(config, bundle, options.seed, folder)


def _replay(config: ModuleConfig, bundle: Bundle, seed: int, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    began = time.perf_counter()
    describe_run(folder, config, seed, ("transformers", "tokenizers", "datasets"))
    with Bar(config.train.steps_per_window) as bar:
        controls, plan = bundle.policy.controls, bundle.policy.plan
        world = build_module_world(config, controls, plan, seed, bar.say)
        write_whole(folder / "mapping.txt", world.tables)
        bar.say(world.tables)
        world.profile.save(folder / "cost_profile.json")
        bar.phase("distilling", 1, config.num_windows)
        watch = Watch(folder, bundle, bar)
        done = distil_module(world, bundle.policy.controller(), seed, watch.window)
        watch.close(config)
    card = student_card(done.figures, config.preference, bundle.digest)
    save_module_student(done.student, folder / "student", world.processor, card)
    task = {"data": config.data, "teacher": config.teacher, "student": config.student, "kind": world.kind}
    return finish(folder, config, task, watch, done.figures, done.measured, done.diverged, began)
