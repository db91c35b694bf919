"""Tasks: a data set with its splits and corruptions, a teacher, a preference, and how to draw them."""

from rlkd.data.datasets import DATASETS, check_dataset, load_dataset, register_dataset
from rlkd.data.distribution import (
    Preference,
    Range,
    Task,
    TaskDistribution,
    draw_task,
    task_generator,
)
from rlkd.data.goal import Goal
from rlkd.data.samples import DataSet, Labelled, Split

__all__ = [
    "DATASETS",
    "DataSet",
    "Goal",
    "Labelled",
    "Preference",
    "Range",
    "Split",
    "Task",
    "TaskDistribution",
    "check_dataset",
    "draw_task",
    "load_dataset",
    "register_dataset",
    "task_generator",
]
