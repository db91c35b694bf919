"""A small scenario on real digits: three quick teachers and a cost profile written by hand, so nothing is timed."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlkd.cost import CostConfig, CostProfile, save_profile
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.data.datasets import DATASETS
from rlkd.envs import EnvConfig, Scenario, build_scenario
from rlkd.envs.references import References
from rlkd.losses import registry
from rlkd.models import StudentConfig
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig

TEACHERS = TeacherConfig(num_samples=(40, 300, 897), num_steps=100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "robustness" in item.path.parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    """Take names that a test registers away again, so that other tests find what comes with rlkd."""
    terms, datasets = dict(registry._TERMS), dict(DATASETS)
    yield
    for table, before in ((registry._TERMS, terms), (DATASETS, datasets)):
        table.clear()
        table.update(before)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "cost.json"
    coefficients = (5e-6, 1e-5, 2e-11, 3e-11, 0.0, 4e-8, 3e-7, 3e-10)
    save_profile(CostProfile(256, coefficients, dict(ENERGY_MODEL), {"latency": "written by hand"}), path)
    return path


@pytest.fixture(scope="session")
def config(profile_file: Path) -> EnvConfig:
    return EnvConfig(num_windows=4, teacher=TEACHERS, cost=CostConfig(profile=str(profile_file)))


@pytest.fixture(scope="session")
def scenario(config: EnvConfig) -> Scenario:
    return build_scenario(config)


@pytest.fixture(scope="session")
def goal_scenario(scenario: Scenario) -> Scenario:
    """The same scenario, whose tasks have floors, latency limits, or weights alone."""
    task = dataclasses.replace(scenario.config.task, floor_share=0.6, limit_share=0.5)
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, task=task), known=References())


@pytest.fixture(scope="session")
def other_scenario(goal_scenario: Scenario) -> Scenario:
    """Another data set, student, horizon and step size, under goals of the same distribution."""
    config = goal_scenario.config
    return build_scenario(
        dataclasses.replace(
            config,
            num_windows=3,
            warm_windows=1,
            task=dataclasses.replace(config.task, dataset="generated:classes=4,inputs=6"),
            student=StudentConfig(widths=(8, 8, 8), exits=(2,)),
            train=TrainConfig(steps_per_window=4, batch_size=16),
        )
    )


@pytest.fixture
def double_scenario(scenario: Scenario) -> Iterator[Scenario]:
    """The same scenario in double precision, where Adam cannot blow rounding up to something visible."""
    s = scenario.signals
    signals = dataclasses.replace(s, logits=s.logits.double(), features=s.features.double(), maps=s.maps.double())
    data = dataclasses.replace(scenario.data, inputs=scenario.data.inputs.double())
    template = copy.deepcopy(scenario.template).double()
    start = scenario.start.double()
    double = dataclasses.replace(
        scenario, data=data, signals=signals, template=template, start=start, known=References()
    )
    torch.set_default_dtype(torch.float64)
    yield double
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def tiny(profile_file: Path) -> list[str]:
    """Options that make `rlkd train` a matter of seconds."""
    main = (
        f"num_windows: 3, train: {{steps_per_window: 3, batch_size: 16}}, cost: {{profile: {profile_file}}}, "
        "teacher: {num_samples: [40, 897], num_steps: 60}"
    )
    return [
        *("--config", "smoke", "--scenarios", f"[{{{main}}}]"),
        *("--validation", f"[{{{main}, student: {{widths: [12, 8]}}}}]"),
        *("--search.num_settings", "3", "--comparison.num_tasks", "8"),
    ]


@pytest.fixture(scope="session")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `rlkd train`; a test that changes it copies it first."""
    from rlkd.cli.main import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *tiny, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_scenario(profile_file: Path) -> list[str]:
    """Options of the scenario of `tiny`, for `rlkd compare`."""
    return [
        *("--cost.profile", str(profile_file), "--teacher.num_samples", "[40, 897]", "--teacher.num_steps", "60"),
        *("--num_windows", "3", "--train.steps_per_window", "3", "--train.batch_size", "16"),
        *("--search.num_settings", "3", "--search.tasks_per_setting", "4", "--search.num_finalists", "2"),
        *("--search.tasks_per_finalist", "4", "--comparison.num_tasks", "8", "--comparison.keeps", "[0.98]"),
    ]
