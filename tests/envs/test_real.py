"""The scenario of a real model: references of its floors, and the students that it makes."""

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from rlkd.data import Goal, Preference
from rlkd.envs import ControlConfig
from rlkd.envs.action import decode, published_setting, with_exit_kind, with_values
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import MET, MISSED, SURE, Guard
from rlkd.envs.limits import largest_cost
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.hardware import FOLDER
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.instrumented import Instrumented
from rlkd.runs.goals import reference_accuracies, task_of, with_goal
from rlkd.students.interface import probed_samples
from rlkd.students.real.module import ModuleStudent
from rlkd.students.real.train_config import ModuleTrainConfig


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealScenario:
    folder = tmp_path_factory.mktemp("real")
    teacher = tiny_models.tiny("bert", layers=3)
    teacher.config.id2label, teacher.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    teacher.save_pretrained(folder / "bert")
    tiny_models.save_tokenizer(folder / "bert")
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "source"])
        rows.writerows(
            ("good film" if i % 2 else "bad plot", "pos" if i % 2 else "neg", f"review {i // 3}") for i in range(90)
        )
    config = RealConfig(
        teacher=str(folder / "bert"),
        data=str(folder / "reviews.csv"),
        num_windows=2,
        cut=StudentCut(layers=2),
        train=ModuleTrainConfig(steps_per_window=2, batch_size=8, learning_rate=5e-5),
        cost=RealCostConfig(batch_size=4, batches=()),
    )
    return build_real_scenario(config, ControlConfig())


def copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_the_dense_reference_leaves_the_student_in_training_as_it_is(real: RealScenario) -> None:
    scenario = with_goal(real, Goal(keep=0.9, reference="dense"), Preference())
    task = task_of(scenario, 5)
    student = scenario.students(1)
    student.reset([task])
    before = copies(student.state_dict())
    first = reference_accuracies(scenario, task)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    scenario.known.accuracy.clear()
    assert torch.equal(reference_accuracies(scenario, task), first)  # the same training again
    again = Episodes(scenario, 1)
    again.reset([5])
    for name, tensor in again.students.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_floors_are_shares_of_the_teacher_on_what_students_answer(real: RealScenario) -> None:
    scenario = with_goal(real, Goal(keep=0.5), Preference())
    episodes = Episodes(scenario, 1)
    episodes.reset([1])
    test = real.data.splits["test"]
    right = (real.signals.logits[0, test].argmax(-1) == real.data.labels[test]).float().mean()
    assert float(episodes.floors[0, 1]) == pytest.approx(0.5 * float(right))


def test_limits_hold_in_every_window(real: RealScenario) -> None:
    scenario = with_goal(real, Goal(macs=0.6, size=0.9, latency=0.9), Preference())
    episodes = Episodes(scenario, 1)
    episodes.reset([2])
    u = published_setting(ControlConfig())[None]
    for _ in range(2):
        outcome = episodes.step(u)
        assert float(outcome.cost.macs_ratio) <= 0.6
        assert float(outcome.cost.size_ratio) <= 0.9
        assert float(outcome.cost.latency_ratio) <= 0.9


def test_kept_units_are_rounded_as_the_hardware_profile_says(real: RealScenario, tmp_path: Path) -> None:
    text = (FOLDER / "gpu.yaml").read_text().replace("channel_multiple: 8", "channel_multiple: 12")
    (tmp_path / "board.yaml").write_text(text)
    config = RealConfig("teacher", "data", hardware=str(tmp_path / "board.yaml"))
    rounded = dataclasses.replace(real, channel_multiple=config.channel_multiple())
    u = with_values(published_setting(ControlConfig())[None], {"unit_keep": 0.3}, ControlConfig())
    kept = {}
    for scenario in (real, rounded):
        episodes = Episodes(with_goal(scenario, Goal(size=0.9), Preference()), 1)
        episodes.reset([2])
        outcome = episodes.step(u)
        assert float(outcome.cost.size_ratio) <= 0.9
        counted = largest_cost(episodes.u, episodes.scenario, at_first=False)
        assert float(outcome.cost.size_ratio) == float(counted.size_ratio)  # limits count what stays
        students = episodes.students
        assert isinstance(students, ModuleStudent)
        groups = students.plan.groups
        counts = [float(mask.sum()) for mask in students.masks()[1:]]
        kept[scenario.channel_multiple] = [count * g.width for count, g in zip(counts, groups, strict=True)]
        probed = students.probe(torch.ones(1), decode(u, ControlConfig(), 2).unit_keep)
        assert torch.equal(probed, students._exit_accuracy(probed_samples(real.data.splits["validation"])))
    sizes = [group.size * group.width for group in groups]
    assert all(count % 12 == 0 or count == size for count, size in zip(kept[12], sizes, strict=True))
    assert any(count % 12 for count in kept[1])


