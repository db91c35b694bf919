"""Write to TensorBoard what stable-baselines3 does not write itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure as Canvas
from stable_baselines3.common.logger import HParam, Logger, TensorBoardOutputFormat, configure
from torch import Tensor

from rlkd.agents.evaluation import trackers
from rlkd.agents.policy.controllers import Controller, run
from rlkd.agents.ppo.evaluation import Evaluation
from rlkd.agents.ppo.train import Rollout
from rlkd.envs.action import CONTROLS
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.io.records import flatten, plain

_STUDENT = ("score", "accuracy", "latency_ratio", "energy_ratio", "macs_ratio", "num_diverged", "num_rollbacks")
_GOAL = ("goal_met", "shortfall", "margin")
_ALONE = (
    *_STUDENT,
    "margin",
    "floor",
    "size_ratio",
    "first_exit_rate",
    "num_undone",
    "num_held",
    "distance_from_training",
)


def new_logger(folder: Path) -> Logger:
    """Return a stable-baselines3 logger that writes event files only."""
    made = configure(str(folder), ["tensorboard"])
    made.output_formats += trackers.outputs()
    return made


def record_rollout(logger: Logger, rollout: Rollout, updates_per_s: float) -> None:
    """Figures of one iteration under `student/`, `action/`, `reward/`; SB3 writes them with its own."""
    for name, value in rollout.figures.items():
        if name in (*_STUDENT, *_GOAL):
            logger.record(f"student/{name}", value)
        elif name.startswith("action/"):
            logger.record(name, value)
        elif name == "return":
            logger.record("reward/return", value)
    logger.record("student/num_trainings", rollout.num_trainings)
    logger.record("student/updates_per_s", updates_per_s)


def record_evaluation(logger: Logger, evaluation: Evaluation, num_steps: int) -> None:
    """Write an evaluation under `eval/`, at as many environment steps as PPO had taken."""
    writer = _writer(logger)
    values = {f"eval/{name}": value for name, value in asdict(evaluation).items() if name != "iteration"}
    for name, value in values.items():
        writer.add_scalar(name, value, num_steps)
    for output in logger.output_formats:
        if isinstance(output, trackers.TrackerOutput):
            output.write(values, {}, num_steps)
    writer.flush()  # a state of the run that is saved now knows how long the file is


def write_config(logger: Logger, config: Any) -> None:
    """Write the resolved config as text."""
    text = yaml.safe_dump(plain(config), sort_keys=False)
    _writer(logger).add_text("config", "\n".join("    " + line for line in text.splitlines()), 0)


def write_controls(logger: Logger, scenario: Scenario, controller: Controller, seeds: Sequence[int]) -> None:
    """Write a plot of the controls over an episode: mean and spread over held-out tasks."""
    seen: list[Tensor] = []

    def recorded(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = controller(observation, episodes, window)
        seen.append(u)
        return u

    run(scenario, recorded, seeds, scenario.config.task, final_split="validation")
    write_controls_figure(logger, torch.stack(seen))


def write_controls_figure(logger: Logger, u: Tensor) -> None:
    """Write the figure of `controls_figure` for unit controls [windows, tasks, 12]."""
    _writer(logger).add_figure("controls", controls_figure(u.numpy()), 0)


def record_window(logger: Logger, row: dict[str, float]) -> None:
    """Write one window of one student: unit controls under `action/`, their values under `controls/`, and metrics."""
    for name, value in row.items():
        if name.startswith("u_"):
            logger.record(f"action/{name.removeprefix('u_')}", value)
        elif name in _ALONE:
            logger.record(f"student/{name}", value)
        elif name != "window":
            logger.record(f"controls/{name}", value)
    logger.dump(int(row["window"]))


def controls_figure(u: np.ndarray) -> Canvas:
    """One panel a control for unit controls [windows, tasks, 12]: mean line, band of one deviation."""
    figure = Canvas(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(3, 4, sharex=True, sharey=True)
    windows = np.arange(1, len(u) + 1)
    for axis, name, values in zip(axes.flat, CONTROLS, np.moveaxis(u, 2, 0), strict=True):
        mean, deviation = values.mean(1), values.std(1)
        axis.fill_between(windows, mean - deviation, mean + deviation, alpha=0.2, color="#1f5fa8")
        axis.plot(windows, mean, color="#1f5fa8")
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.05, 1.05)
    figure.supxlabel("window")
    figure.supylabel("unit control")
    return figure


def write_outcome(logger: Logger, config: Any, seed: int, result: dict[str, Any]) -> None:
    """Write the hyperparameters of a `train` run with its final test score and leads."""
    metrics = {"test_score": result["methods"]["policy"]["score"]["mean"]}
    metrics |= {name: row["difference"] for name, row in result["paired"].items()}
    write_hparams(logger, config, seed, metrics=metrics, step=result["cost"]["agent_trainings"])


def write_hparams(logger: Logger, config: Any, seed: int, *, metrics: Mapping[str, float], step: int) -> None:
    """Write hyperparameters with metrics for TensorBoard's HPARAMS tab, which reads the metrics as scalars."""
    flat = {"seed": seed, **flatten(plain(config))}
    hparams = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items()}
    named = {f"hparam/{name}": value for name, value in metrics.items()}
    logger.record("hparams", HParam(hparams, named), exclude=("stdout", "log", "json", "csv"))
    for name, value in named.items():
        logger.record(name, value)
    logger.dump(step)


def _writer(logger: Logger) -> Any:
    return next(f.writer for f in logger.output_formats if isinstance(f, TensorBoardOutputFormat))
