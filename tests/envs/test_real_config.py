"""What `rlkd distil` is given for a real model."""

from pathlib import Path

import pytest

from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.hardware import FOLDER


def test_a_profile_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"hardware: got 'gpuu'; allowed: .*did you mean gpu"):
        RealConfig("teacher", "data", hardware="gpuu").check()


def test_the_cost_profile_is_measured_as_the_target_runs(tmp_path: Path) -> None:
    text = (FOLDER / "cpu.yaml").read_text().replace("threads: 1", "threads: 4").replace("[1, 32]", "[2, 16]")
    (tmp_path / "board.yaml").write_text(text)
    board = str(tmp_path / "board.yaml")
    assert RealConfig("teacher", "data").timed() == (1, (1, 8, 32))
    assert RealConfig("teacher", "data", hardware=board).timed() == (4, (2, 16))
    assert RealConfig("teacher", "data", hardware="edge").timed() == (1, (1,))
    given = RealCostConfig(threads=2, batches=())
    assert RealConfig("teacher", "data", hardware=board, cost=given).timed() == (2, ())
