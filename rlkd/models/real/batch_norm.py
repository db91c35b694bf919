"""Statistics of batch normalisation for units that were left out just now.

The running statistics of a model belong to all the units that were there in training. What a model would answer without
some of them is judged better by statistics of its own, as of the subnets in EagleEye (Li et al. 2020,
https://arxiv.org/abs/2007.02491). Other than there, those in use are put back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def own_statistics(model: nn.Module, see: Callable[[], object]) -> Iterator[None]:
    """Give batch normalisation the statistics of what `see` calls the model with, and put the others back at the end.

    Args:
        model: in evaluation mode; one without batch normalisation stays as it is, and `see` is not called.
        see: calls the model with one or more batches, each of which counts alike.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        yield
        return
    before = [{name: value.clone() for name, value in layer.named_buffers(recurse=False)} for layer in layers]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over batches
            layer.train()
        with torch.no_grad():
            see()
        for layer in layers:
            layer.eval()
        yield
    finally:
        for layer, buffers, momentum in zip(layers, before, momenta, strict=True):
            layer.eval()
            layer.momentum = momentum
            for name, value in layer.named_buffers(recurse=False):
                value.copy_(buffers[name])
