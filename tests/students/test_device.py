"""Where a population lives: shown on the CPU with tensors that have shapes and a device, but no values.

A fake tensor's operations refuse to mix devices, as a GPU's do. "meta" stands for the GPU here; tests on a real one are
in test_population_cuda.py.
"""

import dataclasses
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlkd.data import Range, draw_task
from rlkd.envs import EnvConfig, Scenario
from rlkd.errors import UserError
from rlkd.models import GateConfig, StudentConfig, build_student
from rlkd.students import Controls, Population, TrainConfig
from rlkd.students.recorded import recorded

META = torch.device("meta")
STUDENTS = {
    "mlp": StudentConfig(),
    "conv": StudentConfig("conv", (4, 8), (1,)),
    "gated": StudentConfig(widths=(12, 12, 12), exits=(1, 2), gate=GateConfig(enabled=True)),
}


def exit_cost(kept: Tensor) -> Tensor:
    assert kept.device.type == "cpu"
    return torch.zeros(len(kept), 3, 2)


@pytest.fixture(params=STUDENTS)
def elsewhere(scenario: Scenario, request: pytest.FixtureRequest) -> Iterator[Population]:
    """Four students on another device; the gated ones have three teachers each."""
    count = 3 if request.param == "gated" else 1
    distribution = dataclasses.replace(scenario.config.task, num_teachers=Range(count, count))
    structure = build_student(STUDENTS[request.param], scenario.data.input_shape, scenario.data.num_classes)
    tasks = [draw_task(seed, distribution, scenario.data, 3) for seed in range(4)]
    all_rows, some_rows = torch.arange(4), torch.tensor([1, 3])
    with (
        patch.object(TrainConfig, "torch_device", lambda self: META),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        students = Population(
            structure, scenario.data, scenario.signals, 4, TrainConfig(2, 8), exit_cost, max_teachers=count
        )
        students.reset(tasks, all_rows)
        students.reset(tasks[:2], some_rows)
        yield students


def controls() -> Controls:
    one = torch.ones(4)
    return Controls(torch.full((4, 4), 0.25), one, one, one, one, one)


def devices(tensors: object) -> set[str]:
    if isinstance(tensors, Tensor):
        return {tensors.device.type}
    if dataclasses.is_dataclass(tensors):
        return devices(vars(tensors))
    if isinstance(tensors, dict):
        return devices(list(tensors.values()))
    assert isinstance(tensors, list | tuple)
    return {device for part in tensors for device in devices(part)}


def test_all_that_training_touches_is_on_the_device_and_all_that_goes_out_is_not(elsewhere: Population) -> None:
    judged = []

    def judge(finite: Tensor) -> np.ndarray:
        judged.append(finite.device.type)
        return np.zeros(4, dtype=bool)  # a fake tensor has no values to look at

    with patch.object(elsewhere._rollbacks, "judge", judge):
        elsewhere.weigh_teachers(torch.ones(4, 3))
        for _ in range(2):
            out = [elsewhere.train_window(controls()), elsewhere.evaluate("validation"), elsewhere.masks()]
    assert judged == ["cpu", "cpu"]
    elsewhere.copy_rows(torch.tensor([0, 0, 1, 2]))
    elsewhere.set_exit(torch.ones(4))
    out += [elsewhere.evaluate("test"), elsewhere.state_dict(), elsewhere.training_state(), elsewhere.masks()]
    assert devices(out) == {"cpu"}
    inside = [elsewhere._trained(), elsewhere._masks, elsewhere._threshold, elsewhere._samples, elsewhere._labels]
    inside += [elsewhere._data, vars(elsewhere._teachers)]
    assert devices([part for part in inside if not dataclasses.is_dataclass(part)]) == {"meta"}
    assert devices([elsewhere._data.inputs, elsewhere._data.labels, elsewhere._data.splits]) == {"meta"}
    assert devices([elsewhere._signals.logits, elsewhere._signals.features, elsewhere._signals.maps]) == {"meta"}


def test_a_state_of_the_cpu_goes_on_elsewhere(elsewhere: Population) -> None:
    state = elsewhere.training_state()
    generators = torch.stack([g.get_state() for g in elsewhere._batches])
    with patch.object(elsewhere, "_batches", []):
        elsewhere.load_training_state({**state, "batches": generators[:0]})
    assert devices([elsewhere._trained(), elsewhere._masks, elsewhere._threshold]) == {"meta"}


@pytest.mark.parametrize("given", ["gpu", "cuda:99", "cuda:-1", "CPU", "meta", "cuda:"])
def test_a_device_that_torch_does_not_find_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=f"train.device: got '{given}', which torch does not find here; allowed: cpu"):
        EnvConfig(train=TrainConfig(device=given)).check()


def test_cuda_means_the_gpu_that_is_current() -> None:
    with patch("torch.cuda.device_count", lambda: 2), patch("torch.cuda.current_device", lambda: 1):
        assert TrainConfig(device="cuda").torch_device() == torch.device("cuda", 1)
        assert TrainConfig(device="cuda:0").torch_device() == torch.device("cuda", 0)
        with pytest.raises(UserError, match="got 'cuda:2'"):
            TrainConfig(device="cuda:2").torch_device()
    with patch("torch.cuda.device_count", lambda: 0), pytest.raises(UserError, match="got 'cuda'"):
        TrainConfig(device="cuda").torch_device()


def test_nothing_is_recorded_on_the_cpu() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (x + 1,)

    assert recorded(function, torch.device("cpu")) is function
