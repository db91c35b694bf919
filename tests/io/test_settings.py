from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkd.configs import DistilConfig
from rlkd.data import Goal
from rlkd.envs.scenario import EnvConfig
from rlkd.errors import UserError
from rlkd.io.settings import with_settings
from rlkd.models import StudentConfig


def test_values_are_set_by_dotted_and_by_nested_names_and_become_what_the_field_is() -> None:
    settings = {
        "train.batch_size": np.int64(16),
        "student": {"widths": [8, 4], "exits": []},
        "task.label_noise": {"high": 1},
        "cost.profile": Path("cost.json"),
        "preference.accuracy": np.float32(0.5),
        "goal": Goal(keep=1, latency="2x"),
    }
    config = with_settings(DistilConfig(), settings)
    assert (type(config.train.batch_size), config.train.batch_size) == (int, 16)
    assert config.student.widths == (8, 4)
    assert config.student.exits == ()
    assert (type(config.task.label_noise.high), config.task.label_noise.low) == (float, 0.0)
    assert config.cost.profile == "cost.json"
    assert config.preference.accuracy == 0.5
    assert (config.goal.keep, config.goal.latency) == (1.0, "2x")
    assert with_settings(config, {"goal": {"keep": None}}).goal == Goal(latency="2x")
    assert with_settings(EnvConfig(), {"student": StudentConfig(widths=(4,), exits=())}).student.widths == (4,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preference.accuracy": "high"}, "options: preference.accuracy: got 'high'; allowed: a finite number or None"),
        ({"preference.accuracy": float("nan")}, "preference.accuracy: got nan; allowed: a finite number or None"),
        ({"train.batch_size": 16.5}, "train.batch_size: got 16.5; allowed: a whole number"),
        ({"train.batch_size": True}, "train.batch_size: got True; allowed: a whole number"),
        ({"train": 3}, "train: got 3; allowed: a TrainConfig, or a mapping with keys steps_per_window, batch_size"),
        ({"student.widths": 48}, "student.widths: got 48; allowed: a list, each entry a whole number"),
        ({"student.widths": [48, "a"]}, r"student.widths: got \[48, 'a'\]; allowed: a list"),
        ({"student.kind": "rnn"}, "student.kind: got 'rnn'; allowed: 'mlp' or 'conv'"),
        ({"goal": "0.98"}, "goal: got '0.98'; allowed: a Goal, or a mapping with keys keep, reference"),
        ({"goal": Goal(keep="0.98")}, "options: goal: keep: got '0.98'; allowed: a finite number or None"),  # type: ignore[arg-type]
        ({"guard.undo": "yes"}, "guard.undo: got 'yes'; allowed: True or False"),
        ({"num_windows.more": 3}, "num_windows has no parts"),
        ("num_windows=3", "options: got 'num_windows=3'; allowed: a mapping"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_allowed(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        with_settings(DistilConfig(), settings)
    assert "\n" not in str(error.value)
