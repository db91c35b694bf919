"""Learning within one run: what is credited, what is kept, and that the untrained agent is its base."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rlkd.agents.policy.controllers import Controller, hold_start
from rlkd.agents.ppo.online import OneRun, OnlineAgentConfig, learn_online
from rlkd.configs import OnlineConfig
from rlkd.envs import CONTROLS, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import HIGH, LOW
from rlkd.errors import UserError
from rlkd.runs.distil import TrainedStudent, run_windows, ship

AGENT = OnlineAgentConfig(windows_per_update=4, num_epochs=2, hidden=8)
RATE, UNITS = (CONTROLS.index(name) for name in ("learning_rate", "unit_keep"))
Row = dict[str, float]


def follow(schedule: Tensor) -> Controller:
    """The settings of a schedule [W, 12], one after the other."""
    return lambda observation, episodes, window: schedule[min(window, len(schedule) - 1)][None]


def settings(scenario: Scenario, num_windows: int, **changes: float) -> Tensor:
    """[W, 12], the start with some unit controls changed."""
    schedule = scenario.start.repeat(num_windows, 1)
    for name, value in changes.items():
        schedule[:, CONTROLS.index(name)] = value
    return schedule


@pytest.fixture(scope="module")
def long(scenario: Scenario) -> Scenario:
    train = dataclasses.replace(scenario.config.train, steps_per_window=4)
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, num_windows=12, train=train))


def started(scenario: Scenario, base: Any = hold_start, seed: int = 3) -> tuple[OneRun, list[Row]]:
    rows: list[Row] = []

    def on_window(row: Row, observation: Tensor, episodes: Episodes) -> None:
        rows.append(row)

    return OneRun(scenario, base, seed, on_window), rows


def hold_base(run: OneRun, num_windows: int) -> None:
    """Train `run`'s student for as many windows under its base alone."""
    for _ in range(num_windows):
        run.step(np.zeros(len(CONTROLS), dtype=np.float32))
        if run.diverged:
            break


def test_no_action_is_the_base_and_the_base_is_a_replay(long: Scenario) -> None:
    run, rows = started(long)
    hold_base(run, 12)
    replayed: list[Row] = []
    run_windows(long, hold_start, 3, lambda row, observation: replayed.append(row))
    kinds = ("u_exit_never", "u_exit_first", "u_exit_by_threshold")  # the largest decides, whatever the others are
    for row, replay in zip(rows, replayed, strict=True):
        for name in set(row) - set(kinds):
            assert row[name] == replay[name], name
        assert max(kinds, key=lambda name: row[name]) == max(kinds, key=lambda name: replay[name])


def test_a_window_is_rewarded_by_the_change_it_brought(long: Scenario) -> None:
    run, rows = started(long)
    before = float(run.episodes.evaluate("validation")[2][0])
    rewards = [run.step(np.full(len(CONTROLS), 0.3, dtype=np.float32))[1] for _ in range(3)]
    scores = [before, *(row["score"] for row in rows)]
    assert rewards == pytest.approx(np.diff(scores).tolist(), abs=1e-6)


def test_an_action_changes_the_base_by_a_share_of_the_range(long: Scenario) -> None:
    middle = settings(long, 1, **dict.fromkeys(CONTROLS, 0.5))
    run, rows = started(long, follow(middle))
    action, step = np.zeros(len(CONTROLS), dtype=np.float32), long.config.controls.step
    action[UNITS], action[RATE] = -0.4, 1.0
    seen, _, terminated, truncated, _ = run.step(action)
    assert rows[0]["u_unit_keep"] == pytest.approx(0.5 - 0.4 * step)
    assert rows[0]["u_learning_rate"] == pytest.approx(0.5 + step)
    assert rows[0]["u_temperature"] == pytest.approx(0.5)
    assert (terminated, truncated) == (False, False)
    assert np.abs(seen).max() <= 1.0
    back = (seen + 1) / 2 * (HIGH - LOW) + LOW
    assert float(back[0]) == pytest.approx(1 / 12, abs=1e-5)  # progress
    np.testing.assert_allclose(run.reset()[0], seen)  # the run goes on


