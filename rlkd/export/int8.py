"""Post-training int8 by onnxruntime: dynamic and static, undone where it loses more than is allowed.

Weights are unsigned (QUInt8): with signed weights, AVX2's 16-bit sums saturate. Dynamic quantisation scales activations
in every call; static quantisation takes their ranges from training samples (Jacob et al. 2018, arXiv:1712.05877).
Tables of embeddings are stored in int8, too, and scaled back where they are read.
Layers that do not bear it go back to float32, the most sensitive first.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlkd.export.onnx_file import Inputs, quiet_exporter, session_of

Method = Literal["dynamic", "static"]
METHODS: tuple[Method, ...] = ("dynamic", "static")
OPERATORS: dict[Method, tuple[str, ...]] = {"dynamic": ("MatMul", "Gemm"), "static": ("MatMul", "Gemm", "Conv")}
LOOKUP, FLOAT = "Gather", 1  # operator and number of a data type in ONNX
NUM_CALIBRATED = 256  # training samples that activation ranges are taken from
NUM_SENSITIVE = 128  # samples that a layer's sensitivity is measured on
MAX_TRIED = 32  # layers whose sensitivity is measured, one at a time


@dataclass(frozen=True)
class QuantisedGraph:
    """A graph of which some layers compute in int8."""

    graph: Any
    method: Method
    kept_float: tuple[str, ...] = ()  # layers that stay in float32


def layers_of(graph: Any, method: Method) -> list[str]:
    """Return the names of the layers with weights that a method quantises, in the graph's order."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [
        node.name
        for node in graph.graph.node
        if node.op_type in OPERATORS[method] and any(name in weights for name in node.input)
    ]


def tables_of(graph: Any) -> list[str]:
    """Return the names of the lookups in tables of weights, such as word embeddings, in the graph's order."""
    tables = {t.name for t in graph.graph.initializer if len(t.dims) == 2 and t.data_type == FLOAT}
    return [node.name for node in graph.graph.node if node.op_type == LOOKUP and node.input[0] in tables]


def _parts_of(graph: Any, method: Method) -> list[str]:
    """Return the names of all that a method quantises."""
    return [*tables_of(graph), *layers_of(graph, method)]


def quantise(graph: Any, method: Method, batches: Sequence[Inputs], kept_float: Sequence[str] = ()) -> QuantisedGraph:
    """Return the graph with int8 layers.

    Args:
        graph: a straight float32 graph (`rlkd.export.surgery`), with named nodes; not changed.
        method: "dynamic" or "static".
        batches: of training samples, for the ranges of static activations.
        kept_float: names of layers that stay in float32.
    """
    import onnx
    from onnxruntime import quantization as q

    with tempfile.TemporaryDirectory() as scratch, quiet_exporter():
        source, target = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        onnx.save(graph, source)
        chosen = [name for name in _parts_of(graph, method) if name not in kept_float]
        # dynamic quantisation turns a Gemm into a MatMul, under another name, before it looks at the names
        named = [*chosen, *(f"{name}_MatMul" for name in chosen)] if method == "dynamic" else chosen
        options = {"op_types_to_quantize": [*OPERATORS[method], LOOKUP], "nodes_to_quantize": named}
        if not chosen:
            return QuantisedGraph(graph, method, tuple(kept_float))
        if method == "dynamic":
            q.quantize_dynamic(source, target, weight_type=q.QuantType.QUInt8, per_channel=False, **options)
        else:
            q.quantize_static(
                source,
                target,
                _Reader(batches),
                quant_format=q.QuantFormat.QDQ,
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QUInt8,
                per_channel=False,
                calibrate_method=q.CalibrationMethod.MinMax,
                **options,
            )
        made = onnx.shape_inference.infer_shapes(onnx.load(target))
    return QuantisedGraph(made, method, tuple(kept_float))


class _Reader:
    """What onnxruntime's calibration reads its batches from."""

    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._rest: Iterator[Inputs] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch as arrays, or None at the end."""
        batch = next(self._rest, None)
        return None if batch is None else {name: value.numpy() for name, value in batch.items()}

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


def sensitivities(graph: Any, method: Method, batches: Sequence[Inputs], probe: Inputs) -> dict[str, float]:
    """Return, for every layer, how far the logits move where it alone is in int8: the root mean square difference.

    Args:
        graph, method, batches: as in `quantise`.
        probe: samples that the logits are compared on.
    """
    names = _parts_of(graph, method)[:MAX_TRIED]
    reference = _last(graph, probe)
    moved = {}
    for name in names:
        others = [other for other in _parts_of(graph, method) if other != name]
        one = quantise(graph, method, batches, others)
        moved[name] = float((_last(one.graph, probe) - reference).square().mean().sqrt())
    return moved


def _last(graph: Any, probe: Inputs) -> Tensor:
    """Return the logits at the end of a straight graph."""
    session = session_of(graph)
    names = [value.name for value in session.get_inputs()]
    answer = session.run([graph.graph.output[-1].name], {name: probe[name].numpy() for name in names})[0]
    return torch.from_numpy(answer)


def within(
    graph: Any,
    method: Method,
    batches: Sequence[Inputs],
    probe: Inputs,
    loss_of: Callable[[Any], float],
    most_lost: float,
    log: Callable[[str], object],
) -> tuple[QuantisedGraph, float] | None:
    """Quantise all layers; where that loses too much, take layers back, the most sensitive first.

    Args:
        graph, method, batches: as in `quantise`.
        probe: samples for the sensitivities.
        loss_of: accuracy that a straight graph loses on validation, a share.
        most_lost: the loss that is allowed.
        log: called with a line for everything that is taken back.

    Returns:
        The graph and its loss, or None where more than half of the layers would have to go back.
    """
    made = quantise(graph, method, batches)
    lost = loss_of(made.graph)
    if lost <= most_lost:
        return made, lost
    log(f"int8 {method}: all layers lose {100 * lost:.2f} points, more than {100 * most_lost:g}; taken back")
    ranked = sensitivities(graph, method, batches, probe)
    order = sorted(ranked, key=lambda name: -ranked[name])
    for count in range(1, len(order) // 2 + 1):
        made = quantise(graph, method, batches, order[:count])
        lost = loss_of(made.graph)
        if lost <= most_lost:
            log(f"int8 {method}: {count} of {len(order)} layers stay in float32 ({', '.join(order[:count])})")
            return made, lost
    log(f"int8 {method}: loses {100 * lost:.2f} points with {len(order) // 2} layers in float32; taken back")
    return None
