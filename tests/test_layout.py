"""The packaging that keeps generic names out of the way; `make lint` checks the layers with import-linter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {"envs", "agents", "configs", "runs", "cli"}


def core_sources() -> list[Path]:
    return [p for p in sorted((ROOT / "rlkd").rglob("*.py")) if p.relative_to(ROOT / "rlkd").parts[0] not in ABOVE]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_core_knows_no_reinforcement_learning() -> None:
    for path in core_sources():
        assert not {name for name in imported(path) if name.startswith(("gymnasium", "stable_baselines3"))}, path


def test_every_package_folder_is_installed() -> None:
    # read as text: tomllib came with Python 3.11
    listed = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    named = {line.strip().strip('",') for line in listed.splitlines() if line.strip()}
    tops = {"rlkd": ROOT / "rlkd", **{f"rlkd.{n}": ROOT / n for n in ("envs", "agents", "configs")}}
    found = set()
    for name, top in tops.items():
        for init in top.rglob("__init__.py"):
            parts = init.parent.relative_to(top).parts
            if name == "rlkd" and parts and parts[0] in ("envs", "agents", "configs"):
                continue  # links for type checkers
            found.add(".".join([name, *parts]))
    assert found == named


@pytest.mark.parametrize("name", ["envs", "agents", "configs"])
def test_bare_names_refuse_to_be_imported(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"import this package as rlkd.{name}" in done.stderr
