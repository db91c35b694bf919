"""Chain students that were trained for a moment on digits, for tests of what happens after the training."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from rlkd.compression import CompactStudent, compact, save_student
from rlkd.data import DataSet, load_dataset
from rlkd.io.records import plain
from rlkd.models import GateConfig, StudentConfig, build_student, initialise


def trained_chain(
    kind: Literal["mlp", "conv"] = "mlp",
    widths: tuple[int, ...] = (36, 36, 36),
    exits: tuple[int, ...] = (1, 2),
    threshold: float = 0.7,
    num_steps: int = 150,
    gated: bool = False,
) -> tuple[CompactStudent, DataSet]:
    """A student that left out a third of its units, and its data."""
    data = load_dataset("digits")
    student = build_student(StudentConfig(kind, widths, exits, GateConfig(enabled=gated)), data.input_shape, 10)
    generator = torch.Generator().manual_seed(0)
    initialise(student, generator)
    masks = tuple((torch.arange(size) % 3 != 1).float() for size in student.group_sizes)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    train = data.splits["train"]
    for _ in range(num_steps):
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        logits = student(data.inputs[rows], masks).logits
        loss = torch.stack([F.cross_entropy(z, data.labels[rows]) for z in logits]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return compact(student, masks, threshold).eval(), data


def save_trained(folder: Path, student: CompactStudent, data: DataSet) -> Path:
    """Write the student as `rlkd distil` does, with its accuracy on test data; returns the folder."""
    test = data.splits["test"]
    with torch.no_grad():
        right = student(data.inputs[test]).argmax(-1) == data.labels[test]
    figures = {"accuracy": float(right.float().mean()), "exit_rates": [0.5, 0.3, 0.2]}
    save_student(student, folder, {"figures": figures, "input_scale": plain(data.scale)})
    return folder
