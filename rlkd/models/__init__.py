"""Students and teachers: chains of blocks with exits, whose inputs and units can be masked."""

from rlkd.models.chain import (
    ChainStudent,
    Layer,
    Masks,
    Outputs,
    StudentConfig,
    build_student,
    initialise,
    layers_of,
    num_positions,
)
from rlkd.models.gate import ExitGate, GateConfig

__all__ = [
    "ChainStudent",
    "ExitGate",
    "GateConfig",
    "Layer",
    "Masks",
    "Outputs",
    "StudentConfig",
    "build_student",
    "initialise",
    "layers_of",
    "num_positions",
]
