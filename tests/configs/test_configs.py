from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkd.agents.ppo.train import PPOConfig
from rlkd.cli.arguments import add_run_options, config_names, new_parser, parse
from rlkd.configs import CompareConfig, ExperimentConfig, ReplayConfig
from rlkd.envs.real import RealConfig
from rlkd.errors import UserError
from rlkd.io.records import plain
from rlkd.runs.folder import describe_run

KINDS = {"conv": ReplayConfig, "wide": ReplayConfig, "default": ExperimentConfig, "smoke": ExperimentConfig}
COMPARISONS = [name for name in config_names() if name.startswith("compare/")]


def test_every_config_is_tested() -> None:
    assert set(config_names()) == {*KINDS, *COMPARISONS}
    assert len(COMPARISONS) >= 8


@pytest.mark.parametrize("name", KINDS)
def test_configs_parse_and_are_possible(name: str) -> None:
    config, _ = parse(new_parser("x", "", [""]), ["--config", name], KINDS[name])
    assert config is not None
    config.check()


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_parse_and_are_possible(name: str) -> None:
    config, _ = parse(new_parser("compare", "", [""]), ["--config", name, "--policy", "some"], CompareConfig)
    assert config is not None
    config.check()


def test_the_default_config_is_the_default_on_more_data_sets() -> None:
    config, _ = parse(new_parser("train", "", [""]), ["--config", "default"], ExperimentConfig)
    assert isinstance(config, ExperimentConfig)
    assert len(config.also) == 11
    assert replace(config, also=()) == ExperimentConfig()


@pytest.mark.parametrize(
    "config",
    [ExperimentConfig(), CompareConfig(policy="some"), ReplayConfig(), RealConfig("models/bert", "reviews.csv")],
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
    with pytest.raises(UserError, match="got 1 with num_windows 1; allowed: at least 2 of either"):
        ExperimentConfig(num_windows=1, ppo=PPOConfig(num_students=1)).check()
    ExperimentConfig(num_windows=2, ppo=PPOConfig(num_students=1)).check()
    ExperimentConfig(num_windows=1, ppo=PPOConfig(num_students=2)).check()
