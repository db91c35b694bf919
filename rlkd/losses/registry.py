"""The registry of loss terms: a function or a small module becomes a term by one decorator.

The parameters of a term are the names of signals (`SIGNALS`), so its signature says what it needs of student and
teacher. Objective, configuration, `rlkd list` and docs/knowledge.md are built from the entries.

A policy sets four weights, one a family. Every kind of knowledge beyond these four rides on one of them (`RIDES`), so
a policy learned with four terms drives a student with any number. The members of a family share its weight equally.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

from rlkd.errors import UserError

FAMILIES = ("hard_label", "response", "feature", "attention")
PUBLISHED = MappingProxyType({"hard_label": 0.5, "response": 0.3, "feature": 0.15, "attention": 0.05})

# Kind of knowledge -> the family whose weight it shares.
RIDES = MappingProxyType(
    {
        **{family: family for family in FAMILIES},
        "relation": "feature",  # relations between samples are computed from the same hidden features
        "gradient": "response",  # derivatives of the same logits
        "adversarial": "response",  # a learned distance between the same logits
        "self": "response",  # another exit or another student in the teacher's place
    }
)

# Name of a signal -> its shape and meaning. A term's parameters come from here.
SIGNALS = MappingProxyType(
    {
        "student_logits": "[B, C] of one exit; the loss is the mean over exits",
        "exit_logits": "a tuple of [B, C], one for each exit, the last exit last",
        "labels": "[B] int64",
        "temperature": "scalar above 0, a control",
        "teacher_logits": "[B, C]",
        "peer_logits": "[B, C] of another student in training",
        "student_features": "[B, U] of the last block, mean over positions",
        "adapted_features": "[B, F], `student_features` through the adapter",
        "teacher_features": "[B, F], scaled to a mean square of one over the train split",
        "student_map": "[B, P], where the last block is active, rows of unit norm",
        "teacher_map": "[B, P]",
        "student_first": "[B, U1] of the first block, mean over positions",
        "teacher_first": "[B, F1]",
        "student_attention": "[B, H, L, L], attention probabilities of the last layer",
        "teacher_attention": "[B, Ht, Lt, Lt]",
        "student_values": "[B, H, L, D], values of the last layer's attention",
        "teacher_values": "[B, Ht, L, Dt]",
        "student_input_gradient": "[B, N], of the logit of the class that the teacher finds likeliest",
        "teacher_input_gradient": "[B, N], likewise",
        "student_loss_gradient": "[B, N], of each sample's cross entropy by its inputs",
    }
)
SIZES = ("num_classes", "student_width", "teacher_width", "first_width", "teacher_first_width")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Term:
    """One entry of the registry."""

    name: str
    kind: str
    """A key of `RIDES`."""
    function: Callable[..., Any]
    """Takes the signals `needs` by name and returns a scalar; for a module, its class."""
    needs: tuple[str, ...]
    """Names from `SIGNALS`."""
    sizes: tuple[str, ...]
    """Names from `SIZES` that the constructor of a module takes."""
    paper: str
    """Link."""
    weight: float | None
    """Published weight beside a cross entropy of weight 1; None: the family's own in `PUBLISHED`."""

    @property
    def family(self) -> str:
        """The family whose weight the term shares."""
        return RIDES[self.kind]

    @property
    def scale(self) -> float:
        """Factor on the loss that gives the term its published weight where families have those of `PUBLISHED`."""
        return 1.0 if self.weight is None else self.weight * PUBLISHED["hard_label"] / PUBLISHED[self.family]

    @property
    def is_module(self) -> bool:
        """Whether the term has parameters of its own, which train with the student's."""
        return isinstance(self.function, type)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


_TERMS: dict[str, Term] = {}
TERMS = MappingProxyType(_TERMS)


