from pathlib import Path
from typing import Any

import pytest

from rlkd.agents.ppo.train import PPOConfig
from rlkd.cli.arguments import add_run_options, config_names, new_parser, parse
from rlkd.configs import CompareConfig, DistilConfig, ExperimentConfig
from rlkd.configs.schema import ScenarioConfig
from rlkd.data import Range, TaskDistribution
from rlkd.envs import ControlConfig
from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError
from rlkd.io.records import plain
from rlkd.io.settings import with_types
from rlkd.runs.folder import describe_run

KINDS = {
    "conv": DistilConfig,
    "wide": DistilConfig,
    "default": ExperimentConfig,
    "full": ExperimentConfig,
    "smoke": ExperimentConfig,
}
COMPARISONS = [name for name in config_names() if name.startswith("compare/")]


def test_every_config_is_tested() -> None:
    assert set(config_names()) == {*KINDS, *COMPARISONS}
    assert len(COMPARISONS) >= 8


@pytest.mark.parametrize("name", KINDS)
def test_configs_parse_and_are_possible(name: str) -> None:
    config, _ = parse(new_parser("x", "", [""]), ["--config", name], KINDS[name])
    assert config is not None
    config.check()
    assert with_types(config, "config") == config


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_parse_and_are_possible(name: str) -> None:
    config, _ = parse(new_parser("compare", "", [""]), ["--config", name, "--policy", "some"], CompareConfig)
    assert config is not None
    config.check()
    assert with_types(config, "config") == config


@pytest.mark.parametrize("name", ["default", "full"])
def test_policies_are_chosen_on_scenarios_that_are_neither_trained_nor_reported_on(name: str) -> None:
    config, _ = parse(new_parser("train", "", [""]), ["--config", name], ExperimentConfig)
    assert isinstance(config, ExperimentConfig)
    assert len(config.validation) >= 2
    assert config.task.floor_share > 0.5
    assert set(config.comparison.keeps) == {0.95, 0.98, 1.0}
    trained = [(scenario.dataset, scenario.student.widths) for scenario in config.scenarios]
    assert len(trained) == len(config.scenarios) >= 3
    for scenario in config.validation:
        assert (scenario.dataset, scenario.student.widths) not in trained


def test_scenarios_share_tasks_and_controls_and_have_the_rest_of_their_own() -> None:
    config = ExperimentConfig(
        scenarios=(
            ScenarioConfig(),
            ScenarioConfig("generated:classes=4", num_windows=5, warm_windows=2, label_noise=Range(0.0, 0.3)),
        ),
        task=TaskDistribution(floor_share=0.4),
        controls=ControlConfig(step=0.1),
    )
    config.check()
    first, second = config.envs(config.scenarios)
    assert (first.task.dataset, second.task.dataset) == ("digits", "generated:classes=4")
    assert (first.num_windows, first.warm_windows, second.num_windows, second.warm_windows) == (12, 0, 5, 2)
    assert first.task.floor_share == second.task.floor_share == 0.4
    assert (first.task.label_noise, second.task.label_noise) == (config.task.label_noise, Range(0.0, 0.3))
    assert first.controls == second.controls == ControlConfig(step=0.1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ExperimentConfig(scenarios=()), "scenarios: got none"),
        (ExperimentConfig(task=TaskDistribution("letter")), "task.dataset: got 'letter', but the first scenario has"),
        (ExperimentConfig(validation=(ScenarioConfig(),)), "validation: digits with the student .48, 48. is one of"),
        (ExperimentConfig(scenarios=(ScenarioConfig(num_windows=0),)), "num_windows: got 0"),
        (ExperimentConfig(validation=(ScenarioConfig("digitz"),)), "digitz"),
        (ExperimentConfig(keep_checkpoints=0), "keep_checkpoints: got 0"),
    ],
)
def test_impossible_experiments_are_refused(config: ExperimentConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.check()


@pytest.mark.parametrize(
    "config",
    [ExperimentConfig(), CompareConfig(policy="some"), DistilConfig(), RealConfig("models/bert", "reviews.csv")],
    ids=lambda config: type(config).__name__,
)
def test_what_a_run_writes_of_its_config_reads_back_to_the_letter(config: Any, tmp_path: Path) -> None:
    describe_run(tmp_path, config, 5)
    parser = new_parser("x", "", [""])
    add_run_options(parser)
    read, options = parse(parser, ["--config", str(tmp_path / "config.yaml")], type(config))
    assert repr(plain(read)) == repr(plain(config))  # as text: 60 and 60.0 are two keys of a journal
    assert options.seed == 5


def test_a_rollout_of_one_sample_is_refused() -> None:
    def experiment(num_windows: int, num_students: int) -> ExperimentConfig:
        return ExperimentConfig((ScenarioConfig(num_windows=num_windows),), ppo=PPOConfig(num_students=num_students))

    with pytest.raises(UserError, match="got 1 with one scenario of num_windows 1; allowed: at least 2 of either"):
        experiment(1, 1).check()
    experiment(2, 1).check()
    experiment(1, 2).check()
