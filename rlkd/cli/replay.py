"""`rlkd replay`: on a student that is a chain, or, with `--data`, on a real model (`rlkd.cli.replay_models`)."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.policy.bundle import Bundle, load_bundle
from rlkd.cli.arguments import add_run_options, new_parser
from rlkd.cli.configfile import MAX_CONFIG_BYTES, plain_yaml
from rlkd.cli.progress import Bar
from rlkd.cli.resume import is_finished, parse_run, resumable_folder, resumed
from rlkd.compression.real.trial import TOLERANCE
from rlkd.configs import ReplayConfig
from rlkd.cost import save_profile
from rlkd.envs.action import CONTROLS
from rlkd.envs.scenario import build_scenario
from rlkd.errors import UserError
from rlkd.io.files import read_bytes
from rlkd.io.journal import Journal
from rlkd.io.records import JsonLines, plain, write_json
from rlkd.runs.distil import distil, write_student
from rlkd.runs.folder import use_one_thread
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile

FAR = 5.0  # training deviations; a bundle's own tasks stay below this nearly always


def run(argv: list[str]) -> int:
    """Distil one student, write it, and print its figures."""
    if any(given.split("=")[0] == "--data" for given in argv) or _is_of_real_model(resumed(argv)):
        from rlkd.cli import replay_models

        return replay_models.run(argv)
    for name in ("--teacher", "--student"):
        if any(given.split("=")[0] == name for given in argv):
            raise UserError(f"{name}: names a real model, which needs --data FILE_OR_FOLDER, too")
    config, options = parse_run(_parser, argv, ReplayConfig)
    bundle = load_bundle(options.policy)
    config.check()
    use_one_thread()
    with resumable_folder(options, "replay", options.out) as folder:
        return _replay(config, bundle, options, folder)


def _parser() -> ArgumentParser:
    parser = new_parser(
        "replay",
        "Distil a new student under a frozen policy, in one training run. With --data, a real model: "
        "`rlkd replay --data FILE --help` tells its options.",
        [
            "--policy runs/first/policy",
            "--policy runs/first/policy --preference.accuracy 0.9 --student.widths [96,64,32] --student.exits [1,2]",
            "--policy runs/first/policy --config conv",
            "--policy runs/first/policy --teacher models/bert --data reviews.csv --cut.layers 2",
            "--resume runs/mine",
        ],
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy bundle")
    add_run_options(parser)
    return parser


def _is_of_real_model(folder: Path | None) -> bool:
    """Whether the run in the folder began with `--data`."""
    if folder is None or not (folder / "config.yaml").is_file():
        return False
    tree = plain_yaml(read_bytes(folder / "config.yaml", MAX_CONFIG_BYTES).decode(errors="replace"), "--resume")
    return isinstance(tree, dict) and "data" in tree


def _replay(config: ReplayConfig, bundle: Bundle, options: Namespace, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    with Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints, bar.say)
        if is_finished(folder, journal.finished):
            return 0
        describe(journal, folder, config, options.seed, bar.say, options={"policy": str(options.policy)})
        env = with_own_profile(config.env(bundle.policy.controls), folder)
        scenario = build_scenario(env, bundle.policy.plan, bar.say)
        save_profile(scenario.profile, folder / f"{PROFILE}.json")
        remember(journal, "replay", scenario.tensors(), costs=plain(scenario.profile), policy=bundle.digest)
        bar.phase("distilling", 1, config.num_windows)
        watch = Watch(folder, bundle, bar, journal)
        done = distil(scenario, bundle.policy.controller(), options.seed, watch.window, journal)
        watch.close(config, options.seed, done.figures)
    write_student(folder / "student", done, config.preference, bundle.digest)
    return finish(folder, config, plain(config.task), watch, done.figures, done.measured, done.diverged)


class Watch:
    """What is written of every window while a student trains."""

    def __init__(self, folder: Path, bundle: Bundle | None, bar: Bar, journal: Journal) -> None:
        self.positions: list[list[float]] = []
        self.far: dict[int, float] = {}
        self.journal = journal
        self._metrics = JsonLines(folder / "metrics.jsonl", journal)
        self.logger = tb.new_logger(folder / "tensorboard")
        self._bundle, self._bar = bundle, bar

    def window(self, row: dict[str, float], observation: torch.Tensor) -> None:
        """Write one window's row, and remember how far its observation [1, O] is from the policy's training."""
        self._metrics.write(row)
        self.positions.append([row[f"position_{name}"] for name in CONTROLS])
        distance = float(self._bundle.policy.spread_of(observation)[0]) if self._bundle else 0.0
        if distance > FAR:
            self.far[int(row["window"])] = distance
        if not self.journal.replaying:
            tb.record_window(self.logger, row)
        self._bar.advance(1)
        self._bar.figures(score=row["score"], accuracy=row["accuracy"], macs_ratio=row["macs_ratio"])

    def close(self, config: Any, seed: int, figures: Mapping[str, Any]) -> None:
        """End the event file with the config and how the student did."""
        tb.write_config(self.logger, config)
        tb.write_position_figure(self.logger, torch.tensor(self.positions)[:, None])
        named = {"test_score": "score", "test_accuracy": "accuracy"}
        named |= {name: name for name in ("validation_score", "validation_accuracy")}
        metrics = {name: figures[key] for name, key in named.items()}
        tb.write_hparams(self.logger, config, seed, metrics, len(self.positions))
        self.logger.close()


def finish(
    folder: Path,
    config: Any,
    task: Any,
    watch: Watch,
    figures: dict[str, Any],
    measured: dict[str, Any],
    diverged: bool,
) -> int:
    """Write result.json and report.html, print the figures, and give the exit code."""
    wall_s = watch.journal.elapsed_s()
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
            "methods": {"policy": {**figures, "trainings_per_task": 1.0}},
            "paired": {},
            "measured": measured,
            "far_from_training": watch.far,
            "cost": {"agent_trainings": 0, "wall_s": wall_s, "updates_per_s": updates / wall_s},
        },
    )
    write_report([read_run(folder)], folder)
    watch.journal.finish()
    _report(Console(), folder, figures, measured, watch.far)
    if diverged:
        print(f"rlkd: the student diverged in window {len(watch.positions)}; do not ship it", file=sys.stderr)
    difference = figures.get("shipped_difference", 0.0)
    if difference > TOLERANCE:
        print(
            f"rlkd: the shipped student answers otherwise than the trained one, by {difference:.1e} of its largest "
            "answer; do not ship it",
            file=sys.stderr,
        )
    return 1 if diverged or difference > TOLERANCE else 0


def _report(
    console: Console,
    folder: Path,
    figures: dict[str, float],
    measured: dict[str, dict[str, float]],
    far: dict[int, float],
) -> None:
    lines = [
        f"validation, by which to choose among runs: J {figures['validation_score']:.4f}, accuracy "
        f"{figures['validation_accuracy']:.4f}",
        f"test, to report once and not to choose by: J {figures['score']:.4f}, accuracy {figures['accuracy']:.4f} "
        f"(teacher {figures['teacher_accuracy']:.4f}), MACs {figures['macs_ratio']:.3f} of the dense student's",
    ]
    if "perplexity" in figures:
        lines.append(
            f"perplexity {figures['perplexity']:.2f} (teacher {figures['teacher_perplexity']:.2f}), next token right "
            f"{figures['next_token_accuracy']:.4f} (teacher {figures['teacher_next_token_accuracy']:.4f}); accuracy "
            "above is that perplexity between the anchors in mapping.txt"
        )
    for name in (key for key in measured if key.startswith("batch_")):
        row = measured[name]
        lines.append(
            f"measured on {row['threads']} thread, {name.replace('_', ' ')}: {row['latency_s'] * 1e6:.1f} us "
            f"(IQR {row['spread_s'] * 1e6:.1f}, 95th percentile {row['p95_s'] * 1e6:.1f}), dense "
            f"{row['dense_latency_s'] * 1e6:.1f} us, speed-up {row['speedup']:.2f}"
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
