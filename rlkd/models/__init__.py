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

__all__ = [
    "ChainStudent",
    "Layer",
    "Masks",
    "Outputs",
    "StudentConfig",
    "build_student",
    "initialise",
    "layers_of",
    "num_positions",
]
