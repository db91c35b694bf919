"""What comes from elsewhere is refused before it takes memory or runs code; what rlkd writes is whole or not there."""

import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from samples import some_policy
from stable_baselines3 import PPO

from rlkd.agents.policy.bundle import load_bundle, save_bundle
from rlkd.compression import compact, load_student, save_student
from rlkd.cost import load_profile
from rlkd.errors import LONGEST, UserError
from rlkd.io.files import (
    MAX_DEPTH,
    inside,
    load_tensors,
    parse_json,
    read_bytes,
    tensor_shapes,
    write_error,
    write_whole,
)
from rlkd.models import StudentConfig, build_student, initialise

SCHEMA = {"a": (torch.float32, (2, 3))}


class _Bomb:
    """Unpickling it writes a file: what a hostile policy would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb(marker)))


def zip_of_stable_baselines(path: Path, marker: Path) -> None:
    """Laid out as SB3's `model.save` does: a JSON file whose strings hold pickles, and torch's pickled tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": {":serialized:": pickle.dumps(_Bomb(marker)).hex()}}))
        archive.writestr("policy.pth", pickle.dumps(_Bomb(marker)))
        archive.writestr("_stable_baselines3_version", "2.7.0")


def zip_that_stable_baselines_loads(path: Path, marker: Path) -> None:
    """A model that stable-baselines3 really wrote, with one of its pickled fields replaced."""
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(path.with_suffix(".zip"))
    with zipfile.ZipFile(path.with_suffix(".zip")) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    path.with_suffix(".zip").unlink()
    data = json.loads(parts["data"])
    data["policy_class"][":serialized:"] = base64.b64encode(pickle.dumps(_Bomb(marker))).decode()
    parts["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def load_with_stable_baselines(path: Path) -> None:
    with path.open("rb") as file, contextlib.suppress(Exception):  # what it makes of the field then is no class
        PPO.load(io.BytesIO(file.read()), device="cpu")


def pickle_of_torch(path: Path, marker: Path) -> None:
    torch.save({"hidden.0.weight": _Bomb(marker)}, path)


@pytest.mark.parametrize(
    "craft", [plain_pickle, zip_of_stable_baselines, zip_that_stable_baselines_loads, pickle_of_torch]
)
@pytest.mark.parametrize("kind", ["policy", "student"])
def test_a_pickle_in_disguise_runs_no_code(tmp_path: Path, craft: Callable[[Path, Path], None], kind: str) -> None:
    marker, folder = tmp_path / "ran", tmp_path / kind
    if kind == "policy":
        save_bundle(some_policy(), folder, {})
    else:
        save_some_student(folder)
    weights, card = folder / f"{kind}.safetensors", folder / ("bundle.json" if kind == "policy" else "student.json")
    craft(weights, marker)
    table = json.loads(card.read_text())
    prefix = b""
    if kind == "student":
        prefix = json.dumps(table["architecture"], sort_keys=True, separators=(",", ":")).encode() + b"\n"
    table["sha256"] = hashlib.sha256(prefix + weights.read_bytes()).hexdigest()  # so that the checksum lets it pass
    card.write_text(json.dumps(table))
    with pytest.raises(UserError, match="not a safetensors file"):
        (load_bundle if kind == "policy" else load_student)(folder)
    assert not marker.exists()
    if craft is plain_pickle:
        pickle.loads(weights.read_bytes())
    elif craft is zip_that_stable_baselines_loads:
        load_with_stable_baselines(weights)
    elif craft is zip_of_stable_baselines:
        pickle.loads(zipfile.ZipFile(weights).read("policy.pth"))
    else:
        torch.load(io.BytesIO(weights.read_bytes()), weights_only=False)
    assert marker.exists()  # the bomb was live


def save_some_student(folder: Path) -> None:
    student = build_student(StudentConfig(), (8, 8), 10)
    initialise(student, torch.Generator().manual_seed(0))
    save_student(compact(student, student.full_masks(), 0.5), folder, {})


@pytest.mark.parametrize("name", ["bundle.json", "policy.safetensors"])
def test_a_bundle_with_a_link_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    save_bundle(some_policy(), tmp_path / "outside", {})
    save_bundle(some_policy(), tmp_path / "policy", {})
    (tmp_path / "policy" / name).unlink()
    (tmp_path / "policy" / name).symlink_to(f"../outside/{name}")  # what it leads to is sound
    with pytest.raises(UserError, match=f"{name}: leads out of .*; put the file itself there"):
        load_bundle(tmp_path / "policy")


@pytest.mark.parametrize("name", ["student.json", "student.safetensors"])
def test_a_student_with_a_link_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    save_some_student(tmp_path / "outside")
    save_some_student(tmp_path / "student")
    (tmp_path / "student" / name).unlink()
    (tmp_path / "student" / name).symlink_to(tmp_path / "outside" / name)
    with pytest.raises(UserError, match="leads out of"):
        load_student(tmp_path / "student")


def test_paths_stay_inside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "file").write_text("x")
    assert inside(tmp_path / "link", "file").read_text() == "x"  # the folder itself may be reached by a link
    for name in ("../file", "/etc/passwd", "a/../../b"):
        with pytest.raises(UserError, match="leads out of"):
            inside(tmp_path / "real", name)
    (tmp_path / "real" / "loop").symlink_to("loop")
    with pytest.raises(UserError):
        read_bytes(inside(tmp_path / "real", "loop"), 10)


