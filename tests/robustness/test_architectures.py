"""Architectures of unusual build go from files to a shipped student, as experiments/architectures.py tries them all."""

from pathlib import Path

import pytest
import tiny_models
from architectures import ARCHITECTURES, try_architecture

from rlkd.compression.real.trial import TOLERANCE

tiny_models.need_transformers()
UNUSUAL = [  # each was refused, or failed after its training
    ("texts", "Deberta"),  # the counter of work met an assertion
    ("images", "Pvt"),  # nested lists of blocks, no names of classes
    ("texts", "Canine"),  # characters, pooled
    ("texts", "SqueezeBert"),  # convolutions in place of linear layers
    ("texts", "Funnel"),  # pooled tokens
]


@pytest.mark.parametrize(("task", "family"), UNUSUAL)
def test_an_unusual_architecture_runs_with_the_controls_that_it_bears(
    task: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    row = try_architecture(task, family, tmp_path)
    assert row.outcome == "runs"
    assert row.difference < TOLERANCE
    assert row.controls


def test_the_page_of_docs_lists_the_architectures_that_the_script_tries() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "architectures.md").read_text()
    num_families = sum(len(families.split()) for families in ARCHITECTURES.values())
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| architecture")]
    assert len(rows) == num_families >= 40
    differences = [float(row.split("|")[7]) for row in rows if row.split("|")[7].strip()]
    assert len(differences) >= 40
    assert max(differences) < TOLERANCE
    assert all("refused before training: " in row for row in rows if not row.split("|")[7].strip())
