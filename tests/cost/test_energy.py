import sys
from pathlib import Path

import pytest
import torch

from rlkd.cost.energy import (
    Counter,
    board_joules,
    estimate_energy,
    joules_between,
    measure_energy,
    nvml_counter,
    rapl_counter,
    rapl_counters,
)


def package(root: Path, number: int, microjoules: int = 1000, span: int = 9999) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_packages_are_read_and_their_parts_are_not(tmp_path: Path) -> None:
    first = package(tmp_path, 0)
    package(tmp_path, 1, span=500)
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "energy_uj").write_text("7")
    assert [(path.parent.name, span) for path, span in rapl_counters(tmp_path)] == [
        ("intel-rapl:0", 9999),
        ("intel-rapl:1", 500),
    ]
    (first / "energy_uj").unlink()
    assert rapl_counters(tmp_path) == []  # half of the machine is no answer


def test_a_counter_that_passed_its_range_began_anew() -> None:
    assert joules_between([9_000_000], [9_500_000], [9_999_999]) == pytest.approx(0.5)
    assert joules_between([9_900_000], [100_000], [9_999_999]) == pytest.approx(0.2)


def test_energy_of_a_sample_by_the_counter(tmp_path: Path) -> None:
    folder = package(tmp_path, 0, 0, 10**12)
    calls = []

    def call() -> None:
        calls.append(1)
        (folder / "energy_uj").write_text(str(3_000_000 * len(calls)))  # three joules a call

    counter = rapl_counter(tmp_path)
    assert counter is not None
    energy = measure_energy(call, 4, counter)
    assert energy is not None
    assert energy.joules == pytest.approx(0.75)
    assert energy.kind.startswith("measured")


def test_without_a_counter_there_is_an_estimate_that_says_so(tmp_path: Path) -> None:
    assert rapl_counter(tmp_path) is None
    one, many = estimate_energy(1e6, 1000, 1), estimate_energy(1e6, 1000, 1000)
    assert one.kind.startswith("modelled")
    assert one.joules == pytest.approx(1e6 * 4.6e-12 + 1000 * 50e-12)
    assert many.joules < one.joules
    assert estimate_energy(1e6, 1000, 1, "int8").joules == pytest.approx(1e6 * 0.3e-12 + 1000 * 12.5e-12)


def test_joules_of_a_board_are_of_millijoules_and_need_a_counter_that_advanced() -> None:
    assert board_joules([52_417_903], [53_120_403]) == pytest.approx(702.5)
    assert board_joules([52_417_903], [52_417_903]) is None  # read again before it was refreshed
    assert board_joules([52_417_903], [1_204]) is None  # the driver was loaded anew


def test_energy_of_a_sample_by_a_board_s_counter() -> None:
    calls: list[int] = []
    counter = Counter("measured (NVML, whole GPU)", lambda: [7_000_000 + 4_500 * len(calls)], board_joules, 0.01)
    energy = measure_energy(lambda: calls.append(1), 3, counter)
    assert energy is not None
    assert energy.joules == pytest.approx(1.5)
    assert energy.kind == "measured (NVML, whole GPU)"
    still = Counter("measured (NVML, whole GPU)", lambda: [7_000_000], board_joules, 0.01)
    assert measure_energy(lambda: None, 3, still) is None


def test_a_missing_package_for_nvml_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert nvml_counter(torch.device("cuda", 0)) is None
    (line,) = caplog.messages
    assert "needs the package nvidia-ml-py; run `pip install 'rlkd[gpu]'`" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nvml_without_a_driver_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pynvml", reason="the extra gpu is not installed: pip install 'rlkd[gpu]'")
    assert nvml_counter(torch.device("cuda", 0)) is None
    (line,) = caplog.messages
    assert line.startswith("energy is an estimate: the GPU's counter cannot be read (")
