"""A real student that computes as onnxruntime's dynamic int8 does, in floats that can be trained.

Every linear layer rounds its weight to 256 values and its inputs to 256 values between the batch's least and largest
one (operators DynamicQuantizeLinear and MatMulInteger of ONNX). Tables of embeddings are rounded to 256 values, too.
Sums, biases and all else stay in float32.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlkd.compression.real.shipped import ShippedStudent, shipped_student
from rlkd.export.aware import FULL
from rlkd.export.fake_quant import fake_quantise, grid_of
from rlkd.export.flat import FlatModel


class _Rounding(TorchFunctionMode):
    """Rounds inputs and weight of every linear layer that is called inside the block, and counts the calls.

    Args:
        weights: the parameters that the exported graph stores.
        rounds_tables: whether what is looked up in them is rounded, too.
    """

    def __init__(self, weights: Sequence[Tensor], rounds_tables: bool = True) -> None:
        super().__init__()
        self._weights, self._rounds_tables = {id(weight) for weight in weights}, rounds_tables
        self.num_calls = self.num_lookups = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, a linear layer on rounded values."""
        kwargs = dict(kwargs or {})
        if func is F.embedding:
            return self._look_up(*args, **kwargs)
        if func is not F.linear:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        if id(given["weight"]) not in self._weights:
            return func(*args, **kwargs)
        self.num_calls += 1
        inputs, weight = (fake_quantise(given[name], grid_of(given[name], FULL)) for name in ("input", "weight"))
        return F.linear(inputs, weight, given.get("bias"))

    def _look_up(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rows of a table, on the grid of the whole table."""
        rows, weight = F.embedding(*args, **kwargs), args[1] if len(args) > 1 else kwargs["weight"]
        if id(weight) not in self._weights:
            return rows
        self.num_lookups += 1
        return fake_quantise(rows, grid_of(weight, FULL)) if self._rounds_tables else rows


class FakeDynamic(nn.Module):
    """A real student whose linear layers compute on integer grids, in floats.

    Args:
        student: a classifier; copied.
        names: of its inputs.
        rounds_tables: whether embeddings are rounded, too.
    """

    def __init__(self, student: ShippedStudent, names: Sequence[str], rounds_tables: bool = True) -> None:
        super().__init__()
        model, heads = copy.deepcopy(student.model), copy.deepcopy(student.heads)
        self.student = shipped_student(model.requires_grad_(True), heads.requires_grad_(True), student.shipment)
        self.flat = FlatModel(self.student, names).eval()
        self.rounds_tables = rounds_tables
        self.num_layers = self.num_lookups = 0  # linear layers, and lookups in tables, of the last call

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [B, C] of every sample at the exit where it leaves."""
        answer: Tensor = self._rounded(self.flat.forward, inputs)[-1]
        return answer

    def exit_logits(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the logits [B, C] of every exit."""
        logits: list[Tensor] = self._rounded(self.flat.exit_logits, inputs)
        return logits

    def _rounded(self, call: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
        with _Rounding(list(self.parameters()), self.rounds_tables) as rounding:
            found = call(*(inputs[name] for name in self.flat.names))
        self.num_layers, self.num_lookups = rounding.num_calls, rounding.num_lookups
        return found
