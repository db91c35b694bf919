import dataclasses

import pytest
import torch
from torch import Tensor

from rlkd.agents.baselines.recipes import INPUTS, MARGIN, NNCF_STEPS, RECIPES, UNITS, for_all, for_tasks
from rlkd.agents.policy.controllers import follow
from rlkd.envs import OBSERVATIONS, Scenario
from rlkd.envs.action import EXIT_KINDS, decode, exit_kind, published_setting, with_exit_kind
from rlkd.envs.episodes import Episodes

SEEDS = [2**60 + i for i in range(5)]
NOTHING = torch.zeros(1)


@pytest.fixture
def episodes(scenario: Scenario) -> Episodes:
    """Two students, nine windows."""
    config = dataclasses.replace(scenario.config, num_windows=9)
    return Episodes(dataclasses.replace(scenario, config=config), 2)


def seen(margin: float) -> Tensor:
    observation = torch.zeros(2, len(OBSERVATIONS))
    observation[:, MARGIN] = margin
    return observation


def kept(u: Tensor, episodes: Episodes) -> tuple[float, float]:
    """Shares of inputs and units of the first student."""
    controls = decode(u, episodes.scenario.config.controls, 10)
    return float(controls.feature_keep[0]), float(controls.unit_keep[0])


def point_of(inputs: float, units: float, *more: float) -> Tensor:
    """[A], with these unit controls for inputs and units, and all samples out at the first exit."""
    point = torch.full((1, 12), 0.5)
    point[:, INPUTS], point[:, UNITS] = inputs, units
    return torch.cat([with_exit_kind(point, "first")[0], torch.tensor(more)])


def test_lines_go_from_the_first_setting_to_the_last(episodes: Episodes) -> None:
    point = torch.cat([torch.zeros(12), torch.ones(12)])
    for name, at_the_second in (("linear", 0.125), ("cosine", 0.0381)):
        controller = RECIPES[name].controller(for_all(point))
        values = [float(controller(NOTHING, episodes, w)[1, 3]) for w in (0, 1, 4, 8)]
        assert values == pytest.approx([0.0, at_the_second, 0.5, 1.0], abs=1e-4)


def test_the_cubic_schedule_by_hand(episodes: Episodes) -> None:
    point = point_of(0.5, 0.0, 1 / 3)  # inputs 0.1 ** 0.5, units 0.05; the end at half of the training
    controller = RECIPES["cubic"].controller(for_all(point))
    for window, left in ((0, 1.0), (2, 0.125), (4, 0.0), (8, 0.0)):
        inputs, units = kept(controller(NOTHING, episodes, window), episodes)
        assert inputs == pytest.approx(0.1**0.5 + (1 - 0.1**0.5) * left, rel=1e-4)
        assert units == pytest.approx(0.05 + 0.95 * left, rel=1e-4)


def test_one_shot_is_dense_without_exits_and_then_pruned_for_good(episodes: Episodes) -> None:
    for more, first_pruned in ((0.0, 1), (0.5, 5), (1.0, 8)):  # the last window is always pruned
        point = point_of(0.4, 0.3, more)
        controller = RECIPES["one_shot"].controller(for_all(point))
        for window in range(9):
            u = controller(NOTHING, episodes, window)
            if window < first_pruned:
                assert kept(u, episodes) == pytest.approx((1.0, 1.0))
                assert EXIT_KINDS[int(exit_kind(u)[0])] == "never"
            else:
                assert torch.equal(u, point[:12].expand(2, -1))


def test_two_phases_begin_dense_for_a_third(episodes: Episodes) -> None:
    point = point_of(0.4, 0.3)
    controller = RECIPES["two_phase"].controller(for_all(point))
    dense = published_setting(episodes.scenario.config.controls)
    for window in range(9):
        assert torch.equal(controller(NOTHING, episodes, window)[0], dense if window < 3 else point), window


def test_nncf_goes_on_above_the_floor_back_below_it_and_halves_at_reversals(episodes: Episodes) -> None:
    low, high = NNCF_STEPS
    step = (low * high) ** 0.5
    controller = RECIPES["nncf"].controller(for_all(point_of(0.5, 0.5)))
    margins = [0.0, -0.4, 0.1, 0.1, -0.1, -0.1, 0.2]  # the first one is not looked at; the second is before any pruning
    steps = [0, 0, 1, 2, 1.5, 1, 1.25]
    for again in range(2):  # a second batch of tasks begins anew
        for window, (margin, wanted) in enumerate(zip(margins, steps, strict=True)):
            u = controller(seen(margin), episodes, window)
            level = min(1.0, wanted * step)
            assert float(u[0, UNITS]) == pytest.approx(1 - level, abs=1e-5), (again, window)
            assert float(u[0, INPUTS]) == pytest.approx(1 - level / 2, abs=1e-5)


def test_first_points_hold_the_known_settings() -> None:
    settings = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    for name, recipe in RECIPES.items():
        points = recipe.first(settings)
        assert points.shape == (3, recipe.num_axes), name
        assert torch.equal(points[:, :12], settings)
    assert torch.equal(RECIPES["linear"].first(settings)[:, 12:], settings)


def test_a_schedule_is_followed_by_all_and_its_end_holds(scenario: Scenario) -> None:
    episodes, schedule = Episodes(scenario, 3), torch.rand(4, 12)
    for window, wanted in ((0, 0), (3, 3), (9, 3)):
        assert torch.equal(follow(schedule)(NOTHING, episodes, window), schedule[wanted].expand(3, 12))


def test_every_task_gets_its_own_point_in_whatever_order_it_comes(scenario: Scenario) -> None:
    mixed, table = [SEEDS[i] for i in (3, 0, 4)], torch.rand(5, 12)
    episodes = Episodes(scenario, 3)
    episodes.reset(mixed)
    controller = RECIPES["constant"].controller(for_tasks(SEEDS, table))
    assert torch.equal(controller(NOTHING, episodes, 2), table[[3, 0, 4]])