def test_limits_hold_where_blocks_are_skipped(real: RealScenario) -> None:
    """Kept units that limits count are those of whole blocks, a part of one, and none of the others."""
    student = real.student
    plan = make_plan(student.model, real.data.batch(real.data.few()), AttachConfig(exits=(1,), units="depth"), None)
    assert len(plan.order) == 2
    deep = dataclasses.replace(
        real,
        student=Instrumented(student.model, plan, student.links),
        profile=dataclasses.replace(real.profile, plan=plan),
    )
    try:
        sizes = plan.group_sizes[1:]
        first, last = (slice(2 * (number - 1), 2 * number) for number in plan.order)
        kept = deep.units_kept(torch.tensor([0.75, 0.5]))
        assert kept[0, first].tolist() == kept[1, first].tolist() == list(sizes[first])
        assert kept[0, last].tolist() == [size / 2 for size in sizes[last]]
        assert kept[1, last].tolist() == [0, 0]
        u = published_setting(ControlConfig())[None]
        bar = float(largest_cost(with_values(u, {"unit_keep": 0.5}, ControlConfig()), deep, at_first=False).macs_ratio)
        episodes = Episodes(with_goal(deep, Goal(macs=bar + 0.02), Preference()), 1)
        episodes.reset([2])
        outcome = episodes.step(with_exit_kind(u, "never"))
        assert 0.3 < float(outcome.cost.macs_ratio) <= bar + 0.02
        counted = largest_cost(episodes.u, episodes.scenario, at_first=False)
        assert float(outcome.cost.macs_ratio) == pytest.approx(float(counted.macs_ratio))
        assert [float(m.sum()) for m in episodes.students.masks()[1:]][last] != list(sizes[last])
    finally:
        deep.student.detach()


def trained(real: RealScenario, start_rate: float, rate: float) -> dict[str, Tensor]:
    """Return the weights after a window under the control `rate`, where the controls start at `start_rate`."""
    config = ControlConfig()
    start, now = (
        with_values(published_setting(config)[None], {"learning_rate": r}, config) for r in (start_rate, rate)
    )
    students = dataclasses.replace(real, start=start[0]).students(1)
    students.reset([task_of(real, 3)])
    students.train_window(decode(now, config, 2))
    return copies(students.state_dict())


def test_the_step_size_begins_at_the_given_one_wherever_the_control_starts(real: RealScenario) -> None:
    published, high, raised = trained(real, 3e-3, 3e-3), trained(real, 1.2e-2, 1.2e-2), trained(real, 3e-3, 1.2e-2)
    for name, tensor in published.items():
        torch.testing.assert_close(high[name], tensor, rtol=0, atol=1e-8)
    assert any(not torch.allclose(raised[name], tensor, rtol=0, atol=1e-6) for name, tensor in published.items())


def test_a_window_that_is_lucky_on_few_samples_does_not_meet_the_goal(real: RealScenario) -> None:
    scenario = with_goal(real, Goal(accuracy=0.9), Preference())
    student = scenario.students(1)
    student.reset([task_of(scenario, 0)])
    index = real.data.splits["validation"]
    right = torch.tensor([float(student._exit_accuracy(row[None])[0, -1]) for row in index]) == 1.0
    assert 0 < int(right.sum()) < 0.9 * len(index)
    splits = {**real.data.splits, "validation": torch.cat([index[right], index[~right]])}
    share = float(right.float().mean())
    error = (share * (1 - share) / len(index)) ** 0.5  # standard error of that accuracy
    levels = {}
    # all of validation, or the one sample that windows end with; floors out of reach, just below, and well below
    for confirm_size, floor in ((0, 0.9), (1, 0.9), (0, share - 0.7 * error), (0, share - 2 * error)):
        train = dataclasses.replace(
            real.config.train, validation_size=1, confirm_size=confirm_size, learning_rate=1e-12, weight_decay=0.0
        )
        lucky = dataclasses.replace(
            with_goal(real, Goal(accuracy=floor), Preference()),
            data=dataclasses.replace(real.data, splits=splits),
        )
        lucky = dataclasses.replace(lucky, config=dataclasses.replace(lucky.config, train=train))
        episodes = Episodes(lucky, 1)
        episodes.reset([0])
        guard = Guard(episodes)
        outcome = episodes.step(published_setting(ControlConfig())[None])
        assert float(outcome.metrics.accuracy) == 1.0
        guard.after_window(outcome)
        levels[confirm_size, floor] = int(guard.state()["level"])
        assert bool(guard.met) == (levels[confirm_size, floor] > MISSED)
        # units are held by what more samples say, too, not by the lucky one
        assert bool(guard.state()["is_below"]) == (levels[confirm_size, floor] == MISSED)
    assert list(levels.values()) == [MISSED, SURE, MET, SURE]


