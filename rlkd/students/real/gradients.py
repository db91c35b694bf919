"""Gradients of the loss families, which telemetry reports for every window."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
