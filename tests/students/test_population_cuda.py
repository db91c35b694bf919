"""A population on a GPU is the population of the CPU, recorded or not. Skipped without a GPU."""

import dataclasses

import pytest
import torch
from torch import Tensor

from rlkd.data import draw_task
from rlkd.envs import Scenario
from rlkd.envs.episodes import Episodes
from rlkd.models import GateConfig, StudentConfig, build_student
from rlkd.students import Controls, Metrics, Population, Telemetry, TrainConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")

NUM_STUDENTS = 4
TRAIN = TrainConfig(steps_per_window=4, batch_size=16)
STUDENTS = {
    "mlp": StudentConfig(),
    "conv": StudentConfig("conv", (4, 8), (1,)),
    "gated": StudentConfig(widths=(12, 12, 12), exits=(1, 2), gate=GateConfig(enabled=True, steps_per_rise=8)),
}


def exit_cost(kept: Tensor) -> Tensor:
    """Leaving later costs more, and more units cost more."""
    return torch.arange(1, 4)[None, :, None] * (kept.sum(-1) / 200)[:, None, None].expand(-1, 3, 2)


def population(scenario: Scenario, device: str, student: str = "mlp", record: bool = True, seed: int = 0) -> Population:
    structure = build_student(STUDENTS[student], scenario.data.input_shape, scenario.data.num_classes)
    train = dataclasses.replace(TRAIN, device=device)
    students = Population(structure, scenario.data, scenario.signals, NUM_STUDENTS, train, exit_cost, record)
    students.reset([draw_task(seed + i, scenario.config.task, scenario.data, 3) for i in range(NUM_STUDENTS)])
    return students


def controls(window: int, hot: int | None = None) -> Controls:
    """Different for every student and window; student `hot` takes steps that leave float32."""
    i = torch.arange(NUM_STUDENTS, dtype=torch.get_default_dtype())
    weights = torch.stack([1 + i, 2.0 + 0 * i, 0.5 + 0.1 * window + 0 * i, 0.3 + 0.1 * i], dim=-1)
    rate = 1e-3 * (1 + i + window)
    if hot is not None:
        rate[hot] = 1e30
    keep = 1 - 0.1 * i - 0.05 * window
    return Controls(weights / weights.sum(-1, keepdim=True), 1 + i + window, keep, keep, 0.3 + 0.1 * i, rate)


def trained(students: Population, num_windows: int, first: int = 0) -> tuple[Telemetry, Metrics]:
    for window in range(first, first + num_windows):
        telemetry, metrics = students.train_window(controls(window)), students.evaluate("validation")
    return telemetry, metrics


