"""What `fuzz.py` damages besides: the state of a stopped run, cached signals, and the student of a real model."""

import hashlib
import importlib.util
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from damage import damaged_bytes, damaged_tensors, damaged_text
from samples import Samples

from rlkd.errors import UserError
from rlkd.io.cache import Spec, cached_arrays
from rlkd.io.checkpoints import Checkpoints
from rlkd.io.journal import Arrays, Journal, Shapes

SHAPES: Shapes = {"score": ("float64", (3,)), "choice": ("int64", (2, 2))}
SPECS: dict[str, Spec] = {"logits": ((6, 3), "float32"), "maps": ((6, 4), "float32")}
KEY = {"teacher": "a"}
HAS_MODELS = importlib.util.find_spec("transformers") is not None


class FirstWarning(logging.Handler):
    """Keep the first message."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.message = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of `record` if it is the first one."""
        self.message = self.message or record.getMessage()


def refusing_warnings(use: Callable[[], None]) -> Callable[[], None]:
    """Raise UserError with the first warning of rlkd, once `use` has come to its end."""

    def refuse() -> None:
        handler = FirstWarning()
        logger = logging.getLogger("rlkd")
        logger.addHandler(handler)
        try:
            use()
        finally:
            logger.removeHandler(handler)
        if handler.message:
            raise UserError(handler.message.partition(";")[0])

    return refuse


def answer(number: int) -> Arrays:
    """What batch `number` brings."""
    return {"score": np.arange(3.0) + number, "choice": np.full((2, 2), number)}


def fill(arrays: Arrays) -> None:
    """What the teacher says."""
    for name, array in arrays.items():
        array[:] = len(name)


def make(folder: Path) -> None:
    """Sound files: a stopped run with a journal and two checkpoints, cached signals, a real student."""
    (folder / "stopped").mkdir()
    journal = Journal(folder / "stopped")
    for number in range(3):
        journal.arrays(f"batch {number}", {"seeds": [number]}, SHAPES, lambda n=number: answer(n))
    for step in (1, 2):
        journal.save_state(step, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, {"iteration": step})
    cached_arrays("signals", KEY, SPECS, fill)
    if HAS_MODELS:
        _make_student(folder / "real")


def _make_student(folder: Path) -> None:
    import transformers

    from rlkd.compression.real.cut import ship
    from rlkd.compression.real.student_folder import save_module_student
    from rlkd.models.real.attachment import AttachConfig, make_plan
    from rlkd.models.real.instrumented import Instrumented

    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=12,
        num_labels=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    plan = make_plan(model, {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, AttachConfig(), None)
    masks = tuple(torch.ones(group.size) for group in plan.groups)
    shipped = ship(Instrumented(model, plan, []), "sequence_classification", masks, 1.0, 0.6)
    save_module_student(shipped, folder, None, {"figures": {"score": 0.5}})


def fuzz_journal(r: random.Random, s: Samples) -> Callable[[], None]:
    """The journal of a stopped run; four times in five with checksums that are right."""
    path = s.place("stopped/checkpoints/journal.jsonl")
    lines = path.read_bytes().splitlines()
    if r.random() < 0.4:
        path.write_bytes(damaged_bytes(r, path.read_bytes()))
    else:
        bodies = [line.partition(b" ")[2] for line in lines]
        i = r.randrange(len(bodies))
        bodies[i] = damaged_text(r, json.loads(bodies[i])).replace(b"\n", b"")
        chain, blob = "", b""
        for body in bodies:
            chain = hashlib.sha256(chain.encode() + body + b"\n").hexdigest()
            blob += f"{chain} ".encode() + body + b"\n"
        path.write_bytes(blob)

    @refusing_warnings
    def use() -> None:
        journal = Journal(s.place("stopped"), resume=True)
        for number in range(3):
            got = journal.arrays(f"batch {number}", {"seeds": [number]}, SHAPES, lambda n=number: answer(n))
            assert {name: (a.dtype.name, a.shape) for name, a in got.items()} == SHAPES
            assert np.isfinite(got["score"]).all()

    return use


def fuzz_checkpoint(r: random.Random, s: Samples) -> Callable[[], None]:
    """The newest checkpoint; four times in five with a checksum that is right."""
    path = s.place("stopped/checkpoints/state-000002.ckpt")
    line, _, blob = path.read_bytes()[65:].partition(b"\n")
    if r.random() < 0.4:
        path.write_bytes(damaged_bytes(r, path.read_bytes()))
    else:
        if r.random() < 0.5:
            line = damaged_text(r, json.loads(line)).replace(b"\n", b"")
        else:
            blob = damaged_tensors(r, blob)
        content = line + b"\n" + blob
        path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    @refusing_warnings
    def use() -> None:
        found = Checkpoints(s.place("stopped/checkpoints"), keep=2).newest()
        assert found is not None  # the one before is whole
        tensors = found.tensors({"a": (torch.float32, (2, 3)), "b": (torch.int64, (4,))})
        assert (tensors["a"].shape, tensors["b"].shape) == ((2, 3), (4,))

    return use


def fuzz_signals(r: random.Random, s: Samples) -> Callable[[], None]:
    """Cached signals: card or an array; four times in five with a checksum that is right."""
    (folder,) = s.place("cache").glob("signals-*")
    card = folder / "card.json"
    if r.random() < 0.4:
        card.write_bytes(damaged_text(r, json.loads(card.read_bytes())))
    else:
        name = r.choice(sorted(SPECS))
        path = folder / f"{name}.npy"
        blob = path.read_bytes()
        path.write_bytes(damaged_bytes(r, blob) if r.random() < 0.5 else damaged_bytes(r, blob[:128]) + blob[128:])
        if r.random() < 0.8:
            table = json.loads(card.read_bytes())
            table["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            card.write_text(json.dumps(table))

    @refusing_warnings
    def use() -> None:
        arrays = cached_arrays("signals", KEY, SPECS, fill)
        assert {name: tuple(t.shape) for name, t in arrays.items()} == {
            name: shape for name, (shape, _) in SPECS.items()
        }

    return use


def fuzz_real_student(r: random.Random, s: Samples) -> Callable[[], None]:
    """The shipped student of a real model: its card, its exits, its weights or its configuration; often signed anew."""
    from rlkd.compression.real.student_folder import CUT, EXITS, PLAIN, load_module_student

    folder = s.place("real")
    weights = CUT if (folder / CUT).exists() else PLAIN
    name = r.choice(["student.json", "student.json", EXITS, weights, "model/config.json"])
    path = folder / name
    blob = path.read_bytes()
    if name.endswith(".json"):
        path.write_bytes(damaged_text(r, json.loads(blob)) if r.random() < 0.9 else damaged_bytes(r, blob))
    else:
        path.write_bytes(damaged_tensors(r, blob))
        if r.random() < 0.8:
            card = json.loads((folder / "student.json").read_bytes())
            card["sha256"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (EXITS, weights)}
            (folder / "student.json").write_text(json.dumps(card))

    def use() -> None:
        load_module_student(folder)

    return use


KINDS: dict[str, Callable[[random.Random, Samples], Callable[[], None]]] = {
    "journal": fuzz_journal,
    "checkpoint": fuzz_checkpoint,
    "cached signals": fuzz_signals,
    **({"real student": fuzz_real_student} if HAS_MODELS else {}),
}
