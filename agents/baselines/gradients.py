"""Gradient-based baselines: controllers that follow the gradient of a loss instead of a learned policy.

Both compute gradients of the student (`rlkd.students.sensitivity`) before every window; a policy only observes.
"""

import math

import torch
from torch import Tensor

from rlkd.agents.policy.controllers import Controller
from rlkd.envs.action import CONTROLS, WEIGHT_LOGIT, decode, with_values
from rlkd.envs.episodes import Episodes
from rlkd.envs.scenario import Scenario
from rlkd.losses import FAMILIES
from rlkd.students.adapted import chain_objective
from rlkd.students.sensitivity import Sensitivity, sensitivity

TEMPERATURE_RATE = 0.5  # of log T for each unit of d log loss / d log T
WEIGHT_RATE = 2.0  # of a weight's logit for each unit of cosine


def adversarial_temperature(base: Controller, seed: int) -> Controller:
    """Curriculum temperature (CTKD, Li et al. 2023): T climbs the response loss that the student descends.

    log T moves by TEMPERATURE_RATE * lambda * d log(response) / d log T before every window, with lambda rising
    from 0 to 1 along half a cosine, as the paper's gradient reversal does. Adapted: the paper learns T with the
    student's own optimizer at every step; here it moves once a window, for each student, within the range of
    the control.
    """
    generator = torch.Generator().manual_seed(seed)

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = base(observation, episodes, window)
        if window == 0:
            return u
        config = episodes.scenario.config.controls
        temperature = decode(episodes.u, config, episodes.scenario.data.num_classes).temperature  # [N]
        share = 0.5 * (1.0 - math.cos(math.pi * window / max(1, episodes.scenario.config.num_windows - 1)))
        slope = look(episodes, generator).log_temperature.nan_to_num()  # where a gradient overflows it stays
        return with_values(u, {"temperature": temperature * (TEMPERATURE_RATE * share * slope).exp()}, config)

    return controller


def hypergradient(base: Controller, seed: int) -> Controller:
    """One-step hypergradient on the loss weights (Baydin et al. 2018; Luketina et al. 2016).

    The derivative of the validation loss after one gradient step, by the weight of a family, is minus the learning
    rate times the product of the validation gradient and the family's. Here a weight's logit moves by
    WEIGHT_RATE times the cosine of the two, which no scale of a loss changes.
    """
    generator = torch.Generator().manual_seed(seed)

    def controller(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
        u = base(observation, episodes, window).clone()
        if window == 0:
            return u
        columns = [CONTROLS.index(f"weight_{family}") for family in FAMILIES]
        moved = WEIGHT_RATE / (2 * WEIGHT_LOGIT) * look(episodes, generator).alignment.nan_to_num()  # [N, 4]
        weights = episodes.u[:, columns] + moved
        # only differences of logits count: keep the largest at the top of its range so that none is clipped away
        scenario = _chain_scenario(episodes)
        used = chain_objective(scenario.config.loss, scenario.template, scenario.signals).available
        u[:, columns] = (weights + (1.0 - weights[:, used].amax(-1, keepdim=True))).clamp(0.0, 1.0)
        return u

    return controller


def look(episodes: Episodes, generator: torch.Generator) -> Sensitivity:
    """Return how the losses change with the controls now, on samples that `generator` draws."""
    scenario = _chain_scenario(episodes)
    controls = decode(episodes.u, scenario.config.controls, scenario.data.num_classes)
    structure = scenario.new_structure()
    return sensitivity(
        episodes.students,
        structure,
        episodes.tasks,
        controls=controls,
        data=scenario.data,
        signals=scenario.signals,
        generator=generator,
        loss=scenario.config.loss,
    )


def _chain_scenario(episodes: Episodes) -> Scenario:
    """Return the scenario of the chain; raise ValueError for a real model, whose gradients are not read."""
    if not isinstance(episodes.scenario, Scenario):
        raise ValueError("ctkd, hypergradient: got a real model; allowed: students that are chains (mlp, conv)")
    return episodes.scenario
