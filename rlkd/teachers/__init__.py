"""Teachers and the signals they give for every sample, computed once."""

from rlkd.teachers.signals import Signals, compute_signals
from rlkd.teachers.training import TeacherConfig, load_teachers

__all__ = ["Signals", "TeacherConfig", "compute_signals", "load_teachers"]
