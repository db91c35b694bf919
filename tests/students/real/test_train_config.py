"""Settings of a real student's training."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from module_students import TRAIN, student_of

from rlkd.errors import UserError
from rlkd.students.real.train_config import ModuleTrainConfig

WRONG: dict[str, Callable[[], ModuleTrainConfig]] = {
    "micro_batches": lambda: replace(TRAIN, micro_batches=13),
    "learning_rate": lambda: replace(TRAIN, learning_rate=-1.0),
    "warmup": lambda: replace(TRAIN, warmup=1.0),
    "rate_exponent": lambda: replace(TRAIN, rate_exponent=1.5),
    "device": lambda: replace(TRAIN, device="gpu"),
    "steps_per_window": lambda: replace(TRAIN, steps_per_window=0),
    "max_rollbacks": lambda: replace(TRAIN, max_rollbacks=-1),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_training(name: str) -> None:
    with pytest.raises(UserError, match=name):
        student_of(config=WRONG[name]())


def test_auto_places_on_what_there_is() -> None:
    pytest.importorskip("accelerate", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert replace(TRAIN, device="auto").torch_device().type == expected
