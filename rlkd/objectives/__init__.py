"""Loss terms, one file per kind of knowledge, and the weighted objective that trains a student."""

from rlkd.objectives.attention import attention_map, attention_transfer
from rlkd.objectives.feature import hint
from rlkd.objectives.hard_label import cross_entropy
from rlkd.objectives.objective import FAMILIES, family_losses
from rlkd.objectives.response import response

__all__ = ["FAMILIES", "attention_map", "attention_transfer", "cross_entropy", "family_losses", "hint", "response"]
