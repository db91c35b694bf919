"""Metrics of a student beside its teacher: agreement, calibration, robustness, classes, transfer."""

from rlkd.metrics.answers import (
    accuracy_by_class,
    agreement,
    calibration_error,
    divergence,
    knowledge_coverage,
    tail_accuracy,
)
from rlkd.metrics.robustness import CORRUPTIONS, corrupted, fgsm, pgd

__all__ = [
    "CORRUPTIONS",
    "accuracy_by_class",
    "agreement",
    "calibration_error",
    "corrupted",
    "divergence",
    "fgsm",
    "knowledge_coverage",
    "pgd",
    "tail_accuracy",
]
