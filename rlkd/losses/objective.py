"""The loss of each family for one batch, in one tensor; the controls weigh them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.errors import UserError, closest
from rlkd.losses.registry import FAMILIES, TERMS

DEFAULT_TERMS = ("cross_entropy", "kl", "fitnets", "attention_transfer")


@dataclass(frozen=True)
class LossConfig:
    """Which loss terms train a student; `rlkd list` has their names."""

    terms: tuple[str, ...] = DEFAULT_TERMS
    """Terms by their published names. Those of one family share its weight."""
    stages: int = 1
    """Equal parts of a real student's training, in which hints of deeper blocks join those of shallower ones
    (--attach.hints all); in the last part all learn."""

    def check(self) -> None:
        """Raise UserError for an unknown term, one named twice, or none at all."""
        for name in self.terms:
            if name not in TERMS:
                raise UserError(f"loss.terms: got {name!r}; allowed: {', '.join(TERMS)}{closest(name, TERMS)}")
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise UserError(f"loss.terms: got {list(self.terms)}; allowed: one or more terms, each once")

        if not any(TERMS[name].family == "hard_label" for name in self.terms):
            raise UserError(
                f"loss.terms: got {list(self.terms)}, none of the labels; allowed: with cross_entropy or "
                "label_smoothing, whose loss a policy observes"
            )
        if self.stages < 1:
            raise UserError(f"loss.stages: got {self.stages}; allowed: at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that the terms need."""
        return frozenset(need for name in self.terms for need in TERMS[name].needs)


class Objective:
    """The chosen terms, family by family.

    Args:
        config: checked here.
        offered: names of the signals that student and teacher have; a family without a term whose signals are all
            there is not available.
        on_request: names of further signals, which the teachers give to a configuration that needs them.

    Raises:
        UserError: a term needs a signal that is not offered, and it is not one of the default terms.
    """

    def __init__(self, config: LossConfig, offered: frozenset[str], on_request: frozenset[str] = frozenset()) -> None:
        config.check()
        self.needs = config.needs
        self.terms = {f: tuple(t for n in config.terms if (t := TERMS[n]).family == f) for f in FAMILIES}
        given = {term.name for members in self.terms.values() for term in members if offered.issuperset(term.needs)}
        for name in config.terms:
            # of the default terms, an unavailable one is left out, so that one configuration serves every architecture
            if name not in given and config.terms != DEFAULT_TERMS:
                missing = [need for need in TERMS[name].needs if need not in offered]
                possible = sorted(n for n, t in TERMS.items() if (offered | on_request).issuperset(t.needs))
                raise UserError(
                    f"loss.terms: {name} needs {', '.join(missing)}, which this pair of student and teacher does not "
                    f"have; allowed here: {', '.join(possible)}"
                )
        self.available = torch.tensor([any(t.name in given for t in self.terms[f]) for f in FAMILIES])

    def modules(self, sizes: Mapping[str, int]) -> nn.ModuleDict:
        """Return new modules of the terms that have parameters, by term name.

        Args:
            sizes: by the names of `registry.SIZES`.
        """
        members = [term for some in self.terms.values() for term in some if term.is_module]
        return nn.ModuleDict({t.name: t.function(**{size: sizes[size] for size in t.sizes}) for t in members})

    def __call__(
        self, given: Mapping[str, Any], modules: nn.ModuleDict | None = None, ready: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the losses [4] in the order of `FAMILIES`; the objective is their weighted sum.

        A family's loss is the mean of its terms, each times its `scale`; 0 without a term. Terms of `student_logits`
        are averaged over all exits, as BranchyNet trains its exits jointly with equal weights.

        Args:
            given: signals by name, at least those of `needs`; `exit_logits` stands for `student_logits`.
            modules: of `modules`.
            ready: losses of families that were computed elsewhere.
        """
        ready = ready or {}
        exits = given["exit_logits"]
        zero = exits[0].new_zeros(())
        losses = []
        for family, members in self.terms.items():
            values = [ready[family]] if family in ready else []
            for term in members if not values else ():
                function = modules[term.name] if term.is_module and modules is not None else term.function
                signals = {name: given[name] for name in term.needs if name != "student_logits"}
                if "student_logits" in term.needs:
                    loss = zero
                    for logits in exits:
                        loss = loss + function(student_logits=logits, **signals)
                    loss = loss / len(exits)
                else:
                    loss = function(**signals)
                values.append(loss if term.scale == 1.0 else loss * term.scale)
            losses.append(values[0] if len(values) == 1 else sum(values, start=zero) / max(1, len(values)))
        return torch.stack(losses)
