"""Loss terms, one file per kind of knowledge, and the weighted objective that trains a student."""

from rlkd.objectives.attention import attention_map, attention_transfer
from rlkd.objectives.feature import hint
from rlkd.objectives.hard_label import cross_entropy
from rlkd.objectives.objective import FAMILIES, family_losses, losses_of, token_losses_of
from rlkd.objectives.response import response
from rlkd.objectives.tokens import (
    TopK,
    next_token_mask,
    token_cross_entropy,
    token_response,
    token_response_top_k,
    top_k,
)

__all__ = [
    "FAMILIES",
    "TopK",
    "attention_map",
    "attention_transfer",
    "cross_entropy",
    "family_losses",
    "hint",
    "losses_of",
    "next_token_mask",
    "response",
    "token_cross_entropy",
    "token_losses_of",
    "token_response",
    "token_response_top_k",
    "top_k",
]
