import dataclasses

import pytest
import torch
from torch import Tensor

from rlkd.agents.baselines.pbt import PBTConfig, _winners, find_schedule
from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, Results, RunOptions, run
from rlkd.data import Preference, TaskDistribution
from rlkd.envs import Scenario
from rlkd.errors import UserError
from rlkd.students import TrainConfig

SMALL = PBTConfig(num_groups=3, group_size=4, num_trials=2)
PAIR = PBTConfig(num_groups=1, group_size=2, replaced=0.5, num_trials=1)


@pytest.fixture(scope="module")
def scenario(scenario: Scenario) -> Scenario:
    """Three windows of six steps."""
    config = dataclasses.replace(scenario.config, num_windows=3, train=TrainConfig(steps_per_window=6))
    return dataclasses.replace(scenario, config=config)


@pytest.fixture
def tasks(scenario: Scenario) -> TaskDistribution:
    return scenario.config.task.with_preference(Preference(0.6))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_windows(scenario: Scenario, num_windows: int) -> Scenario:
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, num_windows=num_windows))


def train(scenario: Scenario, seeds: list[int], schedules: Tensor, tasks: TaskDistribution) -> Results:
    """Task `seeds[i]` under `schedules[i]` [N, W, 12], on validation."""
    return run(scenario, lambda _, __, window: schedules[:, window], seeds, tasks, final_split="validation")


def reached(scenario: Scenario, seed: int, schedule: Tensor, tasks: TaskDistribution) -> float:
    """Score on validation of one task under one schedule [W, 12]."""
    # two of the same, because a student alone is trained by another loop
    return float(train(scenario, [seed, seed], schedule.expand(2, *schedule.shape), tasks).score[0])


def test_a_pair_by_hand(scenario: Scenario, tasks: TaskDistribution) -> None:
    two, first = with_windows(scenario, 2), torch.full((12,), 0.6)
    kept, changed = 0, 0
    for seed in range(24):  # until both happened
        if kept and changed:
            break
        g = generator(seed)
        task = int(torch.randint(2**59, (1,), generator=g))
        members = torch.stack([first, first + 0.2 * torch.randn(2, 12, generator=g)[1]]).clamp(0, 1)
        noise = 0.1 * torch.randn(2, 12, generator=g)
        after_one = train(with_windows(scenario, 1), [task, task], members[:, None], tasks).score
        best = int(after_one.argmax())
        # the worse one copies the better one and changes its setting, then the better of the two wins
        moved = (members[best] + noise[1 - best]).clamp(0, 1)
        schedules = torch.stack([torch.stack([members[best], second]) for second in (members[best], moved)])
        held_on, mutated = train(two, [task, task], schedules, tasks).score
        found = find_schedule(two, PAIR, tasks, first=first, generator=generator(seed))
        if held_on == mutated:
            continue
        torch.testing.assert_close(found, schedules[int(mutated > held_on)])
        kept, changed = kept + int(held_on > mutated), changed + int(mutated > held_on)
    assert kept > 0
    assert changed > 0


def test_a_winner_is_replayed_to_no_less_than_the_first_setting(scenario: Scenario, tasks: TaskDistribution) -> None:
    first = torch.full((12,), 0.6)
    # with one window nothing is replaced: the winner is the best of a group that the first setting is in
    one = with_windows(scenario, 1)
    lines = _winners(one, SMALL, tasks, first=first, generator=generator(4), options=DEFAULT_OPTIONS)
    g = generator(4)
    seeds = torch.randint(2**59, (3,), generator=g).tolist()
    noise = torch.randn(12, 12, generator=g)
    noise[::4] = 0.0
    members = (first + 0.2 * noise).clamp(0, 1)
    scores = train(one, [s for s in seeds for _ in range(4)], members[:, None], tasks).score.reshape(3, 4)
    best = torch.from_numpy(scores.argmax(1))
    assert torch.equal(lines[:, 0], members.view(3, 4, 12)[torch.arange(3), best])
    # with more, copies carry what came before: on average the line beats the setting held to the end
    lines = _winners(scenario, SMALL, tasks, first=first, generator=generator(4), options=DEFAULT_OPTIONS)
    gains = [
        reached(scenario, seed, line, tasks) - reached(scenario, seed, first.expand(3, 12), tasks)
        for seed, line in zip(seeds, lines, strict=True)
    ]
    assert sum(gains) / 3 > 0.02
    assert min(gains) > -0.01


def test_without_spread_the_schedule_is_the_first_setting(scenario: Scenario, tasks: TaskDistribution) -> None:
    config = dataclasses.replace(SMALL, spread=0.0)
    found = find_schedule(
        with_windows(scenario, 2), config, tasks, first=torch.full((12,), 0.3), generator=generator(0)
    )
    assert torch.equal(found, torch.full((2, 12), 0.3))


def test_the_schedule_is_the_best_of_the_winners_on_further_tasks(scenario: Scenario, tasks: TaskDistribution) -> None:
    g, first = generator(2), torch.full((12,), 0.6)
    lines = _winners(scenario, SMALL, tasks, first=first, generator=g, options=DEFAULT_OPTIONS)
    more = torch.randint(2**59, (2,), generator=g).tolist()
    means = [train(scenario, more, line.expand(2, 3, 12), tasks).score.mean() for line in lines]
    found = find_schedule(scenario, SMALL, tasks, first=first, generator=generator(2))
    assert sorted(means)[-1] > sorted(means)[-2]
    assert torch.equal(found, lines[int(torch.tensor(means).argmax())])


def test_it_repeats_counts_its_cost_and_never_reads_the_test_split(scenario: Scenario, tasks: TaskDistribution) -> None:
    labels = scenario.data.labels.clone()
    labels[scenario.data.splits["test"]] = 0
    blind = dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, labels=labels))
    windows: list[int] = []
    first = torch.full((12,), 0.6)
    one = find_schedule(
        scenario, SMALL, tasks, first=first, generator=generator(1), options=RunOptions(on_window=windows.append)
    )
    assert torch.equal(one, find_schedule(blind, SMALL, tasks, first=first, generator=generator(1)))
    assert not torch.equal(one, find_schedule(scenario, SMALL, tasks, first=first, generator=generator(2)))
    assert one.shape == (3, 12)
    assert one.min() >= 0
    assert one.max() <= 1
    assert sum(windows) == SMALL.num_trainings * 3 == 3 * (4 + 2) * 3


@pytest.mark.parametrize(
    "wrong", [{"group_size": 1}, {"num_groups": 0}, {"num_trials": 0}, {"replaced": 0.0}, {"replaced": 0.6}]
)
def test_impossible_populations_are_refused(
    scenario: Scenario, tasks: TaskDistribution, wrong: dict[str, float]
) -> None:
    config = dataclasses.replace(SMALL, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pbt: got"):
        find_schedule(scenario, config, tasks, first=torch.full((12,), 0.6), generator=generator(0))
