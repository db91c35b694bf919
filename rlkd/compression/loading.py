"""Load a shipped student of any kind."""

from pathlib import Path

from torch import nn

from rlkd.compression.compact import load_student as load_chain
from rlkd.errors import UserError
from rlkd.io.files import inside, read_json


def load_student(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Load the student of a run, without running code from its files; the packages torch and safetensors are enough.

    A student of a transformers model needs transformers, too, and is called by keyword (`input_ids=..., ...`).

    Args:
        folder: a student's, or that of a run with a folder `student`.
        model: a module of your own class, where the student was made of one; it gives the structure and is not changed.

    Returns:
        The student in evaluation mode; it gives logits [B, C], of a language model [B, L, V].

    Raises:
        UserError: a file is missing, damaged, altered or of another format.
    """
    if not isinstance(folder, Path | str):
        raise UserError(f"load_student: got {type(folder).__name__}; allowed: the folder of a student or of a run")
    if not isinstance(model, nn.Module | None):
        raise UserError(f"load_student: model: got {model!r:.60}; allowed: an instance of your own class")
    path = Path(folder)
    if not (path / "student.json").exists() and (path / "student" / "student.json").exists():
        path = path / "student"
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give that of a student")
    if not (path / "student.json").exists():
        raise UserError(f"{path}: holds no student (no student.json); give the folder of a student, or of a run of one")
    card = read_json(inside(path, "student.json"), "a student's card")
    shipment = card.get("shipment") if isinstance(card, dict) else None
    if model is not None and not (isinstance(shipment, dict) and shipment.get("kind") == "module"):
        raise UserError(f"{path}: was not made of a module of your own; call load_student without a model")
    if shipment is None:
        return load_chain(path)
    from rlkd.compression.real.student_folder import load_module_student

    return load_module_student(path, model)