def assert_close(left: object, right: object, atol: float, rtol: float) -> None:
    """All tensors of two dictionaries or dataclasses."""
    one, two = (x if isinstance(x, dict) else vars(x) for x in (left, right))
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert values.device.type == two[name].device.type == "cpu", name
        torch.testing.assert_close(
            values, two[name], atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(left: object, right: object) -> None:
    assert_close(left, right, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("record", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("student", STUDENTS)
def test_a_gpu_gives_what_the_cpu_gives(double_scenario: Scenario, student: str, record: bool) -> None:
    here, there = population(double_scenario, "cpu", student), population(double_scenario, "cuda", student, record)
    for num_windows in (1, 1, 2):  # plain, recorded and replayed
        (said, ours), (told, theirs) = (trained(p, num_windows) for p in (here, there))
        assert_close(said, told, atol=1e-7, rtol=1e-6)
        assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
        assert_close(here.state_dict(), there.state_dict(), atol=1e-7, rtol=1e-6)
    assert all(torch.equal(one, two) for one, two in zip(here.masks(), there.masks(), strict=True))


def test_single_precision_stays_close(scenario: Scenario) -> None:
    (said, ours), (told, theirs) = (trained(population(scenario, device), 4) for device in ("cpu", "cuda"))
    torch.testing.assert_close(said.losses, told.losses, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(ours.exit_loss, theirs.exit_loss, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(ours.accuracy, theirs.accuracy, atol=0.02, rtol=0.0)


@pytest.mark.parametrize("student", STUDENTS)
def test_a_recording_gives_the_bits_of_the_plain_path(scenario: Scenario, student: str) -> None:
    plain, recorded = (population(scenario, "cuda", student, record) for record in (False, True))
    for _ in range(4):
        (said, ours), (told, theirs) = (trained(p, 1) for p in (plain, recorded))
        if student == "conv":  # the pooling of its attention map, which only telemetry hears of, adds up in any order
            assert_close(said, told, atol=1e-6, rtol=1e-5)
        else:
            assert_same(said, told)
        assert_same(ours, theirs)
    assert (recorded._window._graph is None) == (student == "conv")  # whose capture breaks off
    assert plain._window._graph is None
    assert_same(plain.training_state(), recorded.training_state())


def test_the_same_seeds_give_the_same_bits_on_a_gpu(scenario: Scenario) -> None:
    first, second = (population(scenario, "cuda") for _ in range(2))
    for (one, two), (three, four) in [(trained(first, 3), trained(second, 3))]:
        assert_same(one, three)
        assert_same(two, four)
    assert_same(first.training_state(), second.training_state())


def test_a_recording_follows_resets_copies_and_loaded_states(scenario: Scenario) -> None:
    plain, recorded = (population(scenario, "cuda", record=record) for record in (False, True))
    kept = recorded.training_state()
    for p in (plain, recorded):
        trained(p, 3)
        p.reset([draw_task(77, scenario.config.task, scenario.data, 3)], torch.tensor([1]))
        trained(p, 1)
        p.copy_rows(torch.tensor([0, 0, 1, 3]))
        p.set_exit(torch.full((NUM_STUDENTS,), 0.5))
        trained(p, 1)
    assert_same(plain.training_state(), recorded.training_state())
    for p in (plain, recorded):
        p.load_training_state(kept)
        trained(p, 2)
    assert_same(plain.training_state(), recorded.training_state())


@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_training_goes_on_on_another_device(double_scenario: Scenario, source: str, target: str) -> None:
    old, new = population(double_scenario, source), population(double_scenario, target)
    trained(old, 2)
    trained(new, 3)  # what it holds is overwritten, recordings go on
    state = old.training_state()
    new.load_training_state(state)
    assert_same(state, new.training_state())
    (said, ours), (told, theirs) = (trained(p, 2, first=2) for p in (old, new))
    assert_close(said, told, atol=1e-7, rtol=1e-6)
    assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("record", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_neighbours_of_a_diverging_student_are_untouched_to_the_bit(scenario: Scenario, at: int, record: bool) -> None:
    calm, mixed = (population(scenario, "cuda", record=record) for _ in range(2))
    others = [0, 1, 3]
    for window in range(4):
        before = mixed.training_state()
        fine = calm.train_window(controls(window))
        told = mixed.train_window(controls(window, hot=2 if window == at else None))
        assert fine.num_rollbacks.tolist() == [0] * NUM_STUDENTS
        assert told.num_rollbacks.tolist() == [0, 0, int(window >= at), 0]
        left, right = calm.training_state(), mixed.training_state()
        for name, values in left.items():
            assert torch.equal(values[others], right[name][others]), name
            if window == at and name.startswith(("parameters", "first", "second", "num_updates")):
                assert torch.equal(right[name][2], before[name][2]), name
    assert not told.diverged.any()
    assert all(torch.isfinite(p).all() for p in mixed.state_dict().values())


def test_episodes_know_of_no_device(scenario: Scenario) -> None:
    train = dataclasses.replace(scenario.config.train, device="cuda")
    there = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, train=train))
    mine, other = Episodes(scenario, 3), Episodes(there, 3)
    torch.testing.assert_close(mine.reset([1, 2, 3]), other.reset([1, 2, 3]), atol=1e-4, rtol=1e-4)
    for _ in range(3):
        ours, theirs = mine.step(mine.start), other.step(other.start)
        for name in ("observation", "reward", "score"):
            assert getattr(theirs, name).device.type == "cpu"
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=0.05, rtol=0.05)
