"""Hand-made baselines: the schedules of published recipes.

Each sets what its source prescribes. What it does not prescribe (how much is pruned, exits, the learning rate)
comes from a base controller, the best constant setting for the goal, so that no recipe loses for lack of
compression. `annealed` alone sets all controls.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlkd.agents.baselines.gradients import look
from rlkd.agents.policy.controllers import Controller
from rlkd.envs.action import encode, with_exit_kind, with_values
from rlkd.envs.episodes import Episodes
from rlkd.losses import FAMILIES, PUBLISHED

Values = dict[str, float | Tensor]


class Moment(NamedTuple):
    """One window of the students that a schedule sets controls for."""

    episodes: Episodes
    window: int
    done: float  # 0 in the first window, 1 in the last


def annealed(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
    """Lower the temperature and the shares kept over the training: hot and dense first, then cold and sparse.

    Temperature falls geometrically from 5 to 1 (annealed distillation, Jafari et al. 2021), the kept share of
    units from 0.8 to 0.3 along the cubic schedule of gradual pruning (Zhu & Gupta 2018), the learning rate along
    a cosine, and weight moves from the teacher's answers to the labels; inputs stay, and no sample leaves early.
    Inputs are not pruned, because that cost 0.10 of accuracy and 0.04 of J (64 tasks).
    """
    done = _moment(episodes, window).done
    values: Values = {
        **_weights(0.2 + 0.3 * done, 0.6 - 0.3 * done, 0.15, 0.05),
        "temperature": 5.0 ** (1.0 - done),
        "feature_keep": 1.0,
        "unit_keep": 0.3 + 0.5 * (1.0 - done) ** 3,
        "exit_threshold": 1.0,
        "learning_rate": 1e-2 * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done))),
    }
    return encode(values, episodes.scenario.config.controls).expand_as(episodes.start)


def upon(base: Controller, values_at: Callable[[Moment], Values]) -> Controller:
    """Return a controller with a schedule for some controls; `base` gives the others."""

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = base(observation, episodes, window)
        return with_values(u, values_at(_moment(episodes, window)), episodes.scenario.config.controls)

    return controller


def alpha_weighted(moment: Moment) -> Values:
    """Weight labels and softened answers equally at T = 5 (Hinton, Vinyals & Dean 2015; alpha = 0.5)."""
    return {**_weights(0.5, 0.5, 0.0, 0.0), "temperature": 5.0}


def temperature_decay(moment: Moment) -> Values:
    """Lower T to 5 * 0.99^epoch, not below 1; an epoch is one pass over the student's own samples."""
    train = moment.episodes.scenario.config.train
    seen = moment.window * train.steps_per_window * train.batch_size
    epochs = torch.tensor([seen / len(task.samples) for task in moment.episodes.tasks])  # [N]
    return {"temperature": (5.0 * 0.99**epochs).clamp_min(1.0)}


def temperature_stages(moment: Moment) -> Values:
    """Lower T over 4, 3, 2, 1 in four equal stages."""
    return {"temperature": 4.0 - min(3, math.floor(4 * moment.done))}


def fewer_features(moment: Moment) -> Values:
    """Lower the share of kept inputs linearly from 80 % to 30 %."""
    return {"feature_keep": 0.8 - 0.5 * moment.done}


def alpha_by_confidence(moment: Moment) -> Values:
    """Set the weight of the labels to 0.2 where the teacher's mean confidence is above 0.9, to 0.8 below 0.5, else 0.5.

    Confidence is the teacher's largest probability at T = 1, averaged over the student's samples.
    """
    signals = moment.episodes.scenario.signals
    logits = [signals.mean_logits(task.teachers, task.samples) for task in moment.episodes.tasks]
    means = [answers.softmax(-1).amax(-1).mean() for answers in logits]
    confidence = torch.stack(means)  # [N]
    alpha = torch.where(confidence > 0.9, 0.2, torch.where(confidence < 0.5, 0.8, 0.5))
    return _weights(alpha, 1.0 - alpha, 0.0, 0.0)


def curriculum(base: Controller) -> Controller:
    """Return a controller with the stages of `_curriculum`, and early exits in the last one; `base` gives the rest."""
    staged = upon(base, _curriculum)

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = staged(observation, episodes, window)
        return with_exit_kind(u, "never") if _stage(_moment(episodes, window)) < 3 else u

    return controller


def _stage(moment: Moment) -> int:
    return min(3, math.floor(4 * moment.done))


def _curriculum(moment: Moment) -> Values:
    """Five stages, as far as their parts exist, in four equal parts of the training.

    1. Labels alone. 2. Answers 0.8 and labels 0.2. 3. Reward-weighted: all families, each with its published weight
    times what one step on it alone would do for the validation loss, the smooth part of the reward while the student is
    whole (`reward_weights`). 4. Quantisation: left out, nothing is quantised in training, and students of this size
    get slower in int8. 5. Latency: the published weights under the base's pruning and exits. Before it the student is
    whole.
    """
    stage = _stage(moment)
    whole: Values = {"feature_keep": 1.0, "unit_keep": 1.0}
    shares = {0: (1.0, 0.0, 0.0, 0.0), 1: (0.2, 0.8, 0.0, 0.0), 3: tuple(PUBLISHED.values())}
    weights: tuple[float | Tensor, ...] = reward_weights(moment) if stage == 2 else shares[stage]
    return {**_weights(*weights), "temperature": 4.0, **(whole if stage < 3 else {})}


def reward_weights(moment: Moment) -> tuple[Tensor, ...]:
    """[N] for each family: its published weight times the cosine of its gradient with the validation gradient.

    A family that would raise the validation loss gets nothing; where all would, the published weights stay.
    """
    generator = torch.Generator().manual_seed(moment.window)
    pay = look(moment.episodes, generator).alignment.nan_to_num().clamp_min(0.0)  # [N, 4]
    published = torch.tensor(tuple(PUBLISHED.values()))
    weighted = published * pay
    useful = weighted.sum(-1, keepdim=True) > 0
    return tuple(torch.where(useful, weighted, published).unbind(-1))


SCHEDULES: dict[str, Callable[[Moment], Values]] = {
    "alpha_weighted": alpha_weighted,
    "temperature_decay": temperature_decay,
    "temperature_stages": temperature_stages,
    "fewer_features": fewer_features,
    "alpha_by_confidence": alpha_by_confidence,
}


def _moment(episodes: Episodes, window: int) -> Moment:
    return Moment(episodes, window, window / max(1, episodes.scenario.config.num_windows - 1))


def _weights(*values: float | Tensor) -> Values:
    return dict(zip((f"weight_{family}" for family in FAMILIES), values, strict=True))
