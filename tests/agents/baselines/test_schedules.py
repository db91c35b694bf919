import torch
from rlkd.agents.baselines.schedules import follow, follow_each, run_plans

from rlkd.agents.policy.controllers import run
from rlkd.envs import Scenario
from rlkd.envs.episodes import Episodes

SEEDS = [2**60 + i for i in range(5)]
NOTHING = torch.zeros(1)


def plans(count: int) -> torch.Tensor:
    """[count, 4, 9], all different."""
    return torch.rand(count, 4, 9, generator=torch.Generator().manual_seed(1))


def test_a_plan_is_followed_by_all_and_its_end_holds(scenario: Scenario) -> None:
    episodes, (plan,) = Episodes(scenario, 3), plans(1)
    for window, wanted in ((0, 0), (3, 3), (9, 3)):
        assert torch.equal(follow(plan)(NOTHING, episodes, window), plan[wanted].expand(3, 9))


def test_every_task_gets_its_own_plan_in_whatever_order_it_comes(scenario: Scenario) -> None:
    mixed, table = [SEEDS[i] for i in (3, 0, 4)], plans(5)
    episodes = Episodes(scenario, 3)
    episodes.reset(mixed)
    assert torch.equal(follow_each(SEEDS, table)(NOTHING, episodes, 2), table[[3, 0, 4], 2])


def test_rows_of_plans_stay_with_their_seeds_when_run_in_parts(scenario: Scenario) -> None:
    seeds, table = [SEEDS[0], SEEDS[0], SEEDS[1], SEEDS[2], SEEDS[0]], plans(5)
    whole, parts = (run_plans(scenario, seeds, table, scenario.config.task, "test", None, n) for n in (128, 2))
    assert whole.macs_ratio.tolist() == parts.macs_ratio.tolist()
    assert len(set(whole.macs_ratio.tolist())) == 5
    # the last row is a part of its own, and what its plan alone gives
    alone = run(scenario, follow(table[4]), [SEEDS[0]], scenario.config.task)
    assert alone.macs_ratio[0] == whole.macs_ratio[4]
