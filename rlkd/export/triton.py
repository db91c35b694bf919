"""A model repository for NVIDIA Triton Inference Server: `NAME/config.pbtxt` and `NAME/1/model.onnx`.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

import re
from pathlib import Path
from typing import Any

import onnx

from rlkd.errors import UserError
from rlkd.hardware import Hardware
from rlkd.io.files import write_whole

TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}
KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}


def write_repository(graph: Any, folder: Path, name: str, hardware: Hardware) -> Path:
    """Write the model and its configuration; returns the folder of the model.

    Args:
        graph: with the batch as the first dimension of every input and output.
        folder: of the repository.
        name: of the model in the repository.
        hardware: gives the largest batch and the kind of device.

    Raises:
        UserError: a name that Triton does not take.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
        raise UserError(f"triton: got the name {name!r:.40}; allowed: letters, digits, '_', '-' and '.'")
    place = folder / name
    write_whole(place / "1" / "model.onnx", graph.SerializeToString())
    write_whole(place / "config.pbtxt", configuration(graph, name, hardware))
    return place


def configuration(graph: Any, name: str, hardware: Hardware) -> str:
    """Return the text of config.pbtxt; names, types and sizes are those of the graph."""
    values = [*graph.graph.input, *graph.graph.output]
    is_fixed = all(dim.dim_value for value in values for dim in value.type.tensor_type.shape.dim[1:])
    # requests of different lengths cannot stand in one batch
    batching = "dynamic_batching { }\n" if is_fixed else ""
    return (
        f'name: "{name}"\n'
        'backend: "onnxruntime"\n'
        f"max_batch_size: {max(hardware.batch_sizes)}\n"
        f"input [\n{_entries(graph.graph.input)}\n]\n"
        f"output [\n{_entries(graph.graph.output)}\n]\n"
        f"instance_group [\n  {{\n    count: 1\n    kind: {KINDS[hardware.device]}\n  }}\n]\n"
        f"{batching}"
        f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{hardware.threads}" }} }}\n'
    )


def _entries(values: Any) -> str:
    entries = []
    for value in values:
        tensor = value.type.tensor_type
        dims = ", ".join(str(dim.dim_value or -1) for dim in tensor.shape.dim[1:])
        kind = TYPES[tensor.elem_type]
        entries.append(f'  {{\n    name: "{value.name}"\n    data_type: {kind}\n    dims: [ {dims} ]\n  }}')
    return ",\n".join(entries)
