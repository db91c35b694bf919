"""`rlkd tune`: search PPO's hyperparameters with Optuna on the validation scenarios of an experiment."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from rlkd.agents.baselines.search import search_setting
from rlkd.agents.evaluation.held_out import SEARCH_STREAM, TRAIN_STREAM, stream_seed
from rlkd.agents.policy.controllers import RunOptions
from rlkd.agents.ppo.evaluation import Evaluation
from rlkd.agents.ppo.train import Listeners, PPOConfig, train
from rlkd.configs.schema import ExperimentConfig
from rlkd.envs.scenario import Scenario
from rlkd.errors import UserError
from rlkd.io.files import write_whole
from rlkd.io.records import plain
from rlkd.runs.folder import Progress
from rlkd.runs.train import built

logger = logging.getLogger(__name__)

STUDY = "ppo"
PROFILE = "cost_profile"
WARM_UP = 3  # trials before the pruner stops any


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    ppo: PPOConfig  # of the best trial
    score: float  # its best mean score on the validation scenarios
    num_trials: int  # all, earlier calls included
    num_pruned: int


def suggest(trial: optuna.Trial, ppo: PPOConfig) -> PPOConfig:
    """Draw PPO's hyperparameters; numbers of students, tasks and iterations stay."""
    return dataclasses.replace(
        ppo,
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        num_epochs=trial.suggest_int("num_epochs", 2, 16),
        batch_size=trial.suggest_categorical("batch_size", [128, 256, 512, 1024]),
        gae_lambda=trial.suggest_float("gae_lambda", 0.8, 1.0),
        clip_range=trial.suggest_float("clip_range", 0.1, 0.3),
        hidden=trial.suggest_categorical("hidden", [32, 64, 128]),
        initial_log_std=trial.suggest_float("initial_log_std", -1.6, -0.4),
        final_log_std=trial.suggest_float("final_log_std", -3.0, -1.8),
    )


def tune(config: ExperimentConfig, folder: Path, seed: int, num_trials: int, progress: Progress) -> Tuned:
    """Search until the study in `folder` has `num_trials` trials; an interrupted search goes on with the same call.

    Args:
        config: with validation scenarios, which score the trials; test data are not read.
        folder: holds `study.log` (Optuna's journal storage) and `best.yaml`, which `rlkd train --config` takes.
        seed: of the sampler and of every trial's training.
        num_trials: in all.
        progress: told of every window.

    Raises:
        UserError: no validation scenario, or a number of trials below 1.
    """
    config.check()
    if not config.validation:
        raise UserError("validation: got no scenario; allowed: at least one, which the trials are scored on")
    if num_trials < 1:
        raise UserError(f"--num_trials: got {num_trials}; allowed: at least 1")
    scenarios = built(config.envs(config.scenarios), PROFILE, folder)
    validation = built(config.envs(config.validation), f"{PROFILE}_validation", folder)
    scenarios, validation = _started(config, scenarios, validation, seed, progress)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name=STUDY,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=WARM_UP),
        load_if_exists=True,
    )

    def objective(trial: optuna.Trial) -> float:
        ppo, scores = suggest(trial, config.ppo), []

        def on_evaluation(evaluation: Evaluation) -> None:
            scores.append(evaluation.score)
            trial.report(max(scores), evaluation.iteration)
            if trial.should_prune():
                raise optuna.TrialPruned

        progress.phase(f"trial {trial.number + 1} of {num_trials}", ppo.num_iterations * ppo.num_students, 1)
        train(
            scenarios,
            ppo,
            stream_seed(seed, TRAIN_STREAM),
            listeners=Listeners(progress.advance, lambda rollout, log: None, on_evaluation),
            validation=validation,
        )
        logger.info("trial %d: best score on validation %.4f", trial.number + 1, max(scores))
        return max(scores)

    done = len([t for t in study.trials if t.state.is_finished()])
    study.optimize(objective, n_trials=max(0, num_trials - done))
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    best = suggest(optuna.trial.FixedTrial(study.best_params), config.ppo)  # type: ignore[arg-type]
    content = plain(dataclasses.replace(config, ppo=best))
    comment = f"# The experiment with PPO's hyperparameters of the best of {len(study.trials)} trials of rlkd tune.\n"
    write_whole(folder / "best.yaml", comment + yaml.safe_dump(content, sort_keys=False))
    return Tuned(best, study.best_value, len(study.trials), len(pruned))


def _started(
    config: ExperimentConfig,
    scenarios: Sequence[Scenario],
    validation: Sequence[Scenario],
    seed: int,
    progress: Progress,
) -> tuple[list[Scenario], list[Scenario]]:
    """Return the scenarios with the best constant setting as their start."""

    generator = torch.Generator().manual_seed(stream_seed(seed, SEARCH_STREAM))
    progress.phase("best constant setting", config.search.num_trainings, 1)
    options = RunOptions(on_window=progress.advance)
    start = search_setting(scenarios, config.search, generator, options=options)
    groups: Any = ([dataclasses.replace(s, start=start) for s in group] for group in (scenarios, validation))
    first, second = groups
    return first, second
