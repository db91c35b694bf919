"""Whole batches of student trainings as pieces of work: in this process, in several processes, or on a Ray cluster."""

from rlkd.workers.choose import KINDS, WorkersConfig, open_workers
from rlkd.workers.interface import IN_PROCESS, InProcess, Work, WorkerError, Workers, ignore

__all__ = [
    "IN_PROCESS",
    "KINDS",
    "InProcess",
    "Work",
    "WorkerError",
    "Workers",
    "WorkersConfig",
    "ignore",
    "open_workers",
]
