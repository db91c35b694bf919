"""`rlkd replay`: on a student that is a chain, or, with `--data`, on a real model (`rlkd.cli.replay_models`)."""

import sys
import time
from pathlib import Path
from typing import Any

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
from rlkd.errors import UserError

FAR = 5.0  # training deviations; a bundle's own tasks stay below this nearly always


def run(argv: list[str]) -> int:
    """Distil one student, write it, and print its figures."""
    if any(given.split("=")[0] == "--data" for given in argv):
        from rlkd.cli import replay_models

        return replay_models.run(argv)
    for name in ("--teacher", "--student"):
        if any(given.split("=")[0] == name for given in argv):
            raise UserError(f"{name}: names a real model, which needs --data FILE_OR_FOLDER, too")
    parser = new_parser(
        "replay",
        "Distil a new student under a frozen policy, in one training run. With --data, a real model: "
        "`rlkd replay --data FILE --help` tells its options.",
        [
            "--policy runs/first/policy",
            "--policy runs/first/policy --preference.accuracy 0.9 --student.widths [96,64,32] --student.exits [1,2]",
            "--policy runs/first/policy --config conv",
            "--policy runs/first/policy --teacher models/bert --data reviews.csv --cut.layers 2",
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
    with Bar(config.train.steps_per_window) as bar:
        world = build_world(config.env(bundle.policy.controls), bundle.policy.plan, bar.say)
        save_profile(world.profile, folder / "cost_profile.json")
        bar.phase("distilling", 1, config.num_windows)
        watch = Watch(folder, bundle, bar)
        done = distil(world, bundle.policy.controller(), seed, watch.window)
        watch.close(config)
    write_student(folder / "student", done, config.preference, bundle.digest)
    return finish(folder, config, plain(config.task), watch, done.figures, done.measured, done.diverged, began)


class Watch:
    """What is written of every window while a student trains."""

    def __init__(self, folder: Path, bundle: Bundle, bar: Bar) -> None:
        self.positions: list[list[float]] = []
        self.far: dict[int, float] = {}
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._logger = tb.new_logger(folder / "tensorboard")
        self._bundle, self._bar = bundle, bar

    def window(self, row: dict[str, float], observation: torch.Tensor) -> None:
        """Write one window's row, and remember how far its observation [1, O] is from the policy's training."""
        self._metrics.write(row)
        self.positions.append([row[f"position_{name}"] for name in CONTROLS])
        distance = float(self._bundle.policy.spread_of(observation)[0])
        if distance > FAR:
            self.far[int(row["window"])] = distance
        tb.record_window(self._logger, row)
        self._bar.figures(score=row["score"], accuracy=row["accuracy"], macs_ratio=row["macs_ratio"])
        self._bar.advance(1)

    def close(self, config: Any) -> None:
        """End the event file."""
        tb.write_config(self._logger, config)
        tb.write_position_figure(self._logger, torch.tensor(self.positions)[:, None])
        self._logger.close()


def finish(
    folder: Path,
    config: Any,
    task: Any,
    watch: Watch,
    figures: dict[str, Any],
    measured: dict[str, Any],
    diverged: bool,
    began: float,
) -> int:
    """Write result.json and report.html, print the figures, and give the exit code."""
    wall_s = time.perf_counter() - began
    updates = config.num_windows * config.train.steps_per_window
    write_json(
        folder / "result.json",
        {
            "schema": 1,
            "task": task,
            "split": "test",
            "num_tasks": 1,
            "num_seeds": 1,
            "preference": dict(zip(("accuracy", "latency", "energy"), config.preference.weights(), strict=True)),
            "methods": {"policy": {**figures, "num_diverged": int(diverged), "trainings_per_task": 1.0}},
            "paired": {},
            "measured": measured,
            "far_from_training": watch.far,
            "cost": {"agent_trainings": 0, "wall_s": wall_s, "updates_per_s": updates / wall_s},
        },
    )
    write_report([read_run(folder)], folder)
    _report(Console(), folder, figures, measured, watch.far)
    if diverged:
        print(f"rlkd: the student diverged in window {len(watch.positions)}; do not ship it", file=sys.stderr)
    return 1 if diverged else 0


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
    if figures["num_rollbacks"]:
        lines.append(
            f"note: {figures['num_rollbacks']} windows were undone, since their numbers were not finite; the student "
            "went on with smaller steps"
        )
    lines.append(f"student: {folder / 'student'}   figures: {folder / 'result.json'}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
