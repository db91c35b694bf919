"""Answer samples with a chain of ONNX graphs; each sample leaves at the first exit that is sure enough of it.

This file needs numpy and onnxruntime alone. `rlkd export` puts it beside the parts, to be copied with them:

    runner = PartsRunner("parts")
    logits, exits = runner({"inputs": samples})  # [B, C] and [B]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class PartsRunner:
    """Runs the parts in `folder`, as parts.json lists them, in order.

    Args:
        folder: has parts.json and the graphs that it names.
        threads: of onnxruntime.
    """

    def __init__(self, folder: Path | str, threads: int = 1) -> None:
        listed = json.loads((Path(folder) / "parts.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._parts = [
            onnxruntime.InferenceSession(str(Path(folder) / name), options, providers=["CPUExecutionProvider"])
            for name in listed["parts"]
        ]
        self._reads = [[value.name for value in part.get_inputs()] for part in self._parts]
        self._gives = [[value.name for value in part.get_outputs()] for part in self._parts]

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return logits [B, ...] and the number of the exit, counted from 1, at which each sample left, [B]."""
        tensors = dict(inputs)  # of the samples that wait
        rows = np.arange(len(next(iter(tensors.values()))))
        exits = np.zeros(len(rows), dtype=np.int64)
        logits: Any = None
        for number, part in enumerate(self._parts, start=1):
            reads, gives = self._reads[number - 1], self._gives[number - 1]
            given = dict(zip(gives, part.run(None, {name: tensors[name] for name in reads}), strict=True))
            now = given[gives[0]]
            logits = np.empty((len(rows), *now.shape[1:]), now.dtype) if logits is None else logits
            logits[rows] = now
            exits[rows] = number
            if number == len(self._parts):
                break
            stay = given[gives[1]]
            if not stay.any():
                break
            tensors |= given
            if not stay.all():
                tensors = {name: value[stay] for name, value in tensors.items()}
                rows = rows[stay]
        return logits, exits
