"""Guards on hand-made sequences of accuracy and J, and on small students in training."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlkd.envs import Episodes, Outcome, Scenario
from rlkd.envs.action import CONTROLS, NUM_CONTROLS
from rlkd.envs.guard import GIVEN_UP, KEPT, NO_WINDOW, UNTOUCHED, Guard, GuardConfig, meets_goal
from rlkd.envs.references import References
from rlkd.errors import UserError

SEEDS = [2**60 + i for i in range(3)]
UNITS = CONTROLS.index("unit_keep")


def begin(scenario: Scenario, count: int = 3, keep: float = 0.8) -> tuple[Episodes, Tensor]:
    config = dataclasses.replace(scenario.config, task=dataclasses.replace(scenario.config.task, reference="0.5"))
    episodes = Episodes(dataclasses.replace(scenario, config=config), count, config.task.with_keep(keep))
    return episodes, episodes.reset(SEEDS[:count])  # floors on validation: 0.4 and some caution, below 0.42


def claim(outcome: Outcome, accuracy: list[float], score: list[float]) -> Outcome:
    """The outcome with other accuracies and scores."""
    metrics = dataclasses.replace(outcome.metrics, accuracy=torch.tensor(accuracy))
    return dataclasses.replace(outcome, metrics=metrics, score=torch.tensor(score))


def parameters(episodes: Episodes) -> Tensor:
    return torch.cat([t.flatten(1) for t in episodes.students.state_dict().values()], dim=1)  # [N, P]


def test_the_best_of_those_that_met_the_goal_ships_else_the_most_accurate(scenario: Scenario) -> None:
    episodes, _ = begin(scenario)
    guard = Guard(episodes)
    # student 0 meets the goal in the second and third window, 1 never, 2 at the end
    accuracy = [[0.39, 0.2, 0.1], [0.45, 0.3, 0.2], [0.43, 0.1, 0.3], [0.2, 0.2, 0.5]]
    score = [[0.9, 0.1, 0.1], [0.2, 0.2, 0.2], [0.3, 0.3, 0.3], [0.8, 0.9, 0.1]]
    seen = []
    for a, j in zip(accuracy, score, strict=True):
        outcome = episodes.step(episodes.start)
        guard.after_window(claim(outcome, a, j))
        seen.append(parameters(episodes))
    assert guard.finish().tolist() == [3, 2, 4]
    assert guard.met.tolist() == [True, False, True]
    wanted = torch.stack([seen[2][0], seen[1][1], seen[3][2]])
    assert torch.equal(parameters(episodes), wanted)
    assert episodes.window.tolist() == [4.0] * 3


def test_what_ships_has_its_own_controls_masks_and_exit(scenario: Scenario) -> None:
    episodes, _ = begin(scenario)
    guard, small = Guard(episodes), episodes.start.clone()
    small[:, UNITS] = 0.3
    guard.after_window(claim(episodes.step(small), [0.5] * 3, [0.5] * 3))
    before = episodes.evaluate("test")
    guard.after_window(claim(episodes.step(episodes.start), [0.3] * 3, [0.9] * 3))
    assert not torch.equal(before[1].macs_ratio, episodes.evaluate("test")[1].macs_ratio)
    guard.finish()
    assert torch.equal(episodes.u, small)
    after = episodes.evaluate("test")
    assert torch.equal(before[0].accuracy, after[0].accuracy)
    assert torch.equal(before[1].macs_ratio, after[1].macs_ratio)


def test_a_window_far_below_the_floor_is_undone_once_the_goal_had_been_met(scenario: Scenario) -> None:
    episodes, _ = begin(scenario)
    guard = Guard(episodes, GuardConfig(undo=True, tolerance=0.05))
    guard.after_window(claim(episodes.step(episodes.start), [0.45, 0.2, 0.45], [0.5] * 3))
    before, u = parameters(episodes), episodes.u.clone()
    small = episodes.start.clone()
    small[:, UNITS] = 0.3
    outcome = claim(episodes.step(small), [0.34, 0.1, 0.38], [0.5] * 3)  # 2 is within the tolerance
    after = parameters(episodes)
    observation = guard.after_window(outcome)
    assert guard.num_undone.tolist() == [1, 0, 0]
    assert torch.equal(parameters(episodes)[0], before[0])
    assert torch.equal(parameters(episodes)[1:], after[1:])
    assert episodes.u[:, UNITS].tolist() == pytest.approx([float(u[0, UNITS]), 0.3, 0.3])
    assert episodes.window.tolist() == [2.0] * 3
    assert not torch.equal(observation[0], outcome.observation[0])  # acts on what it has now
    assert torch.equal(observation[1:], outcome.observation[1:])
    episodes.step(small)
    repeated = parameters(episodes)
    assert not torch.equal(repeated[0], after[0])  # other samples than those of the window that was undone


@pytest.mark.parametrize(
    ("keep", "accuracy", "ships"), [(0.05, 0.01, UNTOUCHED), (0.8, 0.01, UNTOUCHED), (0.8, 0.3, 1)]
)
def test_the_untouched_student_ships_if_every_window_does_worse(
    scenario: Scenario, keep: float, accuracy: float, ships: int
) -> None:
    # fresh students of ten classes are right by chance: they meet a floor of 0.025 and miss one of 0.4
    episodes, _ = begin(scenario, keep=keep)
    before, u = parameters(episodes), episodes.u.clone()
    reached = episodes.leave_nothing_out()[0]
    episodes.reset(SEEDS)
    met = reached >= episodes.floors[:, 0]
    assert met.tolist() == [keep < 0.1] * 3
    guard = Guard(episodes)
    assert torch.equal(parameters(episodes), before)  # the look changes nothing
    assert torch.equal(episodes.u, u)
    small = episodes.start.clone()
    small[:, UNITS] = 0.3
    guard.after_window(claim(episodes.step(small), [accuracy] * 3, [0.9] * 3))
    guard.finish()
    assert guard.best_window.tolist() == [ships] * 3
    assert guard.met.tolist() == met.tolist()
    shipped = torch.full((3,), ships == UNTOUCHED)
    assert torch.equal(parameters(episodes)[shipped], before[shipped])
    assert torch.allclose(episodes.u[shipped][:, UNITS], torch.ones(int(shipped.sum())))
    assert torch.allclose(episodes.evaluate("validation")[0].accuracy[shipped], reached[shipped])


def test_a_student_that_diverges_and_never_met_its_floor_has_nothing_to_ship(scenario: Scenario) -> None:
    for keep, ships in ((0.05, UNTOUCHED), (0.8, NO_WINDOW)):
        episodes, _ = begin(scenario, keep=keep)
        guard = Guard(episodes)
        outcome = claim(episodes.step(episodes.start), [0.01] * 3, [0.9] * 3)
        guard.after_window(dataclasses.replace(outcome, diverged=torch.tensor([True, False, False])))
        assert guard.finish().tolist() == [ships, UNTOUCHED, UNTOUCHED]


def test_units_are_put_back_while_only_the_untouched_student_meets_its_floor(scenario: Scenario) -> None:
    episodes, _ = begin(scenario, keep=0.05)  # fresh students meet a floor of 0.025
    guard, small = Guard(episodes), episodes.start.clone()
    small[:, UNITS] = 0.2
    free = math.ceil(scenario.config.num_windows / 3)
    for window in range(free):
        if window > 0:  # from where the policy went, students with more than that come there in small steps alone
            assert torch.equal(guard.before_window(small), small)  # the policy has its time to come back
        # student 0 stays below, 1 met its floor in the first window, 2 meets it with a J below the untouched one's
        met = [0.01, 0.5 if window == 0 else 0.01, 0.5]
        guard.after_window(claim(episodes.step(small), met, [0.5, 0.5, -9.0]))
    assert guard.best_window.tolist() == [UNTOUCHED, 1, UNTOUCHED]
    moved = guard.before_window(small)
    # student 1 began trained and is below its floor in the second half
    assert moved[:, UNITS].tolist() == pytest.approx([0.6, 0.6, 0.2])
    assert torch.equal(moved[2:], small[2:])
    untouched, _ = begin(scenario, keep=0.8)  # a floor that fresh students miss
    missed = Guard(untouched)
    for _ in range(free):
        missed.after_window(claim(untouched.step(small), [0.01] * 3, [0.5] * 3))
    assert missed.best_window.tolist() == [UNTOUCHED] * 3
    assert torch.equal(missed.before_window(small), small)


def test_a_student_that_began_trained_gives_up_nothing_while_it_is_below_its_floor(scenario: Scenario) -> None:
    episodes, _ = begin(scenario, keep=0.05)  # a floor of 0.025: fresh students have all of the way behind them
    guard, small, large = Guard(episodes), episodes.start.clone(), episodes.start.clone()
    free = Guard(episodes, GuardConfig(hold=False))
    small[:, KEPT], large[:, KEPT] = 0.3, 0.6
    outcome = claim(episodes.step(large), [0.01, 0.5, 0.01], [0.5] * 3)
    for watched in (guard, free):
        watched.after_window(outcome)
    # of four windows, student 1 gives up 0.6 / 4 at most in each
    assert guard.before_window(small)[:, KEPT] == pytest.approx(np.array([[0.6, 0.6], [0.45, 0.45], [0.6, 0.6]]))
    others = [i for i in range(NUM_CONTROLS) if i not in KEPT]
    assert torch.equal(guard.before_window(small)[:, others], small[:, others])
    assert torch.equal(guard.before_window(episodes.start), episodes.start)  # more may come back
    assert torch.equal(free.before_window(small), small)
    guard.after_window(claim(episodes.step(large), [0.01, 0.5, 0.5], [0.5] * 3))  # half of the windows are done
    assert guard.before_window(small)[:2, KEPT] == pytest.approx(np.array([[0.8, 0.8], [0.45, 0.45]]))
    assert guard.num_held.tolist() == [3, 3, 3]  # of the windows above, those whose controls were changed
    assert free.num_held.tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_windows", [4, 12])
def test_steps_of_a_student_that_began_trained_are_smaller_where_windows_are_more(
    scenario: Scenario, num_windows: int
) -> None:
    config = dataclasses.replace(scenario.config, num_windows=num_windows)
    episodes, _ = begin(dataclasses.replace(scenario, config=config), keep=0.05)
    guard, nothing = Guard(episodes), episodes.start.clone()
    nothing[:, KEPT] = 0.0
    given_up = 1.0 - guard.before_window(nothing)[:, KEPT]
    assert given_up == pytest.approx(np.full((3, 2), 0.6 / num_windows), abs=1e-6)


def test_a_fresh_student_may_give_up_units_below_its_floor(scenario: Scenario) -> None:
    episodes, _ = begin(scenario, keep=0.8)  # fresh students of ten classes are far from a floor of 0.4
    guard, small = Guard(episodes), episodes.start.clone()
    small[:, UNITS] = 0.3
    assert torch.equal(guard.before_window(small), small)
    guard.after_window(claim(episodes.step(episodes.start), [0.01] * 3, [0.5] * 3))
    assert torch.equal(guard.before_window(small), small)


def test_a_student_that_begins_trained_begins_whole(scenario: Scenario) -> None:
    def warm(reference: str) -> Episodes:
        task = dataclasses.replace(scenario.config.task, reference=reference)
        config = dataclasses.replace(scenario.config, task=task, warm_windows=2)
        episodes = Episodes(dataclasses.replace(scenario, config=config, known=References()), 1, task.with_keep(1.0))
        episodes.reset(SEEDS[:1])
        return episodes

    reached = float(warm("0.5").leave_nothing_out()[0])
    assert reached > 0.3
    episodes = warm(str(reached + 0.05))
    episodes.u[:, UNITS] = 0.6  # where a scenario begins, as with a policy's own first setting
    small = episodes.u.clone()
    small[:, UNITS] = 0.3
    assert Guard(episodes).before_window(small)[0, UNITS] == 1.0
    episodes = warm(str(reached - 0.2))
    episodes.u[:, UNITS] = 0.6
    step = GIVEN_UP / scenario.config.num_windows
    assert Guard(episodes).before_window(small)[0, UNITS] == pytest.approx(1.0 - step)


@pytest.mark.parametrize("undo", [False, True])
def test_a_population_and_one_student_alone_agree(double_scenario: Scenario, undo: bool) -> None:
    low = [1.0, 0.9, 0.02, 0.02]  # kept units collapse: the goal is met, then broken

    def train(count: int) -> tuple[Guard, Episodes]:
        episodes, _ = begin(double_scenario, count)
        guard = Guard(episodes, GuardConfig(undo=undo))
        for level in low:
            u = episodes.start.clone()
            u[:, UNITS] = level
            guard.after_window(episodes.step(u))
        guard.finish()
        return guard, episodes

    (many, group), (one, alone) = train(3), train(1)
    assert many.best_window[0] == one.best_window[0]
    assert many.num_undone[0] == one.num_undone[0]
    assert not undo or int(many.num_undone.sum()) > 0
    torch.testing.assert_close(parameters(group)[:1], parameters(alone))
    torch.testing.assert_close(group.evaluate("test")[2][:1], alone.evaluate("test")[2])


def test_a_guard_resumes_where_it_was(scenario: Scenario) -> None:
    sequence = [[0.45, 0.2, 0.1], [0.3, 0.3, 0.2], [0.2, 0.1, 0.3]]

    def train(stop: bool) -> tuple[Tensor, Tensor]:
        episodes, _ = begin(scenario)
        guard = Guard(episodes, GuardConfig(undo=True))
        for window, accuracy in enumerate(sequence):
            if stop and window == 2:
                state, kept = episodes.training_state(), guard.state()
                episodes, _ = begin(scenario)
                episodes.load_training_state(state)
                guard = Guard(episodes, GuardConfig(undo=True))
                guard.load_state(kept)
            guard.after_window(claim(episodes.step(episodes.start), accuracy, [0.5] * 3))
        return guard.finish(), parameters(episodes)

    whole, resumed = train(False), train(True)
    assert torch.equal(whole[0], resumed[0])
    assert torch.equal(whole[1], resumed[1])


def test_goals_are_met_up_to_rounding() -> None:
    accuracy, floor = torch.tensor([0.9, 0.9, 0.9]), torch.tensor([0.9, 0.91, 0.0])
    assert meets_goal(accuracy, floor).tolist() == [True, False, True]
    assert meets_goal(accuracy, floor, 0.01).tolist() == [True, True, True]


def test_impossible_guards_are_refused(scenario: Scenario) -> None:
    with pytest.raises(UserError, match=r"guard\.tolerance: got -1"):
        Guard(begin(scenario)[0], GuardConfig(tolerance=-1.0))
