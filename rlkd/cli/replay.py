"""`rlkd replay`."""

import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from rlkd.agents import tensorboard as tb
from rlkd.agents.bundle import Bundle, load_bundle
from rlkd.agents.replay import distil, write_student
from rlkd.agents.report import read_run, write_report
from rlkd.agents.runs import JsonLines, describe_run, plain, run_folder, use_one_thread, write_json
from rlkd.cli.arguments import add_run_options, check_seed, new_parser, parse
from rlkd.cli.progress import Bar
from rlkd.configs import ReplayConfig
from rlkd.cost import save_profile
from rlkd.envs.action import CONTROLS
from rlkd.envs.world import build_world

FAR = 5.0  # training deviations; a bundle's own tasks stay below this nearly always


def run(argv: list[str]) -> int:
    """Distil one student, write it, and print its figures."""
    parser = new_parser(
        "replay",
        "Distil a new student under a frozen policy, in one training run.",
        [
            "--policy runs/first/policy",
            "--policy runs/first/policy --preference.accuracy 0.9 --student.widths [96,64,32] --student.exits [1,2]",
            "--policy runs/first/policy --config conv",
        ],
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy bundle")
    add_run_options(parser)
    config, options = parse(parser, argv, ReplayConfig)
    assert config is not None
    check_seed(options.seed)
    bundle = load_bundle(options.policy)
    config.check()
    use_one_thread()
    with run_folder(options.out, "replay") as folder:
        return _replay(config, bundle, options.seed, folder)


def _replay(config: ReplayConfig, bundle: Bundle, seed: int, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    began = time.perf_counter()
    describe_run(folder, config, seed)
    positions: list[list[float]] = []
    far: dict[int, float] = {}
    with Bar(config.train.steps_per_window) as bar:
        world = build_world(config.env(bundle.policy.controls), bundle.policy.plan, bar.say)
        save_profile(world.profile, folder / "cost_profile.json")
        metrics = JsonLines(folder / "metrics.jsonl")
        logger = tb.new_logger(folder / "tensorboard")
        bar.phase("distilling", 1, config.num_windows)

        def on_window(row: dict[str, float], observation: torch.Tensor) -> None:
            metrics.write(row)
            positions.append([row[f"position_{name}"] for name in CONTROLS])
            distance = float(bundle.policy.spread_of(observation)[0])
            if distance > FAR:
                far[int(row["window"])] = distance
            tb.record_window(logger, row)
            bar.figures(score=row["score"], accuracy=row["accuracy"], macs_ratio=row["macs_ratio"])
            bar.advance(1)

        done = distil(world, bundle.policy.controller(), seed, on_window)
        tb.write_config(logger, config)
        tb.write_position_figure(logger, torch.tensor(positions)[:, None])
        logger.close()
    preference = dict(zip(("accuracy", "latency", "energy"), config.preference.weights(), strict=True))
    write_student(folder / "student", done, config.preference, bundle.digest)
    wall_s = time.perf_counter() - began
    updates = config.num_windows * config.train.steps_per_window
    write_json(
        folder / "result.json",
        {
            "schema": 1,
            "task": plain(config.task),
            "split": "test",
            "num_tasks": 1,
            "num_seeds": 1,
            "preference": preference,
            "methods": {"policy": {**done.figures, "num_diverged": int(done.diverged), "trainings_per_task": 1.0}},
            "paired": {},
            "measured": done.measured,
            "far_from_training": far,
            "cost": {"agent_trainings": 0, "wall_s": wall_s, "updates_per_s": updates / wall_s},
        },
    )
    write_report([read_run(folder)], folder)
    _report(Console(), folder, done.figures, done.measured, far)
    if done.diverged:
        print(f"rlkd: the student diverged in window {len(positions)}; do not ship it", file=sys.stderr)
    return 1 if done.diverged else 0


def _report(
    console: Console,
    folder: Path,
    figures: dict[str, float],
    measured: dict[str, dict[str, float]],
    far: dict[int, float],
) -> None:
    lines = [
        f"test: J {figures['score']:.4f}, accuracy {figures['accuracy']:.4f} "
        f"(teacher {figures['teacher_accuracy']:.4f}), MACs {figures['macs_ratio']:.3f} of the dense student's",
    ]
    for name in (key for key in measured if key.startswith("batch_")):
        row = measured[name]
        lines.append(
            f"measured, {name.replace('_', ' ')}: {row['latency_s'] * 1e6:.1f} us (IQR {row['spread_s'] * 1e6:.1f}), "
            f"dense {row['dense_latency_s'] * 1e6:.1f} us, speed-up {row['speedup']:.2f}"
        )
    profile_us = measured["profile_latency_s"] * 1e6  # type: ignore[operator]
    lines.append(f"the cost profile had predicted {profile_us:.1f} us at batch {measured['profile_batch']}")
    if far:
        lines.append(
            f"note: in {len(far)} windows the policy saw something over {FAR:g} deviations from its training tasks; "
            "its choices there are guesses"
        )
    lines.append(f"student: {folder / 'student'}   figures: {folder / 'result.json'}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
