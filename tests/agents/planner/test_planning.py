import dataclasses
from itertools import islice

import pytest
import torch

from rlkd.agents.planner.planning import PlanningConfig, _add, _noise, _turns, learn_plan, train_batch
from rlkd.agents.planner.surrogate import SurrogateConfig
from rlkd.envs import CONTROLS, OBSERVATIONS, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.schedule import EXIT, ControlPlan
from rlkd.errors import UserError
from rlkd.students import TrainConfig

QUICK = PlanningConfig((0.0, 0.25, 0.5), 2, 12, 2, 8, surrogate=SurrogateConfig(2, 8, 8, num_steps=3))
PLAN = ControlPlan((0.0, 0.5), torch.full((2, 9), 0.5))
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def quick(scenario: Scenario) -> Scenario:
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, train=TrainConfig(2, 8)))


def test_a_batch_tells_what_was_seen_set_and_reached(quick: Scenario) -> None:
    asked: list[tuple[int, torch.Tensor]] = []

    def decide(phase: int, observation: torch.Tensor) -> torch.Tensor:
        asked.append((phase, observation))
        return torch.full((3, 2 - phase, 9), 0.9 - 0.3 * phase)

    trained = train_batch(quick, PLAN, 2, SEEDS, decide, lambda n: None)
    assert [phase for phase, _ in asked] == [0, 1]
    assert all(torch.equal(a, b) for a, (_, b) in zip(trained.observations, asked, strict=True))
    assert trained.settings[:, :, 0].tolist() == [pytest.approx([0.9, 0.6])] * 3

    # by hand: 4 windows, the second phase begins with the third one
    episodes = Episodes(quick, 3)
    seen = [episodes.reset(SEEDS)]
    for window in range(4):
        outcome = episodes.step(torch.full((3, 9), 0.9 if window < 2 else 0.6))
        seen.append(outcome.observation)
    assert torch.equal(trained.observations[0], seen[0])
    assert torch.equal(trained.observations[1], seen[2])
    torch.testing.assert_close(trained.terms[:, 0], outcome.metrics.accuracy)
    torch.testing.assert_close(trained.terms[:, 1], 1 - outcome.cost.latency_ratio)
    torch.testing.assert_close(trained.terms[:, 2], 1 - outcome.cost.energy_ratio)


def test_a_diverged_student_reaches_nothing(quick: Scenario) -> None:
    controls = dataclasses.replace(quick.config.controls, learning_rate=(1e-3, 1e30))
    config = dataclasses.replace(quick.config, controls=controls, train=TrainConfig(2, 8, max_rollbacks=0))
    hot = torch.full((3, 2, 9), 0.5)
    hot[:, :, CONTROLS.index("learning_rate")] = torch.tensor([0.0, 1.0, 0.0])[:, None]
    trained = train_batch(
        dataclasses.replace(quick, config=config), PLAN, 1, SEEDS, lambda phase, seen: hot, lambda n: None
    )
    assert trained.terms[1].tolist() == [0.0, 0.0, 0.0]
    assert (trained.terms[[0, 2], 0] > 0).all()


def test_a_plan_is_learned_from_the_trainings_that_were_counted(quick: Scenario) -> None:
    windows: list[int] = []
    rounds = []
    plan = learn_plan(
        [quick], QUICK, torch.full((9,), 0.4), torch.Generator().manual_seed(0), windows.append, rounds.append
    )
    assert sum(windows) == quick.config.num_windows * QUICK.num_trainings == 4 * (12 + 2 * 8)
    assert [r.num_trainings for r in rounds] == [20, 28]
    assert [r.scenario for r in rounds] == [0, 0]
    assert {"score", "accuracy", "critic_error_0", "promised_score_1"} <= set(rounds[0].figures)
    assert [network.phase for network in plan.networks] == [0, 1]
    seen = torch.rand(6, len(OBSERVATIONS), generator=torch.Generator().manual_seed(1))
    decided = plan.networks[0].decide(seen)
    assert decided.shape == (6, 3, 9)
    assert ((decided >= 0) & (decided <= 1)).all()
    again = learn_plan(
        [quick], QUICK, torch.full((9,), 0.4), torch.Generator().manual_seed(0), lambda n: None, lambda r: None
    )
    assert all(torch.equal(a, b) for a, b in zip(plan.tensors().values(), again.tensors().values(), strict=True))


def test_a_round_tells_whose_tasks_it_trained(quick: Scenario) -> None:
    rounds = []
    config = dataclasses.replace(QUICK, num_rounds=4, main_share=0.5)
    start, generator = torch.full((9,), 0.4), torch.Generator().manual_seed(0)
    learn_plan([quick, quick], config, start, generator, lambda n: None, rounds.append)
    assert [r.scenario for r in rounds] == list(islice(_turns(2, 0.5), 1, 5))  # the first turn was the wide trainings'
    assert {r.scenario for r in rounds} == {0, 1}


def test_turns_give_the_first_world_its_share_and_the_others_the_rest_evenly() -> None:
    assert list(islice(_turns(1, 0.5), 5)) == [0] * 5
    half = list(islice(_turns(3, 0.5), 12))
    assert (half.count(0), half.count(1), half.count(2)) == (6, 3, 3)
    most = list(islice(_turns(2, 0.75), 100))
    assert most.count(0) == 75


def test_noise_spares_half_of_the_controls_and_replaces_exits_alone() -> None:
    noise, leave = _noise(4000, 3, 0.2, 0.25, torch.Generator().manual_seed(0))
    assert (noise[..., EXIT] == 0).all()
    others = [i for i in range(9) if i != EXIT]
    assert (noise[..., others] == 0).float().mean() == pytest.approx(0.25, abs=0.02)  # neither its own nor the common
    assert (leave >= 0).float().mean() == pytest.approx(0.25, abs=0.03)
    drawn = leave[leave >= 0]
    assert (drawn == 0).float().mean() == pytest.approx(0.4, abs=0.06)
    assert (drawn == 1).float().mean() == pytest.approx(0.4, abs=0.06)
    settings = torch.full((4000, 3, 9), 0.95)
    noisy = _add(settings, noise, leave)
    assert noisy.max() <= 1.0
    assert torch.equal(noisy[leave < 0][..., EXIT], settings[leave < 0][..., EXIT])
    assert torch.equal(noisy[leave >= 0][:, 0, EXIT], leave[leave >= 0])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"starts": (0.1, 0.5)}, "planning.starts"),
        ({"starts": (0.0, 0.5, 0.5)}, "planning.starts"),
        ({"starts": (0.0, 1.0)}, "planning.starts"),
        ({"num_decisions": 4}, "planning.num_decisions"),
        ({"num_rounds": 1}, "planning.num_rounds"),
        ({"last_noise": 1.5}, "planning.last_noise"),
        ({"surrogate": SurrogateConfig(num_members=1)}, "planning.surrogate.num_members: got 1; allowed: at least 2"),
    ],
)
def test_impossible_values_are_named(changed: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(PlanningConfig(), **changed).check()  # type: ignore[arg-type]