def test_only_files_of_a_limited_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a file"):
        read_bytes(tmp_path / "pipe", 10)  # without a guard this would wait for a writer for ever
    with pytest.raises(UserError, match="/dev/zero: not a file"):
        read_bytes(Path("/dev/zero"), 10)
    with pytest.raises(UserError, match="not a file"):
        read_bytes(tmp_path, 10)
    with pytest.raises(UserError, match="no file name"):
        read_bytes(Path("a\0b"), 10)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)  # sparse
    tracemalloc.start()
    with pytest.raises(UserError, match="1099511627776 bytes; allowed: at most 10"):
        read_bytes(tmp_path / "huge", 10)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": 1e999}', "too large a number"),
        ('{"a": ' + "9" * 400 + "}", "too large a number"),
        ('{"a": -1' + "0" * 309 + "}", "too large a number"),
        ('{"a": ' + "9" * 5000 + "}", "damaged"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ('{"a": ' + "[" * 100_000, f"nested deeper than {MAX_DEPTH}"),
        ('{"a":' * 100_000, f"nested deeper than {MAX_DEPTH}"),
        ("[1]", "expected an object, got list"),
        ("", "damaged"),
        ("\udcff", "damaged"),
    ],
)
def test_json_that_rlkd_never_writes_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_json(text.encode("utf-8", "surrogateescape"), "x: not a card")


def test_brackets_in_texts_are_no_depth() -> None:
    text = "[" * 1000 + '\\"' + "{" * 1000
    value = {"a": text, "b": [[]] * 100}
    assert parse_json(json.dumps(value).encode(), "x") == value


def headed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"short",
        (2**63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        headed(b"no json"),
        headed(b"[" * 50_000),
        headed(b'{"a": 3}'),
        headed(b'{"a": {"dtype": "F32", "shape": [-1]}}'),
        headed(b'{"a": {"dtype": "F32", "shape": [1e3]}}'),
        headed(b'{"a": {"dtype": "F32", "shape": "23"}}'),
        headed(b'{"a": {"dtype": ["F32"], "shape": [2, 3], "data_offsets": [0, 24]}}', bytes(24)),
        headed(b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 99999999999]}}', bytes(24)),
        headed(b'{"a": {"dtype": "F32", "shape": [2, 3]}}', bytes(24)),
    ],
)
def test_a_damaged_header_is_refused(blob: bytes) -> None:
    with pytest.raises(UserError, match=r"^x: "):
        load_tensors(blob, SCHEMA, "x")


def test_shapes_are_compared_before_a_tensor_is_made() -> None:
    size = 2**38
    header = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    assert tensor_shapes(headed(header), "x") == {"a": (torch.float32, (size,))}
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a is torch\.float32 \[274877906944\]; expected float32 \[2, 3\]"):
        load_tensors(headed(header), SCHEMA, "x")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_tensors_of_the_schema_load() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    assert torch.equal(load_tensors(save(tensors, {"note": "metadata is allowed"}), SCHEMA, "x")["a"], tensors["a"])


@pytest.mark.parametrize("text", ["{", '{"format": 2}', '{"a": NaN}', "[" * 5000])
def test_a_cost_profile_from_elsewhere_is_checked(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=r"p\.json: not a cost profile.*run `rlkd calibrate`"):
        load_profile(tmp_path / "p.json")


def test_an_interrupted_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"f: cannot write it, the disk is full \(No space left on device\); free some"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write it .*choose a place that can be written"):
        write_whole(tmp_path / "file" / "f", "x")
    assert "disk is full" in str(write_error("x", OSError(errno.EDQUOT, "Disk quota exceeded")))


WRITER = """
import sys
from pathlib import Path
from rlkd.io.files import write_whole
letter = sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    write_whole(Path(sys.argv[1]), letter * 300_000)
"""


@pytest.mark.slow
def test_two_writers_at_once_never_tear_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    write_whole(path, b"a" * 300_000)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for letter in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
        seen.add(content[:1])
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen == {b"a", b"b"}  # they did take turns
    for writer in writers:
        writer.communicate()
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_message_is_never_as_long_as_what_it_quotes() -> None:
    short, long = UserError("a" * LONGEST), UserError("begins" + "x" * 100_000 + "ends")
    assert str(short) == "a" * LONGEST
    assert len(str(long)) <= LONGEST
    assert str(long).startswith("begins")
    assert str(long).endswith("ends")
