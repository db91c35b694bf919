"""Hold the records of a run folder for reports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.agents.evaluation.events import Scalars


@dataclass(frozen=True)
class Run:
    """Content of one run folder."""

    folder: Path
    scalars: Scalars  # steps and values of every tag
    result: dict[str, Any] | None  # result.json; None if the run did not get to its end
    texts: dict[str, str]  # command.txt, versions.json, config.yaml, as far as they exist
    notes: tuple[str, ...] = ()  # what could not be read of the event files
    windows: tuple[dict[str, Any], ...] = ()  # controls and validation metrics of the one student, a row a window
    date: str = ""  # of the last event file

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def label(self) -> str:
        """The name for a legend, where matplotlib reads dollar signs as formulas and hides what begins with "_"."""
        text = self.name.replace("$", r"\$")
        return f" {text}" if text.startswith("_") else text
