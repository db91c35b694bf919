"""Hints between several layers of two models, from shallow to deep, in stages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.models.adapters import pooled


class Pair(NamedTuple):
    """A student's module and the teacher's that it learns from."""

    student: str
    teacher: str


def active_pairs(num_pairs: int, num_stages: int, progress: float) -> int:
    """Return how many of the pairs, the shallowest first, learn at this share of the training, in [0, 1].

    The training has `num_stages` equal parts: in the first the shallowest pairs learn alone, in the last all pairs do.
    """
    stage = min(num_stages - 1, int(progress * num_stages))
    return max(1, -(-num_pairs * (stage + 1) // num_stages))


def map_layers(student: Sequence[str], teacher: Sequence[str]) -> list[Pair]:
    """Return a pair for each student layer, shallow to deep, at the same relative depth of the teacher.

    Formula: layer i of n learns from layer ceil(i m / n) of m, so the last learns from the last (the uniform mapping
    of TinyBERT, Jiao et al. 2020, https://arxiv.org/abs/1909.10351, for any two depths). A student that is deeper than
    its teacher has neighbours with one teacher layer.

    Args:
        student: module paths, shallow to deep.
        teacher: module paths, shallow to deep.

    Raises:
        ValueError: a side has no layer.
    """
    if not student or not teacher:
        raise ValueError(f"map_layers: got {len(student)} and {len(teacher)} layers; allowed: at least 1 on each side")
    n, m = len(student), len(teacher)
    return [Pair(path, teacher[-(-(i + 1) * m // n) - 1]) for i, path in enumerate(student)]


def layer_paths(model: nn.Module) -> list[str]:
    """Return the module paths of a model's repeated layers, shallow to deep.

    They are the children with parameters of its longest `ModuleList` or `Sequential` in which these have one class.

    Raises:
        ValueError: there is no such list; name the paths yourself.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            prefix = f"{path}." if path else ""
            layers = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
            inside = [f"{prefix}{name}" for name in layers] if len({type(c) for c in layers.values()}) == 1 else []
            found = inside if len(inside) > len(found) else found
    if not found:
        raise ValueError("layer_paths: the model has no ModuleList or Sequential; give module paths, shallow to deep")
    return found


class LayerHints(nn.Module):
    """Hints of several layer pairs: hooks read both models, adapters bring the student's to the teacher's widths.

    Call both models on a batch, then `loss`. Features of shape [B, U, H, W] are averaged over positions, [B, L, U] over
    tokens. Shapes are found by one call of each model on `inputs`.

    Args:
        student: learns.
        teacher: is read without gradient.
        pairs: of `map_layers`.
        inputs: a few samples that both models take.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Sequence[Pair], inputs: Tensor) -> None:
        super().__init__()
        self.pairs = list(pairs)
        self._seen: dict[tuple[str, str], Tensor] = {}
        for side, model in (("student", student), ("teacher", teacher)):
            for path in dict.fromkeys(getattr(pair, side) for pair in self.pairs):
                model.get_submodule(path).register_forward_hook(self._keeper(side, path))
        with torch.no_grad():
            student(inputs), teacher(inputs)
        widths = [(self._features(p, "student").shape[-1], self._features(p, "teacher").shape[-1]) for p in self.pairs]
        self.adapters = nn.ModuleList(nn.Linear(a, b) for a, b in widths)

    def _keeper(self, side: str, path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._seen[side, path] = output[0] if isinstance(output, tuple) else output

        return hook

    def _features(self, pair: Pair, side: str) -> Tensor:
        """Return [B, U] of one side's layer in the last call of its model."""
        features = self._seen[side, getattr(pair, side)]
        return features.mean(1) if features.ndim == 3 else pooled(features)

    def loss(self, num_active: int | None = None) -> Tensor:
        """Return the mean hint of the shallowest `num_active` pairs (all by default) for the models' last calls.

        Formula: mean over pairs of mse(r(h), t / rms(t)), the teacher's features brought to a mean square of one
        (Romero et al. 2015, https://arxiv.org/abs/1412.6550).
        """
        count = len(self.pairs) if num_active is None else num_active
        losses = []
        for pair, adapter in list(zip(self.pairs, self.adapters, strict=True))[:count]:
            wanted = self._features(pair, "teacher").detach()
            wanted = wanted / wanted.square().mean().sqrt().clamp_min(1e-8)
            losses.append(F.mse_loss(adapter(self._features(pair, "student")), wanted))
        return torch.stack(losses).mean()
