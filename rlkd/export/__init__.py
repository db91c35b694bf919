"""Hand a student over in the form that is deployed: ONNX, int8, Triton, with what was measured."""

import importlib

from rlkd.errors import UserError


def need_onnx() -> None:
    """Raise UserError where the extra `onnx` is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"ONNX needs the package {name}; run `pip install 'rlkd[onnx]'`") from error
