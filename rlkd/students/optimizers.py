"""AdamW or Lion for a real student, and the course of its learning rate."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlkd.models.real.sharding import sharded_like, whole


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, "Symbolic discovery of optimization algorithms").

    u = sign(b1 m + (1 - b1) g);  p <- p - lr (u + decay p);  m <- b2 m + (1 - b2) g.

    Args:
        params: parameters, or groups of them.
        lr: step size; about a tenth of AdamW's.
        betas: (b1, b2).
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum: Tensor = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                direction = momentum.lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)


def new_optimizer(
    module: nn.Module, name: Literal["adamw", "lion"], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Decay on matrices alone: biases and normalisation are left as they are.

    AdamW is torch's fused one: on a CPU, the default walks over all parameters about ten times.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "lion":
        return Lion(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def schedule(step: int, total: int, warmup: float, floor: float) -> float:
    """Factor on the learning rate at `step` (from 0) of `total`: a line up, then half a cosine down to `floor`.

    Args:
        step: 0 to total - 1.
        total: steps of the whole training.
        warmup: share of `total` that the line takes.
        floor: factor at the end.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy the state of Adam, AdamW or Lion for every parameter to the CPU, as "optimizer.<number>.<name>".

    Sharded tensors are gathered, so that every process must call this. What a parameter without a gradient does not
    have yet is given as the zeros with which it would begin.
    """
    moments = ("momentum",) if isinstance(optimizer, Lion) else ("exp_avg", "exp_avg_sq")
    state: dict[str, Tensor] = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        kept = optimizer.state.get(parameter, {})
        for name in moments:
            moment = kept.get(name, torch.zeros_like(parameter)).detach()
            state[f"optimizer.{i}.{name}"] = whole(moment).to("cpu", copy=True)
        if not isinstance(optimizer, Lion):
            state[f"optimizer.{i}.step"] = kept.get("step", torch.tensor(0.0)).cpu().clone()
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Go on from an `optimizer_state` of the same parameters; other keys of `state` are left alone."""
    names = ("momentum",) if isinstance(optimizer, Lion) else ("step", "exp_avg", "exp_avg_sq")
    described = optimizer.state_dict()
    described["state"] = {
        i: {name: _placed(parameter, name, state[f"optimizer.{i}.{name}"].clone()) for name in names}
        for i, parameter in enumerate(_parameters(optimizer))
    }
    optimizer.load_state_dict(described)


def _placed(parameter: Tensor, name: str, value: Tensor) -> Tensor:
    """Return a moment sharded and laid out in memory as its parameter is; a count of updates stays.

    The fused AdamW goes through memory in order: a moment in another layout would belong to other elements.
    """
    return value if name == "step" else torch.empty_like(parameter).copy_(sharded_like(parameter, value))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which torch numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
