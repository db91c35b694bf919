from pathlib import Path

import pytest

from rlkd.cost.energy import estimate_energy, joules_between, measure_energy, rapl_counters


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

    energy = measure_energy(call, 4, tmp_path)
    assert energy is not None
    assert energy.joules == pytest.approx(0.75)
    assert energy.kind.startswith("measured")


def test_without_a_counter_there_is_an_estimate_that_says_so(tmp_path: Path) -> None:
    assert measure_energy(lambda: None, 1, tmp_path) is None
    one, many = estimate_energy(1e6, 1000, 1), estimate_energy(1e6, 1000, 1000)
    assert one.kind.startswith("modelled")
    assert one.joules == pytest.approx(1e6 * 4.6e-12 + 1000 * 50e-12)
    assert many.joules < one.joules
    assert estimate_energy(1e6, 1000, 1, "int8").joules == pytest.approx(1e6 * 0.3e-12 + 1000 * 12.5e-12)
