"""Students that go on from a training state are, attribute by attribute, those that the state was taken from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from rlkd.data import draw_task
from rlkd.envs import CONTROLS, DistillationVectorEnv, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.errors import UserError
from rlkd.models import StudentConfig, build_student
from rlkd.students import Controls, Population, SoloStudent, TrainConfig

TRAIN = TrainConfig(steps_per_window=4, batch_size=12)


def controls_of(n: int, hot: int | None = None) -> Controls:
    """Different controls for every student; student `hot` takes steps that leave float32."""
    i = torch.arange(n, dtype=torch.float32)
    weights = torch.stack([1 + i, 2.0 + 0 * i, 0.5 + 0 * i, 0.3 + 0.1 * i], dim=-1)
    rate = 1e-3 * (1 + i)
    if hot is not None:
        rate[hot] = 1e30
    return Controls(weights / weights.sum(-1, keepdim=True), 1 + i, 1 - 0.2 * i, 1 - 0.25 * i, 0.3 + 0.2 * i, rate)


def made(scenario: Scenario, n: int) -> Population | SoloStudent:
    structure = build_student(StudentConfig(), scenario.data.input_shape, scenario.data.num_classes)
    if n == 1:
        return SoloStudent(structure, scenario.data, scenario.signals, config=TRAIN)
    return Population(structure, scenario.data, scenario.signals, n, TRAIN)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what differs between two things, however deep; functions and the scenario's data are left out."""
    if type(a) is not type(b):
        return [name]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [name]
    if isinstance(a, torch.Generator):
        return differences(a.get_state(), b.get_state(), name)
    if isinstance(a, np.random.Generator):
        return [] if a.bit_generator.state == b.bit_generator.state else [name]
    if isinstance(a, torch.nn.Module):
        return differences(dict(a.state_dict()), dict(b.state_dict()), name)
    if isinstance(a, torch.optim.Optimizer):
        return differences(a.state_dict()["state"], b.state_dict()["state"], name)
    if isinstance(a, Mapping):
        return [d for k in {*a, *b} for d in differences(a.get(k), b.get(k), f"{name}.{k}")]
    if isinstance(a, list | tuple):
        return [name] * (len(a) != len(b)) + [
            d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{name}.{i}")
        ]
    if hasattr(a, "__dict__") and not callable(a):
        return differences(vars(a), vars(b), name)
    return [] if callable(a) or a == b else [name]


@pytest.mark.parametrize("n", [1, 3])
def test_students_go_on_as_if_they_had_not_stopped(scenario: Scenario, n: int) -> None:
    tasks = [draw_task(seed, scenario.config.task, scenario.data, 3) for seed in range(n)]
    old, new = made(scenario, n), made(scenario, n)
    old.reset(tasks)
    old.train_window(controls_of(n))
    old.train_window(controls_of(n, hot=n - 1))  # is rolled back
    state = old.training_state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    new.reset(tasks)
    assert differences(vars(old), vars(new))
    new.load_training_state(state)
    assert differences(vars(old), vars(new)) == []
    for students in (old, new):
        students.train_window(controls_of(n))
    assert differences(vars(old), vars(new)) == []
    assert differences(kept, state) == []  # copies: no later training reaches into them


def test_episodes_go_on_in_the_middle(goal_scenario: Scenario) -> None:
    scenario = goal_scenario
    old, new = DistillationVectorEnv(3, scenario=scenario), DistillationVectorEnv(3, scenario=scenario)
    old.reset(seed=4)
    action = np.full((3, len(CONTROLS)), 0.4, dtype=np.float32)
    old.step_flat(action)
    old.episodes.reset([77], torch.tensor([1]))  # out of step with the others, as after a divergence
    old.step_flat(-action)
    new.reset(seed=9)
    new.load_training_state(old.training_state())

    def different() -> list[str]:
        # what only ever lends its shape, and the padding behind a task's samples, is left over from earlier tasks
        meaningless = ("scenario", "students._student", "students._module", "students._samples", "students._labels")
        found = differences([old.episodes, old._generators], [new.episodes, new._generators])
        return [name for name in found if not name.removeprefix(".0.").startswith(meaningless)]

    assert different() == []
    for _ in range(scenario.config.num_windows):
        (seen, rewards, *_), (again, repeated, *_) = old.step_flat(action), new.step_flat(action)
        np.testing.assert_array_equal(seen, again)
        np.testing.assert_array_equal(rewards, repeated)
    assert different() == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tasks", torch.tensor([[5, -1], [3, 4]]), "a task's seed is -1 or 5"),
        ("students.batches", torch.full((2, 5056), 7, dtype=torch.uint8), "a random source cannot be restored"),
    ],
)
def test_an_impossible_state_is_refused(scenario: Scenario, name: str, value: torch.Tensor, words: str) -> None:
    episodes = Episodes(scenario, 2)
    episodes.reset([1, 2])
    state = episodes.training_state()
    with pytest.raises(UserError, match=words):
        episodes.load_training_state({**state, name: value})
