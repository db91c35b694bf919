import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlkd.agents.baselines.gradients import adversarial_temperature, hypergradient
from rlkd.agents.policy.controllers import Controller, run
from rlkd.data import Range
from rlkd.envs import EnvConfig, Scenario, build_scenario
from rlkd.envs.action import CONTROLS, decode
from rlkd.envs.episodes import Episodes
from rlkd.models import StudentConfig
from rlkd.students import Population
from rlkd.students.sensitivity import Sensitivity, sensitivity

BASE = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.5, 0.9, 0.9, 0.5, 0.5, 0.0, 0.0, 1.0])
T = CONTROLS.index("temperature")
NOTHING = torch.zeros(1)
Method = Callable[[Controller, int], Controller]


def base(observation: Tensor, episodes: Episodes, window: int) -> Tensor:
    return BASE.expand_as(episodes.start)


def after(scenario: Scenario, num_windows: int, num_students: int = 4) -> Episodes:
    """Episodes that were held at the base for some windows."""
    episodes = Episodes(scenario, num_students)
    episodes.reset([2**60 + i for i in range(num_students)])
    for _ in range(num_windows):
        episodes.step(base(NOTHING, episodes, 0))
    return episodes


def look(episodes: Episodes, seed: int) -> Sensitivity:
    scenario = episodes.scenario
    controls = decode(episodes.u, scenario.config.controls, scenario.data.num_classes)
    g = torch.Generator().manual_seed(seed)
    return sensitivity(
        episodes.students,
        scenario.template,
        episodes.tasks,
        controls=controls,
        data=scenario.data,
        signals=scenario.signals,
        generator=g,
    )


@pytest.mark.parametrize("method", [adversarial_temperature, hypergradient])
def test_the_first_window_is_the_bases(scenario: Scenario, method: Method) -> None:
    assert torch.equal(method(base, 0)(NOTHING, after(scenario, 0), 0), BASE.expand(4, -1))


@pytest.mark.parametrize(("window", "share"), [(1, 0.25), (2, 0.75), (3, 1.0)])
def test_temperature_climbs_the_response_loss(scenario: Scenario, window: int, share: float) -> None:
    episodes = after(scenario, window)
    u = adversarial_temperature(base, 5)(NOTHING, episodes, window)
    slope = look(episodes, 5).log_temperature
    assert slope.abs().min() > 1e-3
    # log T in units of the range, log 10
    wanted = BASE[T] + 0.5 * share * slope / math.log(10)
    torch.testing.assert_close(u[:, T], wanted.clamp(0, 1), atol=1e-5, rtol=0)
    assert torch.equal((u[:, T] - BASE[T]).sign(), slope.sign())
    others = [i for i in range(12) if i != T]
    assert torch.equal(u[:, others], BASE[others].expand(4, -1))


def test_temperature_goes_on_from_where_it_is_and_stays_in_its_range(scenario: Scenario) -> None:
    episodes = after(scenario, 1)
    high = BASE.clone()
    high[T] = 1.0
    episodes.step(high.expand(4, -1))
    slope = look(episodes, 2).log_temperature
    u = adversarial_temperature(base, 2)(NOTHING, episodes, 2)
    wanted = (1.0 + 0.5 * 0.75 * slope / math.log(10)).clamp(0, 1)
    torch.testing.assert_close(u[:, T], wanted, atol=1e-5, rtol=0)


def test_weights_move_by_twice_the_difference_of_cosines(scenario: Scenario) -> None:
    episodes = after(scenario, 1)
    u = hypergradient(base, 5)(NOTHING, episodes, 1)
    cosines = look(episodes, 5).alignment
    logits = 4 * (2 * u[:, :4] - 1)
    gaps = logits - logits[:, :1]  # the base weighs all families alike
    assert (u[:, :4] > 0).all()  # none was clipped
    torch.testing.assert_close(gaps, 2.0 * (cosines - cosines[:, :1]), atol=1e-5, rtol=0)
    assert u[:, :4].amax(1).tolist() == pytest.approx([1.0] * 4)
    assert torch.equal(u[:, 4:], BASE[4:].expand(4, -1))


def test_weight_moves_from_a_teacher_that_is_wrong_to_labels_that_are_right(scenario: Scenario) -> None:
    task = dataclasses.replace(scenario.config.task, label_noise=Range(0.0, 0.0), num_labels=Range(400, 400))
    wrong = dataclasses.replace(scenario.signals, logits=scenario.signals.logits.roll(1, dims=-1))
    misled = dataclasses.replace(scenario, signals=wrong, config=dataclasses.replace(scenario.config, task=task))
    episodes = after(misled, 0)
    controller = hypergradient(base, 1)
    for window in range(4):
        episodes.step(controller(NOTHING, episodes, window))
    weights = decode(episodes.u, scenario.config.controls, 10).weights
    assert (weights[:, 0] > 3 * weights[:, 1]).all()


def test_a_family_that_cannot_be_used_takes_no_room_from_the_others(config: EnvConfig) -> None:
    small = dataclasses.replace(config, student=StudentConfig("conv", (4, 8), (1,)))
    episodes = after(build_scenario(small), 1, 2)
    dominated = BASE.clone()
    dominated[:4] = torch.tensor([0.3, 0.3, 0.3, 1.0])  # attention, which these teachers cannot give
    episodes.step(dominated.expand(2, -1))
    u = hypergradient(base, 0)(NOTHING, episodes, 2)
    assert u[:, :3].amax(1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("method", [adversarial_temperature, hypergradient])
def test_students_whose_gradients_overflow_keep_what_they_have(scenario: Scenario, method: Method) -> None:
    episodes = after(scenario, 1, 2)
    assert isinstance(episodes.students, Population)
    for parameter in episodes.students._parameters.values():
        parameter.mul_(1e30)
    u = method(base, 0)(NOTHING, episodes, 1)
    now, before = (decode(p, scenario.config.controls, 10) for p in (u, BASE.expand(2, -1)))
    torch.testing.assert_close(now.weights, before.weights)
    torch.testing.assert_close(now.temperature, before.temperature, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [adversarial_temperature, hypergradient])
def test_followers_repeat_and_differ_from_their_base(scenario: Scenario, method: Method) -> None:
    seeds = [2**60 + i for i in range(3)]
    one, two = (run(scenario, method(base, 3), seeds, scenario.config.task) for _ in range(2))
    plain = run(scenario, base, seeds, scenario.config.task)
    assert one.score.tolist() == two.score.tolist()
    assert one.score.tolist() != plain.score.tolist()
