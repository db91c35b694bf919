"""Write a chain student with integer weights and activations: QuantizeLinear and DequantizeLinear around its layers.

onnxruntime fuses these pairs into integer kernels. Four-bit weights are stored as UINT4 and computed on as floats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from rlkd.export.fake_quant import Grid, to_integers

OPSET = 21  # the first one with four-bit tensors
LAYERS = ("Gemm", "Conv")
RESHAPES = ("Reshape", "Flatten")
TYPES = {8: TensorProto.UINT8, 4: TensorProto.UINT4}


@dataclass(frozen=True)
class LayerGrids:
    """How one layer is written: its input's grid, its weight's grid, and both of its tensors as they are trained."""

    inputs: Grid
    weight_grid: Grid
    weight: Tensor
    bias: Tensor


def with_integers(graph: Any, layers: Mapping[str, LayerGrids]) -> Any:
    """Return a straight graph (`rlkd.export.surgery`) whose layers compute on integers.

    Args:
        graph: of a chain student; not changed.
        layers: by the name of the layer's weight in the graph; all of its layers.

    Raises:
        ValueError: the graph has other layers.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    nodes = list(made.graph.node)
    makers = {name: node for node in nodes for name in node.output}
    replaced: dict[str, str] = {}  # activations by the name of their rounded copy
    grids: dict[str, Grid] = {}
    head: list[Any] = []
    weights: dict[str, Any] = {}
    found = set()
    for node in nodes:
        if node.op_type not in LAYERS:
            continue
        name = node.input[1]
        if name not in layers:
            raise ValueError(f"layer {name} has no grid")
        found.add(name)
        layer = layers[name]
        activation = node.input[0]
        while activation in makers and makers[activation].op_type in RESHAPES:
            activation = makers[activation].input[0]
        grids[activation], replaced[activation] = layer.inputs, f"{activation}_rounded"
        head += _weight(node, name, layer, weights)
    if found != set(layers):
        raise ValueError(f"the graph lacks {sorted(set(layers) - found)}")
    inputs = [value.name for value in made.graph.input if value.name in grids]
    body = [*head, *(pair for name in inputs for pair in _pair(name, grids[name], weights))]
    for node in nodes:
        for place, name in enumerate(node.input):
            if name in replaced:
                node.input[place] = replaced[name]
        body.append(node)
        body += [pair for name in node.output if name in grids for pair in _pair(name, grids[name], weights)]
    old = [
        tensor for tensor in made.graph.initializer if tensor.name not in weights and not _is_replaced(tensor, layers)
    ]
    built = helper.make_graph(
        body, "student", list(made.graph.input), list(made.graph.output), [*old, *weights.values()]
    )
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)


def _is_replaced(tensor: Any, layers: Mapping[str, LayerGrids]) -> bool:
    """Whether a tensor of the graph is a weight or bias that is written anew."""
    return tensor.name in layers or tensor.name.removesuffix("bias") + "weight" in layers


def _weight(node: Any, name: str, layer: LayerGrids, weights: dict[str, Any]) -> list[Any]:
    """Store a layer's weight and bias as integers, let the node read them, and return what turns them to floats."""
    grid = layer.weight_grid
    kind = TYPES[grid.bits]
    integers = to_integers(layer.weight, grid).numpy().astype(np.uint8)
    blob = (_packed(integers) if grid.bits == 4 else integers).tobytes()
    weights[f"{name}_integers"] = helper.make_tensor(f"{name}_integers", kind, integers.shape, blob, raw=True)
    _scalars(f"{name}_integers", grid, kind, weights)
    step = (layer.inputs.scale * grid.scale).numpy().astype(np.float32)
    bias = np.round(layer.bias.numpy() / step).astype(np.int32)
    bias_name = f"{name.removesuffix('weight')}bias_integers"
    weights[bias_name] = numpy_helper.from_array(bias, bias_name)
    weights[f"{bias_name}_scale"] = numpy_helper.from_array(np.asarray(step), f"{bias_name}_scale")
    weights[f"{bias_name}_zero"] = numpy_helper.from_array(np.asarray(0, np.int32), f"{bias_name}_zero")
    node.input[1], node.input[2] = f"{name}_integers_float", f"{bias_name}_float"
    return [_dequantise(f"{name}_integers"), _dequantise(bias_name)]


def _packed(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two four-bit integers a byte, the first one in its lower half, as ONNX stores them."""
    flat = np.pad(integers.flatten(), (0, integers.size % 2))
    return (flat[::2] + 16 * flat[1::2]).astype(np.uint8)


def _pair(name: str, grid: Grid, weights: dict[str, Any]) -> list[Any]:
    """Return the nodes that round an activation."""
    _scalars(f"{name}_integers", grid, TensorProto.UINT8, weights)
    scalars = [f"{name}_integers_scale", f"{name}_integers_zero"]
    down = helper.make_node("QuantizeLinear", [name, *scalars], [f"{name}_integers"], name=f"quantise_{name}")
    up = helper.make_node("DequantizeLinear", [f"{name}_integers", *scalars], [f"{name}_rounded"], name=f"round_{name}")
    return [down, up]


def _dequantise(name: str) -> Any:
    inputs = [name, f"{name}_scale", f"{name}_zero"]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}_float"], name=f"float_{name}")


def _scalars(name: str, grid: Grid, kind: int, weights: dict[str, Any]) -> None:
    scale = np.asarray(float(grid.scale), np.float32)
    weights[f"{name}_scale"] = numpy_helper.from_array(scale, f"{name}_scale")
    weights[f"{name}_zero"] = helper.make_tensor(f"{name}_zero", kind, [], [int(grid.zero_point)])
