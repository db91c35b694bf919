"""The output layer of a language model, set aside: the model then gives hidden states in the place of logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.losses.chunked import Head
from rlkd.models.real.blocks import output_layer
from rlkd.models.real.hooks import forward, logits_of

SAME = 1e-4  # of the largest logit: what sums in another order may differ by


def linear_output(model: nn.Module, name: str) -> nn.Linear:
    """Return the output layer of a language model.

    Raises:
        UserError: it is no `nn.Linear`.
    """
    layer = output_layer(model)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"tokens.teacher_in_memory: the output layer of {name} is {type(layer).__name__}; allowed: nn.Linear"
        )
    return layer


@contextmanager
def headless(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's output layer returns what it is given: hidden states [B, L, D] for logits."""
    layer = linear_output(model, type(model).__name__)
    setattr(layer, "forward", lambda hidden: hidden)  # noqa: B010, an instance's own forward hides the class's
    try:
        yield
    finally:
        del layer.forward


def hidden_head(model: nn.Module, hidden: Tensor) -> Head:
    """Return hidden states [M, D] with the output layer that answers them."""
    layer = linear_output(model, type(model).__name__)
    return Head(hidden, layer.weight, layer.bias)


@torch.no_grad()
def check_head(model: nn.Module, inputs: Mapping[str, Tensor], name: str) -> None:
    """Raise UserError for a model whose logits are not its output layer's answers: scaled, capped, or none of them."""
    layer = linear_output(model, name)
    if "forward" in vars(layer):
        raise UserError(f"tokens.teacher_in_memory: the output layer of {name} is spread over devices; allowed: one")
    logits = logits_of(forward(model.eval(), inputs))
    with headless(model):
        hidden = logits_of(forward(model, inputs))
    answers = layer(hidden)
    if answers.shape != logits.shape or float((answers - logits).abs().max()) > SAME * float(logits.abs().max()):
        raise UserError(
            f"tokens.teacher_in_memory: the logits of {name} are not the answers of its output layer (it scales or "
            "caps them); leave the option out"
        )
