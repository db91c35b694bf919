"""Which inputs and units a student keeps, when it may exit, and the physically smaller student that remains."""

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
