"""A run that was stopped anywhere and goes on ends with the bytes of one that was not stopped."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from silent import Silent
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.policy.controllers import RunOptions
from rlkd.agents.policy.policy import Policy
from rlkd.agents.ppo.train import Listeners, PPOConfig, Rollout, train
from rlkd.configs import ComparisonConfig, ExperimentConfig
from rlkd.configs.schema import ScenarioConfig
from rlkd.cost import CostConfig
from rlkd.envs import Scenario
from rlkd.envs.action import published_setting
from rlkd.envs.references import References
from rlkd.errors import UserError
from rlkd.io.checkpoints import Checkpoint, Checkpoints
from rlkd.io.files import tensor_shapes
from rlkd.io.journal import Journal
from rlkd.models import StudentConfig
from rlkd.runs.train import train_experiment
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig
from rlkd.workers import IN_PROCESS, Workers
from rlkd.workers.processes import ProcessWorkers

EXACT = (
    *(
        "metrics.jsonl",
        "evaluations.jsonl",
        "policy/policy.safetensors",
        "policy/bundle.json",
        "student/student.safetensors",
    ),
    *(
        "student/student.json",
        "config.yaml",
        "cost_profile.json",
        "cost_profile_1.json",
        "cost_profile_validation.json",
    ),
)


class Stop(KeyboardInterrupt):
    """What a signal does, at a place that a test chooses."""


class StopsAt(Silent):
    """Stops the run at the n-th window of the phase that is called so."""

    def __init__(self, phase: str, window: int) -> None:
        self.where, self.left = phase, window
        self.now = ""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        self.now = name

    def advance(self, num_students: int) -> None:
        if self.now == self.where:
            self.left -= 1
            if self.left == 0:
                raise Stop


@pytest.fixture(scope="module")
def small(profile_file: Path) -> ExperimentConfig:
    main = ScenarioConfig(
        num_windows=2,
        teacher=TeacherConfig(num_samples=(40, 897), num_steps=60),
        train=TrainConfig(2, 8),
        cost=CostConfig(profile=str(profile_file)),
    )
    other = replace(main, dataset="generated:classes=4,inputs=6", student=StudentConfig(widths=(8, 8)), warm_windows=1)
    return ExperimentConfig(
        scenarios=(main, other),
        validation=(replace(main, student=StudentConfig(widths=(12, 8))),),
        search=SearchConfig(5, 2, 2, 2),
        ppo=PPOConfig(
            num_students=4,
            num_tasks=4,
            num_iterations=4,
            batch_size=4,
            num_epochs=1,
            hidden=8,
            evaluate_every=2,
            num_evaluation_tasks=3,
        ),
        comparison=ComparisonConfig(2, (0.98,)),
    )


@pytest.fixture(scope="module")
def whole(small: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train_experiment(small, folder, 3, Silent())
    return folder


def go_on(config: ExperimentConfig, folder: Path, progress: Silent) -> None:
    train_experiment(config, folder, 3, progress, Journal(folder, True, config.keep_checkpoints))


def stop(config: ExperimentConfig, folder: Path, phase: str, window: int) -> None:
    begin: Callable[..., Any] = go_on if (folder / "config.yaml").exists() else begin_anew
    with pytest.raises(Stop):
        begin(config, folder, StopsAt(phase, window))


def begin_anew(config: ExperimentConfig, folder: Path, progress: Silent) -> None:
    train_experiment(config, folder, 3, progress)


def without_clocks(tree: Any) -> Any:
    """A result less what a clock read."""
    clocks = ("wall_s", "updates_per_s", "trainings_per_s", "measured")
    if isinstance(tree, dict):
        return {k: without_clocks(v) for k, v in tree.items() if k not in clocks}
    return tree


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(tag for tag in events.Tags()["scalars"] if not tag.endswith(("fps", "per_s")))
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_same_end(folder: Path, whole: Path) -> None:
    for name in EXACT:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = (without_clocks(json.loads((f / "result.json").read_text())) for f in (folder, whole))
    assert found == expected
    assert str(scalars(folder)) == str(scalars(whole))  # as text: one of them is no number
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    parts = [(row["part"], row.get("iteration")) for row in rows]
    assert parts == [("search", None), *(("ppo", i) for i in (1, 2, 3, 4)), ("total", None)]


PLACES = [
    ("best constant setting", 3),
    ("PPO", 1),  # among the observations that standardise
    ("PPO", 6),  # in the evaluation of the start
    ("PPO", 4),  # in the first rollout
    ("PPO", 3),  # in the second one, after an update
    ("PPO", 7),  # in the evaluation after it
    ("PPO", 4),
    ("PPO", 2),
    ("comparison on held-out tasks", 1),
    ("comparison on held-out tasks", 6),
    ("one clean student under the policy", 2),
]


@pytest.mark.slow
def test_stopped_everywhere_it_ends_as_if_it_never_was(small: ExperimentConfig, whole: Path, tmp_path: Path) -> None:
    for phase, window in PLACES:
        stop(small, tmp_path, phase, window)
    go_on(small, tmp_path, Silent())
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_another_number_of_workers(
    small: ExperimentConfig, whole: Path, tmp_path: Path
) -> None:
    def part(workers: Workers, progress: Silent) -> None:
        journal = Journal(tmp_path, (tmp_path / "config.yaml").exists(), small.keep_checkpoints)
        train_experiment(small, tmp_path, 3, progress, journal, workers)

    stops = [("best constant setting", 3), ("PPO", 14), ("PPO", 3), ("comparison on held-out tasks", 9)]
    for num_workers, (phase, window) in zip((2, 1, 3, 2), stops, strict=True):
        with ProcessWorkers(num_workers) as workers, pytest.raises(Stop):
            part(workers, StopsAt(phase, window))
    part(IN_PROCESS, Silent())
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_a_torn_state_is_named_and_the_one_before_it_used(
    caplog: pytest.LogCaptureFixture, small: ExperimentConfig, whole: Path, tmp_path: Path
) -> None:
    # four windows for standardising, two for each evaluation (of the start and after two), three rollouts of four
    stop(small, tmp_path, "PPO", 4 + 2 + 4 + 4 + 2 + 4 + 1)
    states = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in states] == ["state-000002.ckpt", "state-000003.ckpt"]
    states[1].write_bytes(states[1].read_bytes()[:-1])
    go_on(small, tmp_path, Silent())
    assert (
        f"{states[1]}: torn or altered, its checksum differs; going back to what was saved before it" in caplog.messages
    )
    assert_same_end(tmp_path, whole)


def test_another_state_is_refused(small: ExperimentConfig, tmp_path: Path) -> None:
    stop(small, tmp_path, "PPO", 4 + 2 + 4 + 1)
    journal = Journal(tmp_path, resume=True)
    saved = journal.pending
    assert saved is not None
    note = {**saved.note["state"], "num_timesteps": -1}
    Checkpoints(tmp_path / "checkpoints", 2).save(2, read_all(saved), {**saved.note, "state": note})
    with pytest.raises(UserError, match=r"state-000002.ckpt: not the state of this training.*num_timesteps is -1"):
        go_on(small, tmp_path, Silent())


def read_all(saved: Checkpoint) -> dict[str, Tensor]:
    blob = saved.path.read_bytes()[saved.begin :]
    return saved.tensors(tensor_shapes(blob, "state"))


@pytest.mark.slow
def test_it_goes_on_where_students_diverged(goal_scenario: Scenario, tmp_path: Path) -> None:
    """One that diverged began its next episode alone and was cut off with the others."""
    controls = replace(goal_scenario.config.controls, learning_rate=(1e-3, 1e25))
    train_config = replace(goal_scenario.config.train, max_rollbacks=0)
    changed = replace(goal_scenario.config, controls=controls, train=train_config)
    config = PPOConfig(num_students=6, num_tasks=5, num_iterations=3, batch_size=8, num_epochs=2, hidden=8)
    config = replace(config, initial_log_std=0.0)

    def learn(folder: Path, stop_at: int, resume: bool = True) -> tuple[Policy, list[Rollout]]:
        rollouts, left = [], iter(range(stop_at, -1, -1))

        def on_window(num_students: int) -> None:
            if next(left) == 0:
                raise Stop

        folder.mkdir(exist_ok=True)
        # what was known is lost, too
        hot = replace(goal_scenario, config=changed, start=published_setting(controls), known=References())
        learned = train(
            [hot],
            config,
            5,
            listeners=Listeners(on_window, lambda rollout, logger: rollouts.append(rollout)),
            options=RunOptions(journal=Journal(folder, resume)),
        )
        return learned.policy, rollouts

    policy, rollouts = learn(tmp_path / "whole", 10**6, resume=False)
    assert sum(r.figures["num_diverged"] for r in rollouts) > 0
    for stop_at in (4 + 4, 4, 3):  # after the episode that standardises, in the second rollout, and so on
        with pytest.raises(Stop):
            learn(tmp_path / "cut", stop_at, resume=(tmp_path / "cut").exists())
    saved = Journal(tmp_path / "cut", True).pending
    assert saved is not None
    assert read_all(saved)["students.streams"].shape == (1, 6, 6)  # no student is in training
    again, rest = learn(tmp_path / "cut", 10**6)
    assert rest == rollouts[-len(rest) :]
    for name, tensor in policy.weights.items():
        assert torch.equal(tensor, again.weights[name]), name
