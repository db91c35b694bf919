"""Results of a study: a page, and its numbers with the state of the repository."""

from pathlib import Path
from typing import Any

from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.runs.folder import git_state


def write_results(docs: Path | None, page: str, numbers: dict[str, Any]) -> None:
    """Print the page; where a path without ending is given, write the page to `.md` and the numbers to `.json`."""
    print(page)
    if docs is not None:
        write_whole(docs.with_suffix(".md"), page)
        write_json(docs.with_suffix(".json"), {**numbers, **git_state(Path(__file__).resolve().parent.parent)})
