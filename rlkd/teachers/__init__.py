"""Teachers and the signals they give for every sample, computed once."""

from rlkd.teachers.signals import Signals, compute_signals
from rlkd.teachers.training import TeacherConfig, cache_dir, load_teachers

__all__ = ["Signals", "TeacherConfig", "cache_dir", "compute_signals", "load_teachers"]
