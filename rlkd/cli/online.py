"""`rlkd train --mode online`: distil one student while the agent learns from its windows."""

import logging
from pathlib import Path

import torch

from rlkd.agents.evaluation.held_out import TRAIN_STREAM, stream_seed
from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.controllers import hold_start
from rlkd.agents.ppo.online import OneRun, learn_online
from rlkd.cli.arguments import check_seed, new_parser, parse, policy_of
from rlkd.cli.outcome import print_outcome
from rlkd.cli.progress import Bar
from rlkd.compression import save_student
from rlkd.configs import OnlineConfig
from rlkd.cost import save_profile
from rlkd.envs.action import ControlConfig
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import build_scenario
from rlkd.io.journal import Journal
from rlkd.io.records import plain
from rlkd.runs.distil import TrainedStudent, check_shipped, compact_now, ship, write_student
from rlkd.runs.folder import describe_run, run_folder, use_one_thread
from rlkd.runs.outcome import RunLog, write_outcome

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Distil one student, keep the best one on the way, and print its figures."""
    parser = new_parser(
        "train --mode online",
        "Distil one student in one long training while PPO learns from its windows; the best on validation is kept.",
        [
            "--out runs/online",
            "--policy runs/first --num_windows 48 --preference.accuracy 0.9",
        ],
    )
    parser.add_argument("--policy", type=Path | None, default=None, help="bundle whose controls the agent changes")
    parser.add_argument("--out", type=Path | None, default=None, help="run folder; by default runs/online-TIME")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    config, options = parse(parser, argv, OnlineConfig)
    assert config is not None
    check_seed(options.seed)
    bundle = policy_of(options.policy) if options.policy else None
    config.check()
    use_one_thread()
    with run_folder(options.out, "online") as folder:
        return _online(config, bundle, options.seed, folder)


def _online(config: OnlineConfig, bundle: Bundle | None, seed: int, folder: Path) -> int:
    """Distil into `folder`; returns the exit code."""
    with Bar(config.train.steps_per_window) as bar:
        journal = Journal(folder)  # of the time alone: a run of this kind does not resume
        describe_run(folder, config, seed)
        controls, start = (bundle.policy.controls, bundle.policy.start) if bundle else (ControlConfig(), None)
        scenario = build_scenario(config.env(controls), start)
        save_profile(scenario.profile, folder / "cost_profile.json")
        bar.phase("distilling while the agent learns", 1, config.num_windows)
        watch = RunLog(folder, bundle, bar, journal, scenario=scenario)

        def on_window(row: dict[str, float], observation: torch.Tensor, episodes: Episodes) -> None:
            watch.window(row, observation)
            window = int(row["window"])
            if window % config.keep_every == 0:
                save_student(compact_now(episodes), folder / "students" / f"window-{window:04d}", {"window": row})

        base = bundle.policy.controller() if bundle else hold_start
        one = OneRun(scenario, base, seed, on_window)
        num_updates = learn_online(
            one, config.num_windows, config.agent, seed=stream_seed(seed, TRAIN_STREAM), logger=watch.logger
        )
    one.bring_back_best()
    done = ship(scenario, TrainedStudent(one.episodes, one.last, one.best_window, num_undone=0, num_held=0))
    done.figures.update(agent_updates=num_updates, num_windows=len(watch.u))
    watch.close(config, seed, done.figures)
    write_student(folder / "student", done, config.preference, bundle.digest if bundle else "")
    if one.diverged:
        logger.warning(f"the student diverged in window {len(watch.u)}; the one of window {one.best_window} is kept")
    weights, broken = config.preference.weights(), check_shipped(done.figures)
    task = plain(config.task)
    return print_outcome(write_outcome(folder, config, task, watch, done, weights=weights, broken=broken))
