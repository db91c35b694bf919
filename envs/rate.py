"""Range test: the step size of a real student's training, where the user gives none.

As Smith 2017 (https://arxiv.org/abs/1506.01186) it tries step sizes that rise by constant factors for a few steps and
reads the loss. Other than there, each begins anew from the same weights on the same batches, and the loss is read on
validation data: in one rising training, a later loss also depends on the steps before it. Step sizes whose losses are
close are tried again with more steps, because a few steps tell them apart by chance and favour small ones. A student
that begins trained has nothing to gain as a whole, so that the smallest step loses least; it is tried with half of its
units, too, because it must mend what it loses.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlkd.data import draw_task
from rlkd.envs.action import decode, published_setting, with_values
from rlkd.errors import UserError
from rlkd.students import Controls, Students

if TYPE_CHECKING:
    from rlkd.envs.real import RealScenario

RATES = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)  # of Adam; steps of about three
NUM_STEPS = 24
LITTLE = 0.95  # a student whose best loss is above this share of its first one begins trained
CLOSE = 1.05  # times the least loss: step sizes up to there are tried again
LONGER = 3  # times NUM_STEPS, for step sizes that are close
logger = logging.getLogger(__name__)


def with_learning_rate(scenario: "RealScenario", seed: int) -> "RealScenario":
    """Return the scenario with a step size: its own, or the one of RATES with the least validation loss.

    The student trains NUM_STEPS steps under the published setting, dense, for each; its weights are put back. For a
    student that begins trained, the mean of that loss and of the one with half of the units counts. Where several step
    sizes have at most CLOSE times the least loss, trainings LONGER times as long decide among them.

    Args:
        scenario: its `train.learning_rate` is 0 where a step size is wanted.
        seed: of exits, adapters and batches.

    Raises:
        UserError: every step size diverges.
    """
    config = scenario.config
    if config.train.learning_rate > 0:
        return scenario
    losses, shares = {rate: _loss_after(scenario, rate, seed) for rate in RATES}, [1.0]
    if LITTLE * _loss_before(scenario, seed) < min(losses.values()) < math.inf:
        losses = {rate: (loss + _loss_after(scenario, rate, seed, unit_keep=0.5)) / 2 for rate, loss in losses.items()}
        shares.append(0.5)
    least = min(losses.values())
    if not math.isfinite(least):
        raise UserError(
            f"train.learning_rate: none of {', '.join(f'{rate:g}' for rate in RATES)} gives a finite loss within "
            f"{NUM_STEPS} steps; check the model and the data, or give one"
        )
    close = {rate: loss for rate, loss in losses.items() if loss <= CLOSE * least}
    how = (
        f"{NUM_STEPS} steps{' of the whole student and half of its units' if len(shares) > 1 else ''} ({_list(losses)}"
    )
    if len(close) > 1:
        steps = LONGER * NUM_STEPS
        for rate in close:
            again = [_loss_after(scenario, rate, seed, unit_keep=share, num_steps=steps) for share in shares]
            close[rate] = sum(again) / len(again)
        how += f"; after {steps} steps {_list(close)}"
    best = min(close, key=lambda rate: close[rate])
    logger.info("learning rate: %g, by validation loss after %s)", best, how)
    train = dataclasses.replace(config.train, learning_rate=best)
    return dataclasses.replace(scenario, config=dataclasses.replace(config, train=train))


def _list(losses: Mapping[float, float]) -> str:
    return ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())


def _loss_before(scenario: "RealScenario", seed: int) -> float:
    """Return the validation loss of the last exit before any step."""
    students, controls = _begin(scenario, RATES[0], seed)
    students.set_controls(controls)
    return float(students.evaluate("validation").exit_loss[0, -1])


def _loss_after(
    scenario: "RealScenario", rate: float, seed: int, *, unit_keep: float = 1.0, num_steps: int = NUM_STEPS
) -> float:
    """Return the validation loss of the last exit after a training with a share of units; inf if it diverges."""
    students, controls = _begin(scenario, rate, seed, unit_keep=unit_keep, num_steps=num_steps)
    telemetry = students.train_window(controls)
    loss = float(students.evaluate("validation").exit_loss[0, -1])
    return loss if math.isfinite(loss) and not telemetry.diverged.any() else math.inf


def _begin(
    scenario: "RealScenario", rate: float, seed: int, *, unit_keep: float = 1.0, num_steps: int = NUM_STEPS
) -> tuple[Students, Controls]:
    """Return the student as it begins, and the published setting with a share of its units."""
    config = scenario.config
    train = dataclasses.replace(config.train, learning_rate=rate, steps_per_window=num_steps, max_rollbacks=0)
    start = published_setting(config.controls)
    short = dataclasses.replace(scenario, start=start, config=dataclasses.replace(config, train=train, num_windows=1))
    students = short.students(1)
    students.reset([draw_task(seed, config.task, scenario.data, len(scenario.signals.accuracy))])
    u = with_values(start[None], {"unit_keep": unit_keep}, config.controls)
    return students, decode(u, config.controls, scenario.data.num_classes)
