"""Loss terms, one file per kind of knowledge, their registry, and the weighted objective that trains a student."""

from rlkd.losses.adversarial import Discriminator
from rlkd.losses.attention import attention_transfer, transformer_attention, value_relation
from rlkd.losses.feature import FSP, activation_boundary, fsp, fsp_matrix, hint, normalised_hint, similarity_preserving
from rlkd.losses.gradient import gradient_cosine, gradient_penalty, jacobian_matching, logit_gradient, loss_gradient
from rlkd.losses.hard_label import cross_entropy, label_smoothing
from rlkd.losses.objective import DEFAULT_TERMS, LossConfig, Objective
from rlkd.losses.registry import FAMILIES, PUBLISHED, RIDES, SIGNALS, TERMS, Term, term
from rlkd.losses.relation import (
    CRD,
    MemoryCRD,
    correlation_congruence,
    probabilistic_transfer,
    rkd_angle,
    rkd_distance,
    sample_graph,
)
from rlkd.losses.response import (
    confidence_weighted,
    decoupled,
    dist,
    jensen_shannon,
    per_sample_temperature,
    response,
    reverse_kl,
    standardised,
)
from rlkd.losses.self_distillation import mutual, self_distillation
from rlkd.losses.tokens import (
    TopK,
    token_cross_entropy,
    token_response_top_k,
    top_k,
)

__all__ = [
    "CRD",
    "DEFAULT_TERMS",
    "FAMILIES",
    "FSP",
    "PUBLISHED",
    "RIDES",
    "SIGNALS",
    "TERMS",
    "Discriminator",
    "LossConfig",
    "MemoryCRD",
    "Objective",
    "Term",
    "TopK",
    "activation_boundary",
    "attention_transfer",
    "confidence_weighted",
    "correlation_congruence",
    "cross_entropy",
    "decoupled",
    "dist",
    "fsp",
    "fsp_matrix",
    "gradient_cosine",
    "gradient_penalty",
    "hint",
    "jacobian_matching",
    "jensen_shannon",
    "label_smoothing",
    "logit_gradient",
    "loss_gradient",
    "mutual",
    "normalised_hint",
    "per_sample_temperature",
    "probabilistic_transfer",
    "response",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "sample_graph",
    "self_distillation",
    "similarity_preserving",
    "standardised",
    "term",
    "token_cross_entropy",
    "token_response_top_k",
    "top_k",
    "transformer_attention",
    "value_relation",
]
