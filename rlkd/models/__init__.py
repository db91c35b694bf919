"""Students and teachers: chains of blocks with exits, whose inputs and units can be masked."""

from rlkd.models.chain import ChainStudent, Masks, Outputs, StudentConfig, build_student, initialise

__all__ = ["ChainStudent", "Masks", "Outputs", "StudentConfig", "build_student", "initialise"]
