"""Tiny models with texts on disk, as teacher and student with their data."""

import csv
import random
from pathlib import Path
from typing import Any

import tiny_models

from rlkd.data.rows import ColumnConfig
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.pretrained import Kind
from rlkd.models.real.sides import Side, Sources, load_student, load_teacher

TEXT: Kind = "sequence_classification"


def write_texts(folder: Path, longest: int = 12) -> Path:
    draw = random.Random(0)
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(60):
            words = draw.choices(tiny_models.WORDS, k=longest if i % 7 == 0 else draw.randint(3, longest))
            rows.writerow([" ".join(words), i % 2])
    return folder / "texts.csv"


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_models.save_tokenizer(folder)
    return folder


def sources(teacher: Path, data: Path, student: str = "", columns: ColumnConfig | None = None) -> Sources:
    return Sources(
        teacher=str(teacher),
        student=student,
        data=str(data),
        columns=columns or ColumnConfig(),
        cut=StudentCut(),
        attach=AttachConfig(),
        device_map=None,
        allow_pickle=False,
    )


def both(given: Sources, kind: Kind = TEXT) -> tuple[Side, Side]:
    teacher = load_teacher(given, kind)
    return load_student(given, kind, teacher, 0)
