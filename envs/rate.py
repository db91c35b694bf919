"""Range test: the step size of a real student's training, where the user gives none.

As Smith 2017 (https://arxiv.org/abs/1506.01186) it tries step sizes that rise by constant factors for a few steps and
reads the loss. Other than there, each begins anew from the same weights on the same batches, and the loss is read on
validation data: in one rising training, a later loss also depends on the steps before it. Each step size is tried on
the whole student and on half of its units: a student that begins trained has little to gain as a whole, but it must
mend what it loses.
"""

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

from rlkd.data import draw_task
from rlkd.envs.action import decode, published_setting, with_values
from rlkd.errors import UserError

if TYPE_CHECKING:
    from rlkd.envs.real import RealScenario

RATES = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)  # of Adam; steps of about three
NUM_STEPS = 24
UNIT_KEEPS = (1.0, 0.5)  # each student that a step size is tried on
logger = logging.getLogger(__name__)


def with_learning_rate(scenario: "RealScenario", seed: int) -> "RealScenario":
    """Return the scenario with a step size: its own, or the one of RATES with the least mean validation loss.

    The student trains NUM_STEPS steps under the published setting for each step size and each of UNIT_KEEPS; its
    weights are put back.

    Args:
        scenario: its `train.learning_rate` is 0 where a step size is wanted.
        seed: of exits, adapters and batches.

    Raises:
        UserError: every step size diverges.
    """
    config = scenario.config
    if config.train.learning_rate > 0:
        return scenario
    losses = {rate: sum(_loss_after(scenario, rate, k, seed) for k in UNIT_KEEPS) / len(UNIT_KEEPS) for rate in RATES}
    best = min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        raise UserError(
            f"train.learning_rate: none of {', '.join(f'{rate:g}' for rate in RATES)} gives a finite loss within "
            f"{NUM_STEPS} steps; check the model and the data, or give one"
        )
    tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    logger.info(
        "learning rate: %g, by mean validation loss after %d steps, whole and halved (%s)", best, NUM_STEPS, tried
    )
    train = dataclasses.replace(config.train, learning_rate=best)
    return dataclasses.replace(scenario, config=dataclasses.replace(config, train=train))


def _loss_after(scenario: "RealScenario", rate: float, unit_keep: float, seed: int) -> float:
    """Return the validation loss of the last exit after NUM_STEPS steps with a share of units; inf if it diverges."""
    config = scenario.config
    train = dataclasses.replace(config.train, learning_rate=rate, steps_per_window=NUM_STEPS, max_rollbacks=0)
    start = published_setting(config.controls)
    short = dataclasses.replace(scenario, start=start, config=dataclasses.replace(config, train=train, num_windows=1))
    students = short.students(1)
    students.reset([draw_task(seed, config.task, scenario.data, len(scenario.signals.accuracy))])
    u = with_values(start[None], {"unit_keep": unit_keep}, config.controls)
    controls = decode(u, config.controls, scenario.data.num_classes)
    telemetry = students.train_window(controls)
    loss = float(students.evaluate("validation").exit_loss[0, -1])
    return loss if math.isfinite(loss) and not telemetry.diverged.any() else math.inf
