"""What happens to a student whose numbers are no longer finite: its window is undone, and its steps get smaller.

Every kind of student keeps a copy of its state from before a window. If a loss, a gradient or a parameter of that
window is not finite, the copy comes back and all later steps are STEP_SHRINK as large; the samples that the window
drew are spent. After `max_rollbacks` of these the student has diverged for good. Nothing here mixes students.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rlkd.models.real.sharding import part

STEP_SHRINK = 0.1  # a tenth, because a step that overflows is usually orders of magnitude too large


class Rollbacks:
    """How often each of N students was rolled back, and what follows from it.

    Args:
        num_students: N.
        max_rollbacks: allowed to each.
    """

    def __init__(self, num_students: int, max_rollbacks: int) -> None:
        self._max = max_rollbacks
        self.count = torch.zeros(num_students, dtype=torch.int64)  # [N]
        self.step_scale = torch.ones(num_students)  # [N], factor on the step size
        self.diverged = torch.zeros(num_students, dtype=torch.bool)  # [N], for good

    def reset(self, rows: Tensor) -> None:
        """Nothing has happened yet to the students at `rows`."""
        self.count, self.step_scale, self.diverged = (  # what an earlier Telemetry holds stays as it is
            self.count.index_fill(0, rows, 0),
            self.step_scale.index_fill(0, rows, 1.0),
            self.diverged.index_fill(0, rows, False),
        )

    def copy_rows(self, sources: Tensor) -> None:
        """Student i goes on as a copy of student `sources[i]` ([N] int64)."""
        self.count, self.step_scale = self.count[sources], self.step_scale[sources]
        self.diverged = self.diverged[sources]

    def training_state(self) -> dict[str, Tensor]:
        """Copy the state, each [N]."""
        state = {"count": self.count, "step_scale": self.step_scale, "diverged": self.diverged}
        return {f"rollbacks.{name}": tensor.clone() for name, tensor in state.items()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state`; other keys of `state` are left alone."""
        self.count, self.step_scale = state["rollbacks.count"].clone(), state["rollbacks.step_scale"].clone()
        self.diverged = state["rollbacks.diverged"].clone()

    def judge(self, finite: Tensor) -> Tensor:
        """Count one window in which all numbers of student i were finite or not; returns whose state must go back.

        Args:
            finite: [N] bool.

        Returns:
            [N] bool.
        """
        broken = ~finite
        self.diverged = self.diverged | (broken & (self.count >= self._max))
        undone = broken & ~self.diverged
        self.count = self.count + undone
        self.step_scale = torch.where(undone, self.step_scale * STEP_SHRINK, self.step_scale)
        return broken


class Snapshot:
    """A copy of a module's and its optimizer's state, in the machine's memory: a GPU's would hold everything twice.

    Each process copies its own part of sharded tensors.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = {name: _copy(value) for name, value in module.state_dict().items()}
        self._moments = {
            p: {name: _copy(value) for name, value in row.items() if isinstance(value, Tensor)}
            for p, row in optimizer.state.items()
        }

    @torch.no_grad()
    def put_back(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Parameters, buffers, moments and count of updates as they were."""
        for name, value in module.state_dict().items():
            part(value).copy_(self._module[name])
        for parameter in list(optimizer.state):
            for name, value in self._moments.get(parameter, {}).items():
                part(optimizer.state[parameter][name]).copy_(value)
            if parameter not in self._moments:  # it had no update yet
                del optimizer.state[parameter]


def moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the optimizer's moments of each parameter, [1, ...] each, or this process's part of them.

    A gradient that is not finite stays in them.
    """
    for row in optimizer.state.values():
        yield from (part(value)[None] for name, value in row.items() if isinstance(value, Tensor) and name != "step")


def _copy(value: Tensor) -> Tensor:
    return part(value.detach()).to("cpu", copy=True)
