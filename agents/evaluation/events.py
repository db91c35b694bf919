"""Read the scalars of TensorBoard event files, damaged files included.

TensorBoard's own reader stops at the first damaged record without a word. This one goes on behind it and says how much
is lost.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

from rlkd.io.files import MAX_TENSOR_BYTES, read_bytes

LENGTH, CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
FRAME = LENGTH.size + 2 * CHECKSUM.size  # bytes of a record beside its content: length, checksum, content, checksum
Scalars = dict[str, tuple[list[int], list[float]]]


@dataclass
class _Reading:
    """How the reading of one file went."""

    num_read: int = 0
    num_lost: int = 0
    first_damage: int | None = None  # byte
    is_cut: bool = False  # the last record is not whole

    def damaged(self, place: int, num_lost: int = 1) -> None:
        """Note damage at byte `place`."""
        self.num_lost += num_lost
        self.first_damage = place if self.first_damage is None else self.first_damage

    def note(self) -> str:
        """One line for the user; "" for a sound file."""
        parts = []
        if self.first_damage is not None:
            parts.append(f"damaged from byte {self.first_damage} on, {self.num_lost} records lost")
        if self.is_cut:
            parts.append("the last record is not whole: the run still writes it, or the file was cut")
        return f"{'; '.join(parts)}; {self.num_read} records were read" if parts else ""


def read_scalars(files: Sequence[Path]) -> tuple[Scalars, list[str]]:
    """Read steps and values of every scalar tag, and a note for every damaged file.

    Args:
        files: event files in the order in which they were written.

    Raises:
        UserError: a file cannot be opened, is no regular file, or is too large.
    """
    scalars: Scalars = {}
    notes = []
    for path in files:
        reading = _Reading()
        for place, record in _records(read_bytes(path, MAX_TENSOR_BYTES), reading):
            try:
                event = Event.FromString(record)
                points = [(value.tag, _scalar(value)) for value in event.summary.value]
            except (DecodeError, ValueError, TypeError):  # the checksum is right, the content is not an event
                reading.damaged(place)
                continue
            reading.num_read += 1
            for tag, number in points:
                if number is not None:
                    steps, numbers = scalars.setdefault(tag, ([], []))
                    steps.append(event.step)
                    numbers.append(number)
        if reading.note():
            notes.append(f"{path}: {reading.note()}")
    return scalars, notes


def _records(blob: bytes, reading: _Reading) -> Iterator[tuple[int, bytes]]:
    """Place and content of every record whose checksums are right, or can be made out between two sound records."""
    place = 0
    while place < len(blob):
        length = _length_at(blob, place)
        if length is not None and length <= MAX_TENSOR_BYTES and place + FRAME + length > len(blob):
            reading.is_cut = True
            return
        if length is not None and length <= MAX_TENSOR_BYTES:
            following = place + FRAME + length
        else:  # the length itself is damaged: look for the next record
            following = _next_record(blob, place + 1)
            if len(blob) - place < LENGTH.size + CHECKSUM.size:
                reading.is_cut = True
                return
        content = blob[place + LENGTH.size + CHECKSUM.size : following - CHECKSUM.size]
        is_sound = _check_at(blob, following - CHECKSUM.size) == masked_crc32c(content) if content else False
        if length is None or not is_sound:
            reading.damaged(place, int(not is_sound))
        if is_sound:
            yield place, content
        place = following


def _length_at(blob: bytes, place: int) -> int | None:
    """Return the length of the record at byte `place`, or None where its checksum is wrong."""
    head = blob[place : place + LENGTH.size]
    if len(head) < LENGTH.size or _check_at(blob, place + LENGTH.size) != masked_crc32c(head):
        return None
    return int(LENGTH.unpack(head)[0])


def _check_at(blob: bytes, place: int) -> int | None:
    """Return the checksum at byte `place`, or None behind the end."""
    return CHECKSUM.unpack_from(blob, place)[0] if 0 <= place <= len(blob) - CHECKSUM.size else None


def _next_record(blob: bytes, place: int) -> int:
    """Where the next record with a sound length begins, from byte `place` on; the end of the file if there is none."""
    upper = bytes(LENGTH.size // 2)  # no record is longer than 4 GiB: the upper half of its length is zero
    half = blob.find(upper, place + len(upper))
    while half >= 0:
        begin = half - len(upper)
        length = int.from_bytes(blob[begin:half], "little")
        # an empty record would be no event, and testing every zero of a long run of them takes minutes
        if 0 < length <= len(blob) - begin - FRAME and _length_at(blob, begin) is not None:
            return begin
        half = blob.find(upper, half + 1)
    return len(blob)


def _scalar(value: Summary.Value) -> float | None:
    """Return the number in a summary, or None for images, texts, histograms and the like."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
        return float(make_ndarray(value.tensor).item())
    return None
