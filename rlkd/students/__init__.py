"""Students under training: many in lock-step (`Population`) or one ordinary module (`SoloStudent`)."""

from rlkd.students.interface import Controls, Metrics, Students, Telemetry, TrainConfig
from rlkd.students.population import Population
from rlkd.students.solo import SoloStudent

__all__ = ["Controls", "Metrics", "Population", "SoloStudent", "Students", "Telemetry", "TrainConfig"]
