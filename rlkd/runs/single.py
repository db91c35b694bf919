"""Distil one student into a run folder: a chain, a transformers model, or a user's own module."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rlkd.agents.policy.bundle import Bundle
from rlkd.compression.real.student_folder import save_module_student
from rlkd.configs import DistilConfig
from rlkd.cost import save_profile
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig
from rlkd.envs.scenario import build_scenario
from rlkd.io.files import write_whole
from rlkd.io.journal import Journal
from rlkd.io.records import plain
from rlkd.runs.distil import TrainedStudent, check_shipped, distil, run_windows, student_card, write_student
from rlkd.runs.distil_real import check_shipped_module, gather, ship_module
from rlkd.runs.folder import Progress
from rlkd.runs.goals import dense_accuracies, with_goal
from rlkd.runs.outcome import Outcome, RunLog, Show, check_goal, write_outcome
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile

logger = logging.getLogger(__name__)


class TrainedScenario(NamedTuple):
    """A student at the end of its training."""

    scenario: RealScenario  # under the goal
    trained: TrainedStudent
    watch: RunLog
    dense: Tensor | None  # [2], as of `check_goal`


PACKAGES = ("transformers", "tokenizers", "pyarrow")  # that a run on a transformers model uses


def distil_chain(
    config: DistilConfig,
    bundle: Bundle,
    folder: Path,
    seed: int,
    *,
    progress: Progress,
    journal: Journal | None = None,
    show: Show = lambda found: None,
    options: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Outcome:
    """Distil a small chain of layers on a data set that rlkd knows.

    Args:
        config: of the run.
        bundle: the policy.
        folder: of the run; it holds everything afterwards, the student in `student/`.
        seed: of task, first weights and batches.
        progress: told of every window.
        journal: of a run that goes on; by default a new one.
        show: as of `check_goal`.
        options: other options of the command, which resuming needs.
        command: content of `command.txt`; by default the command line.

    Raises:
        UserError: an impossible configuration or goal.
    """
    journal = journal or Journal(folder, False, config.keep_checkpoints)
    describe(journal, folder, config, seed, options=options, command=command)
    env = with_own_profile(config.env(bundle.policy.controls), folder)
    scenario = build_scenario(env, bundle.policy.start)
    scenario = with_goal(scenario, config.goal, config.preference)
    save_profile(scenario.profile, folder / f"{PROFILE}.json")
    remember(journal, "distil", scenario.tensors(), costs=plain(scenario.profile), policy=bundle.digest)
    dense = check_goal(scenario, config.goal, seed, journal, show)
    progress.phase("distilling", 1, config.num_windows)
    watch = RunLog(folder, bundle, progress, journal, scenario=scenario)
    done = distil(scenario, bundle.policy.controller(), seed, watch.window, journal, config.guard)
    watch.close(config, seed, done.figures)
    weights = config.goal.weights(config.preference)
    write_student(folder / "student", done, weights, bundle.digest)
    broken = check_shipped(done.figures)
    if dense is None:
        logger.info("training the dense student, too, for the report")
        dense = dense_accuracies(scenario, seed)
    return write_outcome(folder, config, plain(config.task), watch, done, weights=weights, dense=dense, broken=broken)


def pretrained_scenario(
    config: RealConfig,
    bundle: Bundle,
    folder: Path,
    seed: int,
    *,
    journal: Journal,
    options: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> RealScenario:
    """Load the models and data of a config for `train_scenario`; arguments and errors as of `distil_chain`."""
    describe(journal, folder, config, seed, PACKAGES, options, command)
    controls, start = bundle.policy.controls, bundle.policy.start
    return build_real_scenario(with_own_profile(config, folder), controls, start, seed)


def train_scenario(
    scenario: RealScenario,
    config: RealConfig,
    bundle: Bundle,
    folder: Path,
    seed: int,
    *,
    progress: Progress,
    journal: Journal,
    show: Show = lambda found: None,
) -> TrainedScenario:
    """Train the student of a scenario whose models are loaded; arguments and errors as of `distil_chain`."""
    scenario = with_goal(scenario, config.goal, config.preference)
    write_whole(folder / "mapping.txt", f"{scenario.tables}\n{scenario.report}")
    logger.info(scenario.tables)
    if not (folder / f"{PROFILE}.json").exists():
        scenario.profile.save(folder / f"{PROFILE}.json")
    remember(journal, "distil --data", scenario.tensors(), policy=bundle.digest)
    dense = check_goal(scenario, config.goal, seed, journal, show)
    progress.phase("distilling", 1, config.num_windows)
    watch = RunLog(folder, bundle, progress, journal, scenario=scenario)
    trained = run_windows(scenario, bundle.policy.controller(), seed, watch.window, journal, config.guard)
    gather(trained)
    return TrainedScenario(scenario, trained, watch, dense)


def ship_scenario(learned: TrainedScenario, config: RealConfig, bundle: Bundle, folder: Path, seed: int) -> Outcome:
    """Evaluate, cut, time and write the student of `train_scenario`; further arguments as there."""
    scenario, trained, watch, dense = learned
    done = ship_module(scenario, trained)
    watch.close(config, seed, done.figures)
    weights = config.goal.weights(config.preference)
    prepared = "arrays as they are given" if scenario.processor is None else "as the processor in model/ prepares them"
    card = {**student_card(done.figures, weights, bundle.digest), "input_scale": prepared}
    card["inputs"] = scenario.data.shape_of_texts()
    save_module_student(done.student, folder / "student", scenario.processor, card)
    task = {"data": config.data, "teacher": config.teacher, "student": config.student, "kind": scenario.kind}
    task["splits"] = "given" if scenario.has_given_splits else "cut by rlkd"
    broken = check_shipped_module(done.figures, scenario)
    return write_outcome(folder, config, task, watch, done, weights=weights, dense=dense, broken=broken)