@pytest.mark.parametrize(("floor", "times"), [(0.05, 0), (0.5, 1)])
def test_a_window_far_above_its_floor_is_not_confirmed(real: RealScenario, floor: float, times: int) -> None:
    # one evaluated sample: three standard errors are 0.65 at a floor of 0.05, and lead beyond 1 at a floor of 0.5
    scenario = with_goal(real, Goal(accuracy=floor), Preference())
    student = scenario.students(1)
    student.reset([task_of(scenario, 0)])
    index = real.data.splits["validation"]
    right = torch.tensor([float(student._exit_accuracy(row[None])[0, -1]) for row in index]) == 1.0
    splits = {**real.data.splits, "validation": torch.cat([index[right], index[~right]])}
    train = dataclasses.replace(real.config.train, validation_size=1, confirm_size=0, learning_rate=1e-12)
    scenario = dataclasses.replace(scenario, data=dataclasses.replace(real.data, splits=splits))
    scenario = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, train=train))
    episodes = Episodes(scenario, 1)
    episodes.reset([0])
    guard = Guard(episodes)
    outcome = episodes.step(published_setting(ControlConfig())[None])
    confirmed = []
    confirm = episodes.confirm
    episodes.confirm = lambda: confirmed.append(1) or confirm()  # type: ignore[method-assign, func-returns-value]
    guard.after_window(outcome)
    assert len(confirmed) == times
    assert int(guard.state()["level"]) == SURE or times


def test_references_are_read_on_the_samples_that_confirm_a_window(real: RealScenario) -> None:
    train = dataclasses.replace(real.config.train, validation_size=3, confirm_size=7)
    config = dataclasses.replace(real.config, train=train)
    index = real.data.splits["validation"]
    right = (real.signals.logits[0].argmax(-1) == real.data.labels).float()
    some, more = (index[torch.arange(count) * len(index) // count] for count in (3, 7))
    for reference in ("teacher", "dense"):
        scenario = dataclasses.replace(
            with_goal(real, Goal(keep=0.9, reference=reference), Preference()), config=config
        )
        scenario = with_goal(scenario, Goal(keep=0.9, reference=reference), Preference())
        found = scenario.references([task_of(scenario, 4)])
        assert found.shape == (1, 3)
        if reference == "teacher":
            test = right[real.data.splits["test"]].mean()
            torch.testing.assert_close(found[0], torch.stack([right[some].mean(), test, right[more].mean()]))
        else:
            assert float(found[0, 2]) * 7 == pytest.approx(round(float(found[0, 2]) * 7), abs=1e-5)
            assert float(found[0, 0]) * 3 == pytest.approx(round(float(found[0, 0]) * 3), abs=1e-5)


def test_size_counts_every_parameter_of_the_model(real: RealScenario) -> None:
    sizes = torch.tensor([real.group_sizes], dtype=torch.float32)
    dense = real.cost(sizes, torch.eye(real.num_exits)[-1:], torch.ones(1))
    assert float(dense.size_ratio) == 1.0
    assert float(dense.parameters) == sum(p.numel() for p in real.student.model.parameters())
    first = real.cost(sizes, torch.eye(real.num_exits)[:1], torch.full((1,), 0.5))
    assert float(first.size_ratio) < 1.0


def test_the_step_size_is_the_control_in_the_units_of_the_optimizer(real: RealScenario) -> None:
    rate, start = real.config.train.learning_rate, real._start_rate
    assert real.step_size(start) == pytest.approx(rate)
    assert real.step_size(4 * start) == pytest.approx(rate * 4**real.config.train.rate_exponent)
    at_once = dataclasses.replace(real.config.train, warmup=0.0, floor=1.0)  # the schedule changes nothing
    scenario = dataclasses.replace(real, config=dataclasses.replace(real.config, train=at_once))
    students = scenario.students(1)
    students.reset([task_of(scenario, 3)])
    setting = with_values(published_setting(ControlConfig())[None], {"learning_rate": 2 * start}, ControlConfig())
    students.train_window(decode(setting, ControlConfig(), 2))
    (used,) = {group["lr"] for group in students._optimizer.param_groups}
    assert used == pytest.approx(scenario.step_size(2 * start), rel=1e-4)
