import pytest

from rlkd.cli.arguments import config_names, new_parser, parse
from rlkd.configs import ExperimentConfig, ReplayConfig

KINDS = {"conv": ReplayConfig, "wide": ReplayConfig, "default": ExperimentConfig, "smoke": ExperimentConfig}


def test_every_config_is_tested() -> None:
    assert set(config_names()) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_configs_parse_and_are_possible(name: str) -> None:
    config, _ = parse(new_parser("x", "", [""]), ["--config", name], KINDS[name])
    assert config is not None
    config.check()


def test_the_default_config_is_the_default() -> None:
    config, _ = parse(new_parser("train", "", [""]), ["--config", "default"], ExperimentConfig)
    assert config == ExperimentConfig()
