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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_device_map": "auto"}, "teacher_shard, teacher_device_map: got both; allowed: one"),
        (
            {"teacher_signals": "answers"},
            "teacher_signals, teacher_url: got .*teacher_shard .*which need the teacher's weights",
        ),
    ],
)
def test_a_sharded_teacher_has_all_of_its_weights_here(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RealConfig("teacher", "data", teacher_shard=True, **options).check()  # type: ignore[arg-type]
