"""Hidden states, features and attention maps of any module, caught by forward hooks: no model is edited.

A place is a module path as in `named_modules`, exact or a glob pattern (`bert.encoder.layer.*`). A module that
returns several things is read at an item: `...attention:1` is the second (in transformers, the attention weights).
"""

import difflib
import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.errors import UserError


@dataclass(frozen=True)
class Link:
    """One student place, the teacher place that it learns from, and what brings it to the teacher's width."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]  # of the whole output, one sample: [L, D], [C, H, W] or [D]
    teacher_shape: tuple[int, ...]
    student_width: int
    teacher_width: int

    @property
    def adapter(self) -> str:
        """Describe it in words: "scale" where the widths are equal."""
        same = self.student_width == self.teacher_width
        return "scale" if same else f"linear {self.student_width} -> {self.teacher_width}"


class UnitScale(nn.Module):
    """Brings features to a mean square of one, as those of the teacher have; the factor is found before the training.

    Without it, the feature loss would pull a student that is as wide as its teacher to another scale than its next
    layer expects: blocks of a language model answer hundreds of times larger values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0  # no tensor: it is found anew at every beginning, and is in no state

    def find(self, features: Tensor) -> None:
        """Take the factor at which `features` [B, D], as the student answers them, have a mean square of one."""
        self.factor = 1.0 / max(float(features.square().mean().sqrt()), 1e-8)

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` [B, D] times the factor."""
        return self.factor * features


def resolve(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Places that `patterns` name, in the module's own order, each once.

    In a pattern, `*` does not cross a dot: `encoder.layer.*` names the blocks and not what is inside them.

    Raises:
        UserError: a pattern names nothing; the message has the closest path.
    """
    names = [name for name, _ in model.named_modules()]
    found: dict[str, int] = {}
    for pattern in patterns:
        path, colon, item = pattern.partition(":")
        if colon and not item.isdigit():
            raise UserError(f"place {pattern!r}: got item {item!r}; allowed: PATH or PATH:NUMBER")
        hits = [n for n in names if n.count(".") == path.count(".") and fnmatch.fnmatchcase(n, path)]
        if not hits or not path:
            close = difflib.get_close_matches(path, names, n=1, cutoff=0.0)
            raise UserError(f"place {pattern!r}: no module of {type(model).__name__} has it; the closest is {close[0]}")
        for name in hits:
            found.setdefault(name + colon + item, names.index(name))
    return sorted(found, key=lambda place: found[place])


@contextmanager
def capture(model: nn.Module, patterns: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, every forward pass fills the yielded dict: place -> output, with its gradient.

    Args:
        model: any module.
        patterns: places; see the module's docstring.

    Raises:
        UserError: a pattern names nothing, or, in the forward pass, a place gives no tensor there.
    """
    places = resolve(model, patterns)
    seen: dict[str, Tensor] = {}
    handles = []
    for place in places:
        path, _, item = place.partition(":")

        def hook(_: nn.Module, __: Any, output: Any, place: str = place, item: int = int(item or 0)) -> None:
            seen[place] = tensor_at(output, item, place)

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensor_at(output: Any, item: int, place: str) -> Tensor:
    """Return the tensor at `item` of a module's output, which may be a tensor, a sequence or a mapping.

    Raises:
        UserError: there is none.
    """
    values = [output] if isinstance(output, Tensor) else output
    values = list(values.values()) if isinstance(values, Mapping) else values
    if isinstance(values, list | tuple) and item < len(values) and isinstance(values[item], Tensor):
        return torch.as_tensor(values[item])
    count = len(values) if isinstance(values, list | tuple) else 0
    raise UserError(
        f"place {place!r}: its output has no tensor at item {item} (of {count}); for attention weights load the model "
        "with eager attention"
    )


def forward(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor) -> Any:
    """Call `model` with one tensor, or by keyword with those of the inputs that its forward pass names.

    A decoder keeps no cache: nothing is generated here.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    accepted = {name: values for name, values in inputs.items() if name in names} or dict(inputs)
    return model(**accepted, **({"use_cache": False} if "use_cache" in names else {}))


def logits_of(output: Any) -> Tensor:
    """Logits [B, C], or [B, L, V] a token, of a model's output: its `logits`, or itself.

    Raises:
        UserError: it has none.
    """
    if not isinstance(output, Tensor | Mapping):
        raise UserError(f"model: got an output of type {type(output).__name__}; allowed: one tensor of logits")
    if not isinstance(output, Tensor) and "logits" not in output:
        raise UserError(f"model: got an output with {', '.join(map(str, output))}; allowed: one with logits")
    return torch.as_tensor(output if isinstance(output, Tensor) else output["logits"])


@torch.no_grad()
def dry_pass(model: nn.Module, patterns: Sequence[str], inputs: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
    """Return the tensors at the places for `inputs`, in evaluation mode; restore the model's mode."""
    was_training = model.training
    model.eval()
    try:
        with capture(model, patterns) as seen:
            forward(model, inputs)
    finally:
        model.train(was_training)
    return dict(seen)


def width_of(features: Tensor) -> int:
    """D of [B, L, D] or [B, D], or C of [B, C, H, W]."""
    return features.shape[1] if features.ndim == 4 else features.shape[-1]


def pool(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over positions: [B, L, D], [B, C, H, W] or [B, D] give [B, width].

    Args:
        features: an output.
        mask: [B, L] with 0 at padding; positions that it does not fit are all counted.
    """
    if features.ndim == 4:
        return features.mean((-2, -1))
    if features.ndim == 2:
        return features
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(1)
    weights = mask.to(features.dtype)[..., None]  # [B, L, 1]
    return (features * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def link_places(
    student: nn.Module,
    teacher: nn.Module,
    student_patterns: Sequence[str],
    teacher_patterns: Sequence[str],
    student_inputs: Mapping[str, Tensor] | Tensor,
    teacher_inputs: Mapping[str, Tensor] | Tensor,
) -> list[Link]:
    """Pair places from one dry pass of each model, the n of the student spread evenly over the m of the teacher.

    The i-th (from 1) of n is paired with the teacher's ceil(i m / n)-th, so that the last meets the last.

    Raises:
        UserError: the student has more places than the teacher.
    """
    mine = dry_pass(student, student_patterns, student_inputs)
    theirs = dry_pass(teacher, teacher_patterns, teacher_inputs)
    own, other = resolve(student, student_patterns), resolve(teacher, teacher_patterns)
    if len(own) > len(other):
        raise UserError(f"links: got {len(own)} student places for {len(other)} teacher places; name at most as many")
    chosen = [other[-(-(i * len(other)) // len(own)) - 1] for i in range(1, len(own) + 1)]
    return [
        Link(s, t, tuple(mine[s].shape[1:]), tuple(theirs[t].shape[1:]), width_of(mine[s]), width_of(theirs[t]))
        for s, t in zip(own, chosen, strict=True)
    ]


def build_adapters(links: Sequence[Link]) -> nn.ModuleList:
    """One linear adapter a link, `UnitScale` where the widths are equal."""
    return nn.ModuleList(
        UnitScale() if link.student_width == link.teacher_width else nn.Linear(link.student_width, link.teacher_width)
        for link in links
    )


def forget_scales(adapters: nn.ModuleList) -> bool:
    """Set the factors of all `UnitScale`s to 1; returns whether there are any."""
    scales = [adapter for adapter in adapters if isinstance(adapter, UnitScale)]
    for scale in scales:
        scale.factor = 1.0
    return bool(scales)


def find_scales(adapters: nn.ModuleList, links: Sequence[Link], features: Tensor) -> None:
    """Find the factors of all `UnitScale`s, which were forgotten, from what the adapters gave: [B, F], side by side."""
    columns = torch.split(features, [link.teacher_width for link in links], dim=-1)
    for adapter, own in zip(adapters, columns, strict=True):
        if isinstance(adapter, UnitScale):
            adapter.find(own)


def link_table(links: Sequence[Link]) -> str:
    """Return the links as an aligned table of text, one a line."""
    rows = [("student", "shape", "teacher", "shape", "adapter")]
    rows += [(k.student, str(list(k.student_shape)), k.teacher, str(list(k.teacher_shape)), k.adapter) for k in links]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