def term(name: str, kind: str, paper: str, *, weight: float | None = None) -> Callable[[Function], Function]:
    """Register a function or a module class as a loss term; it stays usable as it is.

    Args:
        name: the published name, which configurations use.
        kind: a key of `RIDES`.
        paper: link.
        weight: published weight beside a cross entropy of weight 1, by default the family's.

    Raises:
        UserError: the name is taken or impossible, the kind is unknown, the weight is not above 0, or a parameter is
            not a name from `SIGNALS`.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        raise UserError(f"loss_term: got the name {name!r:.60}; allowed: letters, digits, _ and -")
    if kind not in RIDES:
        raise UserError(f"loss_term {name}: got kind {kind!r:.60}; allowed: {', '.join(RIDES)}")
    if weight is not None and not (isinstance(weight, int | float) and 0 < weight < math.inf):
        raise UserError(f"loss_term {name}: got weight {weight!r:.60}; allowed: a number above 0")

    def register(function: Function) -> Function:
        if name in _TERMS and _TERMS[name].function.__qualname__ != function.__qualname__:
            raise UserError(
                f"loss_term {name}: the name is taken by {_TERMS[name].function.__module__}; choose another"
            )
        is_module = isinstance(function, type) and issubclass(function, nn.Module)
        needs = _required(getattr(function, "forward", function) if is_module else function)
        sizes = _required(function.__init__) if is_module else ()
        unknown = [need for need in needs if need not in SIGNALS] + [size for size in sizes if size not in SIZES]
        if unknown:
            raise UserError(
                f"loss_term {name}: got parameters {', '.join(unknown)}; allowed without a default: "
                f"{', '.join(SIGNALS)}; of a module's constructor: {', '.join(SIZES)}"
            )
        _TERMS[name] = Term(name, kind, function, needs, sizes, paper, weight)
        return function

    return register


def _required(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters without a default, `self` left out."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty and p.name != "self")


def same_shape(term: str, advice: str, **tensors: Tensor) -> None:
    """Check that two tensors have one shape.

    Args:
        term: the name of the loss term.
        advice: what would bring the first tensor to the shape of the second.
        tensors: two tensors, by name.

    Raises:
        ValueError: the shapes differ.
    """
    (first, one), (second, other) = tensors.items()
    if one.shape != other.shape:
        raise ValueError(
            f"{term}: {first} has shape {list(one.shape)} and {second} has {list(other.shape)}; they must be equal: "
            f"{advice}"
        )


def same_batch(term: str, **tensors: Tensor) -> None:
    """Check that two tensors are [B, *] of the same B samples.

    Raises:
        ValueError: the numbers of samples differ, or a tensor is not [B, U].
    """
    (first, one), (second, other) = tensors.items()
    if one.ndim != 2 or other.ndim != 2 or len(one) != len(other):
        raise ValueError(
            f"{term}: {first} has shape {list(one.shape)} and {second} has {list(other.shape)}; both must be [B, any] "
            "of the same B samples: take the mean over positions or flatten them (`rlkd.models.adapters.pooled`)"
        )


def same_classes(term: str, student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Check that logits of student and teacher have one shape.

    Raises:
        ValueError: the shapes differ.
    """
    advice = "give both the same classes, or the student a head of its own for the teacher's classes"
    same_shape(term, advice, student_logits=student_logits, teacher_logits=teacher_logits)


def table() -> str:
    """Return all terms as a Markdown table, which docs/knowledge.md holds."""
    lines = ["| term | kind | rides on | weight | needs | meaning |", "|---|---|---|---|---|---|"]
    for entry in sorted(_TERMS.values(), key=lambda t: (list(RIDES).index(t.kind), t.name)):
        weight = "family's" if entry.weight is None else f"{entry.weight:g}"
        link = f"[{entry.name}]({entry.paper})"
        needs = ", ".join(f"`{need}`" for need in entry.needs)
        lines.append(f"| {link} | {entry.kind} | {entry.family} | {weight} | {needs} | {entry.summary} |")
    return "\n".join(lines) + "\n"
