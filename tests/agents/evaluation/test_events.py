"""Event files with any damage: all other points are read, and the damage is noted."""

import random
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from rlkd.agents.evaluation.events import read_scalars

STEPS = list(range(8))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = SummaryWriter(str(tmp_path))  # type: ignore[no-untyped-call]
    for step in STEPS:
        writer.add_scalar("a", step / 10, step)  # type: ignore[no-untyped-call]
    writer.add_scalar("b", 3.0, 7, new_style=True)  # type: ignore[no-untyped-call]
    writer.add_text("c", "a text", 7)  # type: ignore[no-untyped-call]
    writer.close()  # type: ignore[no-untyped-call]
    return next(tmp_path.iterdir())


def test_a_sound_file_is_read_whole_without_a_note(file: Path) -> None:
    scalars, notes = read_scalars([file])
    assert notes == []
    assert scalars["a"] == (STEPS, pytest.approx([step / 10 for step in STEPS]))
    assert scalars["b"] == ([7], [3.0])
    assert set(scalars) == {"a", "b"}


def test_one_flipped_byte_anywhere_loses_one_record_at_most(file: Path) -> None:
    sound = file.read_bytes()
    whole, _ = read_scalars([file])
    points = set(zip(*whole["a"], strict=True))
    for place in range(len(sound)):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
        scalars, notes = read_scalars([file])
        read = set(zip(*scalars.get("a", ([], [])), strict=True))
        assert read <= points
        assert len(read) + len(scalars.get("b", ([], []))[0]) >= len(STEPS)
        assert len(notes) == 1
        assert "damaged from byte" in notes[0]


def test_a_file_that_ends_anywhere_gives_the_records_before(file: Path) -> None:
    sound = file.read_bytes()
    num_read = []
    for end in range(len(sound)):
        file.write_bytes(sound[:end])
        scalars, _ = read_scalars([file])
        num_read.append(len(scalars.get("a", ([], []))[0]))
    assert num_read == sorted(num_read)
    assert set(num_read) == set(range(len(STEPS) + 1))


def test_holes_garbage_and_zeros_are_passed_over(file: Path) -> None:
    sound = file.read_bytes()
    noise = random.Random(0).randbytes(5000)
    for blob, least in (
        (noise + sound, len(STEPS)),
        (sound[:200] + sound[260:], len(STEPS) - 3),
        (sound[:200] + bytes(3000) + sound[200:], len(STEPS) - 1),
        (sound + sound, 2 * len(STEPS)),
    ):
        file.write_bytes(blob)
        scalars, notes = read_scalars([file])
        assert len(scalars["a"][0]) >= least
        assert bool(notes) == (blob != sound + sound)
