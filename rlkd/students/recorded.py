"""Replays the kernels of a function on a GPU: one launch for the hundreds of small ones that a window consists of.

A step of a few hundred small students keeps a GPU busy for less time than Python needs to launch its kernels. A CUDA
graph (`torch.cuda.CUDAGraph`) records the launches once and repeats them, with the same arguments in the same memory.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def recorded(
    function: Callable[..., tuple[Tensor, ...]], device: torch.device, record: bool = True
) -> Callable[..., tuple[Tensor, ...]]:
    """Return `Recorded(function, device)` on a GPU; on the CPU, or with `record` false, return `function` itself."""
    return Recorded(function, device) if record and device.type == "cuda" else function


class Recorded:
    """`function` of tensors that stay on one GPU, with the same results; the second call records it.

    The first call runs it plainly, which also loads kernels and makes the handles of the libraries; the second records
    and replays, later ones replay. Only what is done on the device is repeated: `function` must neither read a value
    nor draw, and what it holds besides its arguments must stay where it is in memory (changed in place alone).

    Args:
        function: from tensors to tensors.
        device: a GPU, of all of them.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self._function, self._device = function, device
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Tensor] = []  # what the recorded kernels read: arguments are copied into it
        self._results: tuple[Tensor, ...] = ()  # what they write: the next call overwrites it

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return the result of `function`; the next call overwrites the result of a recording.

        Arguments must have the shapes of the first recorded call's.
        """
        if not self._is_warm:
            return self._warm_up(*arguments)
        if self._graph is None:
            self._held = [argument.clone() for argument in arguments]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=_stream(self._device)):
                self._results = self._function(*self._held)
            self._graph = graph
        else:
            torch._foreach_copy_(self._held, arguments)
        self._graph.replay()
        return self._results

    def _warm_up(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Call the function plainly on the stream of the recording, so that libraries allocate their work space now."""
        stream = _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            results = self._function(*arguments)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._is_warm = True
        return results


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a device: the libraries keep some MiB of work space for every stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
