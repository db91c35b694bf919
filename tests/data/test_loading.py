from pathlib import Path

import pytest

from rlkd.data.loading import load_table
from rlkd.data.rows import ColumnConfig
from rlkd.errors import UserError


def test_data_without_a_name_are_not_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\ngood film,pos\n")
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        with pytest.raises(UserError, match="data: got no name; allowed: a file or folder"):
            load_table(name, "sequence_classification", ColumnConfig(), "bert")
    assert load_table(".", "sequence_classification", ColumnConfig(), "bert").labels == ["pos"]
