"""Loss terms, one file per kind of knowledge, and the weighted objective that trains a student."""

from rlkd.losses.attention import attention_transfer
from rlkd.losses.feature import hint
from rlkd.losses.hard_label import cross_entropy
from rlkd.losses.objective import FAMILIES, family_losses, losses_of, token_losses_of
from rlkd.losses.response import response
from rlkd.losses.tokens import (
    TopK,
    token_cross_entropy,
    token_response_top_k,
    top_k,
)

__all__ = [
    "FAMILIES",
    "TopK",
    "attention_transfer",
    "cross_entropy",
    "family_losses",
    "hint",
    "losses_of",
    "response",
    "token_cross_entropy",
    "token_losses_of",
    "token_response_top_k",
    "top_k",
]
