"""Gradients of the loss families, which telemetry reports for every window."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlkd.io import processes
from rlkd.models.real.sharding import hold, part


def gradient_norms(losses: Tensor, available: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms [4] of each family's gradient on the parameters, and the cosine [] of the first two, on the CPU.

    Args:
        losses: one a family, [4], with their graph.
        available: families that have a loss, [4]; the norms of others are 0.
        parameters: of model and exits.
    """
    norms, first, product = torch.zeros(len(losses)), [], torch.zeros(())
    for k in range(len(losses)):
        if not available[k]:
            continue
        rows = torch.autograd.grad(losses[k], parameters, retain_graph=True, materialize_grads=True)
        norms[k] = torch.stack([g.float().square().sum() for g in rows]).sum().sqrt().cpu()
        if k == 0:
            first = list(rows)
        elif k == 1:
            product = torch.stack([(a * b).sum() for a, b in zip(first, rows, strict=True)]).sum().cpu()
    return norms, product / (norms[0] * norms[1]).clamp_min(1e-12)


def sharded_gradient_norms(losses: Tensor, available: Tensor, student: nn.Module) -> tuple[Tensor, Tensor]:
    """As `gradient_norms`, of a student with sharded weights; every process must call this with the same losses.

    The whole weights of a block are gathered when the gradient of its output arrives, which a loss on attention weights
    alone does not have. As an entry of `losses` it has one: the losses of other families get gradients, too, zeros.

    Args:
        losses: one a family, stacked, [4], with their graph.
        available: families that have a loss, [4].
        student: without gradients as it computed the losses; its `model` and `heads` count.
    """
    squares, product = torch.zeros(len(losses), device=losses.device), torch.zeros((), device=losses.device)
    first: list[Tensor] = []
    for k in range(len(losses)):
        if not available[k]:
            continue
        hold(student)  # losses read the output layer, too
        losses[k].backward(retain_graph=True)  # type: ignore[no-untyped-call]
        rows = [
            torch.zeros_like(part(p)) if p.grad is None else part(p.grad) / processes.num_processes()
            for name, p in student.named_parameters()
            if p.requires_grad and name.startswith(("model.", "heads."))
        ]
        student.zero_grad()
        squares[k] = torch.stack([g.float().square().sum() for g in rows]).sum()
        if k == 0:
            first = rows
        elif k == 1:
            product = torch.stack([(a * b).sum() for a, b in zip(first, rows, strict=True)]).sum()
    processes.add_up([squares, product])
    norms = squares.sqrt().cpu()
    return norms, product.cpu() / (norms[0] * norms[1]).clamp_min(1e-12)
