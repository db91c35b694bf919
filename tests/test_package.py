"""The archives that are handed out: what stands in them, and a distillation with them alone, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import rlkd

ROOT = Path(__file__).parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "rlkd", "envs", "agents", "configs")
OPTIONS = [
    *("--goal.keep", "0.5", "--num_windows", "2", "--train.steps_per_window", "3", "--teacher.num_steps", "60"),
    *("--student.widths", "[12,8]"),
]


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an archive as pip does, with the installed setuptools instead of one from the network."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of this checkout, and the wheel that is built of it."""
    place = tmp_path_factory.mktemp("package")
    (place / "copy").mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, place / "copy" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, place / "copy" / name)
    sdist = build("sdist", place / "copy", place / "out")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    return sdist, build("wheel", place / "unpacked" / f"rlkd-{rlkd.__version__}", place / "out")


@pytest.mark.slow
def test_a_wheel_of_the_source_archive_distils_digits_from_anywhere(
    archives: tuple[Path, Path], tmp_path: Path, profile_file: Path
) -> None:
    sdist, wheel = archives
    assert (sdist.name, wheel.name) == (f"rlkd-{rlkd.__version__}.tar.gz", f"rlkd-{rlkd.__version__}-py3-none-any.whl")
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run(pip, check=True)
    for name in ("envs", "agents", "configs"):
        assert (place / "rlkd" / name / "__init__.py").is_file()
        assert not (place / name).exists()  # no generic name at the top
    data = {path.relative_to(ROOT / "rlkd") for path in (ROOT / "rlkd" / "policies").rglob("*.*")}
    data |= {Path("configs") / path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    data |= {Path("hardware") / path.name for path in (ROOT / "rlkd" / "hardware").glob("*.yaml")}
    assert [name for name in {*data, Path("py.typed")} if not (place / "rlkd" / name).is_file()] == []

    (tmp_path / "work").mkdir()
    own = {**os.environ, "PYTHONPATH": str(place)}
    code = "import rlkd, rlkd.envs, rlkd.configs; print(rlkd.__file__, rlkd.envs.__file__, rlkd.configs.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "work", env=own, capture_output=True, text=True, check=True
    )
    assert all(Path(path).is_relative_to(place) for path in found.stdout.split())
    call = [str(place / "bin" / "rlkd"), "distil", *OPTIONS, "--cost.profile", str(profile_file), "--out", "run"]
    done = subprocess.run(call, cwd=tmp_path / "work", env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "on test (floor " in done.stdout
    result = json.loads((tmp_path / "work" / "run" / "result.json").read_text())
    assert result["goal"]["keep"] == 0.5
    assert (tmp_path / "work" / "run" / "student" / "student.json").is_file()
