"""`rlkd train`."""

from jsonargparse import ArgumentParser
from rich.console import Console

from rlkd.cli.arguments import add_run_options, closest, new_parser
from rlkd.cli.progress import Bar, print_comparison
from rlkd.cli.resume import is_finished, parse_run, resumable_folder
from rlkd.configs import ExperimentConfig
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.runs.folder import use_one_thread
from rlkd.runs.train import train_experiment

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
    with resumable_folder(options, "train", options.out) as folder, Bar(config.steps_per_window) as bar:
        journal = Journal(folder, options.resume is not None, config.keep_checkpoints)
        if is_finished(folder, journal.finished):
            return 0
        result = train_experiment(config, folder, options.seed, bar, journal)
    console = Console(width=None if Console().is_terminal else 190)
    for entry in result["goals"]:
        title = f"{entry['name']}: {result['num_tasks']} held-out tasks ({entry['num_feasible']} feasible), test"
        print_comparison(console, title, entry)
    student = result["student"]
    dense = student["measured"]["batch_64"]
    console.print(
        f"one clean student: accuracy {student['accuracy']:.4f} on test data, {student['validation_accuracy']:.4f} on "
        f"validation data, by which to choose (teacher {student['teacher_accuracy']:.4f}), with "
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
    console.print(f"policy: {folder / 'policy'}   next: rlkd distil --policy {folder / 'policy'}", highlight=False)
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
            "--resume runs/first",
        ],
    )
    add_run_options(parser)
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
