"""Range test: the step size of a real student's training, where the user gives none.

As Smith 2017 (https://arxiv.org/abs/1506.01186) it tries step sizes that rise by constant factors for a few steps and
reads the loss. Other than there, each begins anew from the same weights on the same batches, and the loss is read on
validation data: in one rising training, a later loss also depends on the steps before it. Step sizes whose losses are
close are tried again on other batches, because a few steps differ by that much from chance. A student that begins
trained has nothing to gain as a whole, so that the smallest step loses least; it is tried with half of its units, too,
because it must mend what it loses.
"""

import dataclasses
import logging
import math
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
NUM_TRIES = 3  # of a step size that is close
logger = logging.getLogger(__name__)


def with_learning_rate(scenario: "RealScenario", seed: int) -> "RealScenario":
    """Return the scenario with a step size: its own, or the one of RATES with the least validation loss.

    The student trains NUM_STEPS steps under the published setting, dense, for each; its weights are put back. For a
    student that begins trained, the mean of that loss and of the one with half of the units counts. Step sizes with at
    most CLOSE times the least loss are tried NUM_TRIES times on other batches, and the mean decides among them.

    Args:
        scenario: its `train.learning_rate` is 0 where a step size is wanted.
        seed: of exits, adapters and batches.

    Raises:
        UserError: every step size diverges.
    """
    config = scenario.config
    if config.train.learning_rate > 0:
        return scenario
    shares = [1.0]
    losses = {rate: _loss_after(scenario, rate, seed) for rate in RATES}
    if LITTLE * _loss_before(scenario, seed) < min(losses.values()) < math.inf:
        shares.append(0.5)
        losses = {rate: (loss + _loss_after(scenario, rate, seed, unit_keep=0.5)) / 2 for rate, loss in losses.items()}
    least = min(losses.values())
    if not math.isfinite(least):
        raise UserError(
            f"train.learning_rate: none of {', '.join(f'{rate:g}' for rate in RATES)} gives a finite loss within "
            f"{NUM_STEPS} steps; check the model and the data, or give one"
        )
    close = [rate for rate, loss in losses.items() if loss <= CLOSE * least]
    how = " of the whole student and half of its units" if len(shares) > 1 else ""
    if len(close) > 1:
        tries = [(share, number) for number in range(1, NUM_TRIES) for share in shares]
        for rate in close:
            more = [_loss_after(scenario, rate, seed, unit_keep=share, number=number) for share, number in tries]
            losses[rate] = (losses[rate] + sum(more) / len(shares)) / NUM_TRIES
        how += f", for {' and '.join(f'{rate:g}' for rate in close)} the mean of {NUM_TRIES} tries"
    best = min(close, key=lambda rate: losses[rate])
    tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    logger.info("learning rate: %g, by validation loss after %d steps%s (%s)", best, NUM_STEPS, how, tried)
    train = dataclasses.replace(config.train, learning_rate=best)
    return dataclasses.replace(scenario, config=dataclasses.replace(config, train=train))


def _loss_before(scenario: "RealScenario", seed: int) -> float:
    """Return the validation loss of the last exit before any step."""
    students, controls = _begin(scenario, RATES[0], seed)
    students.set_controls(controls)
    return float(students.evaluate("validation").exit_loss[0, -1])


def _loss_after(scenario: "RealScenario", rate: float, seed: int, *, unit_keep: float = 1.0, number: int = 0) -> float:
    """Return the validation loss of the last exit after NUM_STEPS steps with a share of units; inf if it diverges.

    Another `number` means other batches, exits and adapters for the same samples and labels.
    """
    students, controls = _begin(scenario, rate, seed, unit_keep=unit_keep, number=number)
    telemetry = students.train_window(controls)
    loss = float(students.evaluate("validation").exit_loss[0, -1])
    return loss if math.isfinite(loss) and not telemetry.diverged.any() else math.inf


def _begin(
    scenario: "RealScenario", rate: float, seed: int, *, unit_keep: float = 1.0, number: int = 0
) -> tuple[Students, Controls]:
    """Return the student as it begins, and the published setting with a share of its units."""
    config = scenario.config
    train = dataclasses.replace(config.train, learning_rate=rate, steps_per_window=NUM_STEPS, max_rollbacks=0)
    start = published_setting(config.controls)
    short = dataclasses.replace(scenario, start=start, config=dataclasses.replace(config, train=train, num_windows=1))
    students = short.students(1)
    task = draw_task(seed, config.task, scenario.data, len(scenario.signals.accuracy))
    students.reset([dataclasses.replace(task, seed=seed + number)])
    u = with_values(start[None], {"unit_keep": unit_keep}, config.controls)
    return students, decode(u, config.controls, scenario.data.num_classes)
