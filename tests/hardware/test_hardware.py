from pathlib import Path

import pytest

from rlkd.errors import UserError
from rlkd.hardware import FOLDER, hardware_names, load_hardware


def test_profiles_that_come_with_rlkd_can_be_read() -> None:
    assert hardware_names() == ["cpu", "edge", "gpu"]
    cpu, edge, gpu = map(load_hardware, hardware_names())
    assert (cpu.device, gpu.device) == ("cpu", "gpu")
    assert cpu.missing_operators(["If", "Gemm"]) == []
    assert edge.missing_operators(["If", "Gemm", "TopK"]) == ["If", "TopK"]


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    text = (FOLDER / "cpu.yaml").read_text().replace("threads: 1", "threads: 4")
    (tmp_path / "board.yaml").write_text(text)
    board = load_hardware(str(tmp_path / "board.yaml"))
    assert (board.name, board.threads) == ("board", 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("threads: 1", "threads: 0"), "threads is 0; allowed: an integer from 1"),
        (("device: cpu", "device: tpu"), "device is 'tpu'; allowed: cpu, gpu"),
        (("operators: all", "operators: [1]"), "operators is"),
        (("precisions: [float32, int8]", "precisions: [int3]"), "precisions is"),
        (("batch_sizes: [1, 32]", "batch_sizes: []"), "batch_sizes is"),
        (("threads: 1", "thread: 1"), "allowed: the keys"),
        (("threads: 1", "threads: [1"), "not a hardware profile"),
        (("threads: 1", "threads: !!python/object/apply:os.getpid []"), "not a hardware profile"),
    ],
)
def test_a_damaged_profile_is_one_line(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    (tmp_path / "mine.yaml").write_text((FOLDER / "cpu.yaml").read_text().replace(*change))
    with pytest.raises(UserError) as error:
        load_hardware(str(tmp_path / "mine.yaml"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_profile_names_the_closest() -> None:
    with pytest.raises(UserError, match="allowed: cpu, edge, gpu, or a YAML file; did you mean edge"):
        load_hardware("egde")
