"""`rlkd train`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from rlkd.agents.evaluation.trackers import parse_names, tracking
from rlkd.cli.arguments import add_run_options, add_workers_options, new_parser, workers_of
from rlkd.cli.progress import Bar, print_comparison, print_rows
from rlkd.cli.resume import is_finished, parse_run, resumable_folder
from rlkd.configs import ExperimentConfig
from rlkd.errors import UserError, closest
from rlkd.io.journal import Journal
from rlkd.runs.folder import new_folder, run_folder, use_one_thread
from rlkd.runs.seeds import COUNTED, parse_seeds, summarise
from rlkd.runs.train import train_experiment
from rlkd.runs.train_other import train_other_experiment
from rlkd.workers import WorkersConfig, open_workers

MODES = ("across", "online")  # over many students, or within the run of one


def run(argv: list[str]) -> int:
    """Train a policy and print how it compares; with `--mode online`, learn within one run."""
    mode, argv = take_mode(argv)
    if mode == "online":
        from rlkd.cli import online

        return online.run(argv)
    config, options = parse_run(_parser, argv, ExperimentConfig)
    config.check()
    use_one_thread()
    workers = workers_of(options, next((s.train.device for s in config.scenarios if s.train.device != "cpu"), "cpu"))
    if options.seeds is not None:
        return _several(config, options, workers)
    if config.agent.algorithm != "ppo":
        if workers.kind != "none":
            raise UserError(
                f"--workers: got {workers.kind} with agent.algorithm {config.agent.algorithm}; allowed: ppo"
            )
        return _other(config, options)
    with ExitStack() as stack:
        folder = stack.enter_context(resumable_folder(options, "train", options.out))
        bar = stack.enter_context(Bar(config.steps_per_window))
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints)
        if is_finished(folder, journal.finished):
            return 0
        stack.enter_context(tracking(parse_names(options.track), folder, config))
        who = stack.enter_context(open_workers(workers))
        result = train_experiment(config, folder, options.seed, bar, journal, who)
    return _print_result(result, folder)


def _other(config: ExperimentConfig, options: Namespace) -> int:
    """Train with another algorithm than PPO."""
    if options.resume is not None:
        raise UserError(f"--resume: got a run of {config.agent.algorithm}; allowed: one of ppo; start it anew")
    names = parse_names(options.track)
    with (
        run_folder(options.out, "train") as folder,
        Bar(config.steps_per_window) as bar,
        tracking(names, folder, config),
    ):
        result = train_other_experiment(config, folder, options.seed, bar)
    return _print_result(result, folder)


def _several(config: ExperimentConfig, options: Namespace, workers: WorkersConfig) -> int:
    """Train once a seed, each into a folder of its own, and print means and intervals over the seeds."""
    if options.resume is not None or config.agent.algorithm != "ppo":
        raise UserError("--seeds: got --resume or another algorithm than ppo, too; give the runs one by one")
    seeds, folder = parse_seeds(options.seeds), options.out or new_folder("train")
    results = {}
    for seed in seeds:
        names = parse_names(options.track)
        with (
            run_folder(folder / f"seed-{seed}", "train") as own,
            Bar(config.steps_per_window) as bar,
            tracking(names, own, config),
            open_workers(workers) as who,
        ):
            results[seed] = train_experiment(config, own, seed, bar, workers=who)
    summary = summarise(results, folder)
    console = Console(width=None if Console().is_terminal else 190)
    for goal, methods in summary["goals"].items():
        rows = [
            {"method": name, **{key: _with_interval(row[key]) if key in row else "" for key in COUNTED}}
            for name, row in methods.items()
        ]
        print_rows(console, f"{goal}: mean [95 %] over seeds {', '.join(map(str, seeds))}", rows)
    console.print(f"runs: {folder}/seed-*   summary: {folder / 'summary.json'}", highlight=False)
    return 0


def _with_interval(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['mean']:.4f} [{low:.4f}, {high:.4f}]"


def _print_result(result: dict[str, Any], folder: Path) -> int:
    """Print the tables of one run and where its files are."""
    console = Console(width=None if Console().is_terminal else 190)
    for entry in result["goals"]:
        title = f"{entry['name']}: {result['num_tasks']} held-out tasks ({entry['num_feasible']} feasible), test"
        print_comparison(console, title, entry)
    if "student" in result:
        student = result["student"]
        dense = student["measured"]["batch_64"]
        console.print(
            f"one clean student: accuracy {student['accuracy']:.4f} on test data, {student['validation_accuracy']:.4f} "
            f"on validation data, by which to choose (teacher {student['teacher_accuracy']:.4f}), with "
            f"{student['macs_ratio']:.3f} of the dense MACs; measured at batch 64: {dense['latency_s'] * 1e6:.1f} us, "
            f"dense {dense['dense_latency_s'] * 1e6:.1f} us (speed-up {dense['speedup']:.2f})",
            highlight=False,
        )
    cost = result["cost"]
    console.print(
        f"{cost['agent_trainings']} trainings for the agent, {cost['search_trainings']} for its start and "
        f"{cost['comparison_trainings']} for the comparison, {cost['wall_s']:.0f} s in all",
        highlight=False,
    )
    console.print(f"report: {folder / 'report.html'}   curves: tensorboard --logdir {folder}", highlight=False)
    if "policy_sha256" in result:
        policy = folder / "policy"
        console.print(f"policy: {policy}   next: rlkd distil --policy {policy}", highlight=False)
    return 0


def _parser() -> ArgumentParser:
    parser = new_parser(
        "train",
        "Learn a policy with PPO over a population of students; end with a table on held-out tasks, test data. With "
        "--mode online, one student alone, while it trains: `rlkd train --mode online --help` tells its options.",
        [
            "--out runs/first",
            "--config smoke",
            "--mode online --preference.accuracy 0.9",
            "--ppo.num_iterations 40 --task.label_noise.high 0.5 --seed 1",
            "--config default --seeds 0,1,2 --out runs/three",
            "--config smoke --agent.algorithm sac",
            "--workers processes --num_workers 8 --chunk_students 16",
            "--resume runs/first",
        ],
    )
    add_run_options(parser)
    add_workers_options(parser)
    text = "several seeds, such as 0,1,2: one run each in OUT/seed-N, and mean and interval of what they reach"
    parser.add_argument("--seeds", type=str | None, default=None, help=text)
    return parser


def take_mode(argv: list[str]) -> tuple[str, list[str]]:
    """Return the value of `--mode`, by default `across`, and the other options.

    Raises:
        UserError: another mode, or none behind the option.
    """
    mode, rest = "across", list(argv)
    for index, given in enumerate(argv):
        name, equals, value = given.partition("=")
        if name == "--mode":
            mode = value if equals else "".join(argv[index + 1 : index + 2])
            del rest[index : index + (1 if equals else 2)]
            break
    if mode not in MODES:
        raise UserError(f"--mode: got {mode!r}; allowed: {', '.join(MODES)}{closest(mode, MODES)}")
    return mode, rest
