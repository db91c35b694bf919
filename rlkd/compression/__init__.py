"""Selection of inputs, units and exits, and physically smaller students."""

from rlkd.compression.compact import CompactStudent, compact, load_student, save_student
from rlkd.compression.selection import exits_at, importance, keep_top, spread

__all__ = [
    "CompactStudent",
    "compact",
    "exits_at",
    "importance",
    "keep_top",
    "load_student",
    "save_student",
    "spread",
]