def test_the_agent_is_updated_every_few_windows_and_the_run_repeats(long: Scenario) -> None:
    (one, first), (two, second) = started(long), started(long)
    assert learn_online(one, 12, AGENT, seed=7, logger=None) == 3
    learn_online(two, 12, AGENT, seed=7, logger=None)
    assert [row["window"] for row in first] == list(range(1, 13))
    assert first == second
    other, third = started(long)
    learn_online(other, 12, AGENT, seed=8, logger=None)
    assert third != first


def test_what_it_learns_changes_what_it_does(long: Scenario) -> None:
    (one, first), (two, second) = started(long), started(long)
    learn_online(one, 12, AGENT, seed=7, logger=None)
    learn_online(two, 12, dataclasses.replace(AGENT, learning_rate=1e-12), seed=7, logger=None)
    assert first[:4] == second[:4]  # before the first update there is exploration alone
    assert first[4:] != second[4:]


def test_the_best_validated_student_comes_back_and_ships(long: Scenario) -> None:
    worse = settings(long, 12, exit_never=0.0, exit_first=1.0, unit_keep=0.6)
    worse[8:] = settings(long, 4)  # after eight windows it becomes whole
    run, rows = started(long, follow(worse))
    hold_base(run, 12)
    best = max(rows, key=lambda row: row["score"])
    assert run.best_window == best["window"] < 12
    assert float(run.episodes.evaluate("validation")[2][0]) < best["score"] - 0.05
    run.bring_back_best()
    metrics, cost, score = run.episodes.evaluate("validation")
    assert float(score[0]) == pytest.approx(best["score"], abs=1e-6)
    assert float(metrics.accuracy[0]) == pytest.approx(best["accuracy"], abs=1e-6)
    assert float(cost.macs_ratio[0]) == pytest.approx(best["macs_ratio"], abs=1e-6)
    done = ship(long, TrainedStudent(run.episodes, run.last, run.best_window, num_undone=0, num_held=0))
    assert done.figures["compacted_accuracy"] == pytest.approx(done.figures["accuracy"], abs=1e-6)


def test_a_diverged_run_ends_there_and_keeps_the_best_student(long: Scenario) -> None:
    controls = dataclasses.replace(long.config.controls, learning_rate=(5e-4, 1e30))
    train = dataclasses.replace(long.config.train, max_rollbacks=0)
    wild = dataclasses.replace(long, config=dataclasses.replace(long.config, controls=controls, train=train))
    schedule = settings(wild, 12, learning_rate=0.02)
    schedule[5:, RATE] = 1.0
    run, rows = started(wild, follow(schedule))
    quiet = dataclasses.replace(AGENT, log_std=-20.0)
    learn_online(run, 12, quiet, seed=0, logger=None)
    assert run.diverged
    assert len(rows) == 6
    assert 0 < run.best_window < 6
    run.bring_back_best()
    assert float(run.episodes.evaluate("validation")[2][0]) == pytest.approx(max(r["score"] for r in rows), abs=1e-6)
    schedule[:, RATE] = 1.0
    lost, _ = started(wild, follow(schedule))
    hold_base(lost, 12)
    with pytest.raises(UserError, match="diverged in its first window"):
        lost.bring_back_best()


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        (OnlineAgentConfig(windows_per_update=1), "got 1 for num_windows 96"),
        (OnlineAgentConfig(windows_per_update=7), "got 7 for num_windows 96; allowed: divisors"),
        (OnlineAgentConfig(hidden=0), "hidden 0"),
        (OnlineAgentConfig(clip_range=0.0), "clip_range 0"),
        (OnlineAgentConfig(gamma=1.5), "gamma 1.5"),
    ],
)
def test_an_impossible_agent_is_refused(agent: OnlineAgentConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        OnlineConfig(agent=agent).check()
    with pytest.raises(UserError, match="keep_every: got 0"):
        OnlineConfig(keep_every=0).check()
