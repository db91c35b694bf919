"""Damage every kind of file that rlkd reads, and see that each ends in success or in one clear line.

    python experiments/fuzz.py                                    # 10,000 inputs
    python experiments/fuzz.py --write docs/results/fuzz.md       # the same, with its figures written down
    python experiments/fuzz.py --only config --first 812 --num 1  # one input again

An input is a sound file with one to three damages: bits flipped, bytes cut, put in or repeated; fields swapped, gone,
doubled, nested, or given a value of another kind or size; tensors with other values and headers with other shapes,
their checksums made right again. Input i of a kind depends on the seed, the kind and i alone.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load, save

from rlkd.agents.bundle import load_bundle, save_bundle
from rlkd.agents.policy import TENSORS, Policy
from rlkd.agents.report import read_run
from rlkd.agents.search import StaticSettings
from rlkd.cli.arguments import CONFIG_FOLDER, new_parser, parse
from rlkd.compression import compact, load_student, save_student
from rlkd.configs import ExperimentConfig
from rlkd.cost import CostProfile, load_profile, save_profile
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig
from rlkd.errors import UserError
from rlkd.models import StudentConfig, build_student, initialise
from rlkd.tasks import load_dataset
from rlkd.teachers import TeacherConfig, load_teachers

MAX_S, MAX_MIB = 2.0, 1024
HUGE: list[Any] = [
    10**30,
    -(10**30),
    2**63,
    2**31,
    10**400,
    1e308,
    -1e308,
    5e-324,
    1e-30,
    -1,
    0,
    float("inf"),
    float("nan"),
]
ODD: list[Any] = [
    None,
    True,
    "x",
    "",
    "1",
    [],
    {},
    [1],
    {"a": 1},
    [[[]]],
    "a\0b\x1b[2J\n",
    "../../etc/passwd",
    "\ud800",
    1.5,
]
TEACHERS = TeacherConfig(widths=(6,), num_samples=(24, 40), num_steps=1)


def some_policy(hidden: int = 5) -> Policy:
    """A small policy with random weights."""
    g = torch.Generator().manual_seed(0)
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(hidden, num_seen), (hidden,), (hidden, hidden), (hidden,), (num_set, hidden), (num_set,)]
    weights = {name: torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    static = StaticSettings(torch.rand(2, num_set, generator=g), torch.rand(2, 3, generator=g))
    mean, deviation = torch.rand(num_seen, generator=g), 0.1 + torch.rand(num_seen, generator=g)
    return Policy(weights, mean, deviation, torch.rand(num_set, generator=g), static, ControlConfig(step=0.2))


def damaged_bytes(r: random.Random, blob: bytes) -> bytes:
    """`blob` with bits flipped, cut, filled, repeated or replaced."""
    data = bytearray(blob)
    place = r.randrange(len(data) + 1)
    size = r.choice([1, 4, 8, 64, 1000])
    kind = r.choice(["flip", "flip", "flip", "head", "cut", "hole", "put", "repeat", "zero", "random", "empty"])
    if kind in ("flip", "head") and data:
        reach = len(data) if kind == "flip" else min(len(data), 64)
        for _ in range(r.randint(1, 16)):
            data[r.randrange(reach)] ^= 1 << r.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "hole":
        del data[place : place + size]
    elif kind == "put":
        data[place:place] = r.randbytes(size)
    elif kind == "repeat":
        data[place:place] = data[place : place + size] * r.randint(1, 20)
    elif kind == "zero":
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif kind == "random":
        data = bytearray(r.randbytes(r.randrange(5000)))
    elif kind == "empty":
        data = bytearray()
    return bytes(data)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        pairs = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        found += [(node, key) for key, _ in pairs]
        waiting += [value for _, value in pairs]
    return found


def damaged_tree(r: random.Random, tree: Any) -> Any:
    """A copy of `tree` with one value swapped, gone, renamed, nested, or of another kind or size."""
    tree = copy.deepcopy(tree)
    found = places(tree)
    if not found:
        return r.choice(ODD)
    node, key = r.choice(found)
    kind = r.choice(["swap", "huge", "huge", "odd", "odd", "gone", "new", "deep", "long", "nudge"])
    if kind == "swap":
        other, place = r.choice(found)
        node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
    elif kind == "huge":
        node[key] = r.choice(HUGE)
    elif kind == "odd":
        node[key] = copy.deepcopy(r.choice(ODD))
    elif kind == "gone":
        del node[key]
    elif kind == "new" and isinstance(node, dict):
        node[r.choice(["more", "", "x" * 300, "__class__", "format"])] = r.choice(ODD)
    elif kind == "deep":
        for _ in range(r.choice([10, 40, 90])):
            node[key] = [node[key]] if r.random() < 0.5 else {"a": node[key]}
    elif kind == "long":
        node[key] = r.choice(["x" * 100_000, [0] * 50_000, 10**4000])
    elif isinstance(node[key], int | float) and not isinstance(node[key], bool) and abs(node[key]) < 2**53:
        node[key] = node[key] * r.choice([-1, 2, 0.5, 1000]) + r.choice([0, 1, -1])
    return tree


def damaged_text(r: random.Random, tree: Any) -> bytes:
    """JSON of a damaged tree, or a text that no tree makes."""
    for _ in range(r.randint(1, 3)):
        tree = damaged_tree(r, tree)
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    if limit:
        sys.set_int_max_str_digits(0)  # only for writing: what reads it keeps its limit
    try:
        blob = json.dumps(tree, indent=r.choice([None, 1])).encode()
    finally:
        if limit:
            sys.set_int_max_str_digits(limit)
    if r.random() < 0.1:
        blob = r.choice(
            [b"[" * 100_000, b'{"a":' * 50_000, blob + blob, b"\xef\xbb\xbf" + blob, b" " * 2**21, blob[1:]]
        )
    return blob


def damaged_tensors(r: random.Random, blob: bytes) -> bytes:
    """safetensors with damaged bytes, another header, or other tensors."""
    kind = r.choice(["bytes", "header", "values", "tensors"])
    if kind == "bytes":
        return damaged_bytes(r, blob)
    length = int.from_bytes(blob[:8], "little")
    if kind == "header":
        header = damaged_text(r, json.loads(blob[8 : 8 + length]))
        size = r.choice([len(header)] * 4 + [0, 2**63, 2**31, len(header) + 1])
        return size.to_bytes(8, "little") + header + blob[8 + length :]
    tensors = {name: tensor.clone() for name, tensor in load(blob).items()}
    name = r.choice(sorted(tensors))
    if kind == "values":
        flat = tensors[name].flatten()
        value = r.choice([float("nan"), float("inf"), 3e38, -3e38, 1e-45, -1.0, 0.0, 2.0, 1e5])
        if not flat.is_floating_point():
            value = r.choice([-1, 2**62, 0, 64, 10**6])
        flat[: r.choice([1, len(flat)])] = value
        if flat.is_floating_point() and r.random() < 0.5:
            flat[:: r.randint(2, 3)] *= -1  # sums of both signs: infinity less infinity is no number
        tensors[name] = flat.reshape(tensors[name].shape)
    else:
        change = r.choice(["gone", "type", "more", "shape", "swap"])
        other = r.choice(sorted(tensors))
        if change == "gone":
            del tensors[name]
        elif change == "type":
            tensors[name] = tensors[name].to(r.choice([torch.float64, torch.float16, torch.int64, torch.bool]))
        elif change == "more":
            tensors["more"] = torch.zeros(3)
        elif change == "shape":
            tensors[name] = tensors[name].flatten()[: r.randint(0, 3)].contiguous()
        else:
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    return save(tensors)


@dataclass
class Samples:
    """Sound files of every kind, and where their damaged copies go."""

    folder: Path
    sound: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ["RLKD_CACHE"] = str(self.folder / "cache")
        self.data = load_dataset("digits")
        save_bundle(some_policy(), self.folder / "policy", {"seed": 3, "config": {"a": [1, 2]}})
        for name, config in (("mlp", StudentConfig()), ("conv", StudentConfig("conv", (4, 6), (1,)))):
            student = build_student(config, (8, 8), 10)
            initialise(student, torch.Generator().manual_seed(0))
            masks = student.full_masks()
            masks[0][: len(masks[0]) // 2] = 0
            save_student(compact(student, masks, 0.4), self.folder / name, {"figures": {"score": 0.5}})
        save_profile(
            CostProfile(256, (1e-6,) * 8, dict(ENERGY_MODEL), {"grid": [{"a": 1.0}]}), self.folder / "profile.json"
        )
        load_teachers(TEACHERS, self.data)
        self.teachers = next((self.folder / "cache").glob("teachers-*"))
        self.events = self._run()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                self.sound[str(path.relative_to(self.folder))] = path.read_bytes()

    def _run(self) -> Path:
        from torch.utils.tensorboard import SummaryWriter

        run = self.folder / "run"
        writer = SummaryWriter(str(run / "tensorboard"))  # type: ignore[no-untyped-call]
        for step in range(1, 6):
            for tag in ("student/score", "student/num_trainings", "action/temperature"):
                writer.add_scalar(tag, step / 10, step)  # type: ignore[no-untyped-call]
        writer.add_text("config", "a: 1")  # type: ignore[no-untyped-call]
        writer.close()  # type: ignore[no-untyped-call]
        figure = {"mean": 0.5, "iqm": 0.51, "ci95": [0.4, 0.6]}
        entry = dict.fromkeys(("score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio"), figure)
        pair = {"difference": 0.0421, "ci95": [0.03, 0.05], "probability_of_improvement": 0.9}
        table = {"methods": {"policy": entry, "static": entry}, "paired": {"policy-static": pair}}
        cost = {"agent_trainings": 24, "wall_s": 3.0, "updates_per_s": 100.0, "search_trainings": 3}
        result = {**table, "preferences": {"0.6": table}, "cost": cost, "num_tasks": 8, "split": "test"}
        (run / "result.json").write_text(json.dumps(result))
        (run / "command.txt").write_text("rlkd train\n")
        return next((run / "tensorboard").iterdir())

    def restore(self) -> None:
        """Make every file sound again."""
        for name, blob in self.sound.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != blob:
                path.write_bytes(blob)

    def place(self, name: str) -> Path:
        """Path of a file to damage."""
        return self.folder / name


def fuzz_bundle(r: random.Random, s: Samples) -> Callable[[], None]:
    """A policy bundle: card or tensors; four times in five with a checksum that is right."""
    card, weights = s.place("policy/bundle.json"), s.place("policy/policy.safetensors")
    if r.random() < 0.5:
        text = (
            damaged_text(r, json.loads(card.read_bytes())) if r.random() < 0.8 else damaged_bytes(r, card.read_bytes())
        )
        card.write_bytes(text)
    else:
        weights.write_bytes(damaged_tensors(r, weights.read_bytes()))
        if r.random() < 0.8:
            table = json.loads(card.read_bytes())
            card.write_text(json.dumps({**table, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))

    def use() -> None:
        policy = load_bundle(s.place("policy")).policy
        assert torch.isfinite(policy.act(torch.rand(2, len(OBSERVATIONS)))).all()
        for positions in (policy.start, policy.static.positions):
            assert ((positions >= 0) & (positions <= 1)).all()

    return use


def fuzz_student(r: random.Random, s: Samples) -> Callable[[], None]:
    """A compacted student: card or tensors; four times in five with a checksum that is right."""
    folder = s.place(r.choice(["mlp", "conv"]))
    card, weights = folder / "student.json", folder / "student.safetensors"
    table = json.loads(card.read_bytes())
    if r.random() < 0.5:
        damaged = damaged_text(r, table["architecture"] if r.random() < 0.7 else table)
        try:
            architecture = json.loads(damaged)
            if isinstance(architecture, dict) and "architecture" not in architecture:
                table["architecture"] = architecture
                damaged = json.dumps(table).encode()
        except (ValueError, RecursionError):
            table = {}
        card.write_bytes(damaged)
    else:
        weights.write_bytes(damaged_tensors(r, weights.read_bytes()))
    if r.random() < 0.8 and isinstance(table.get("architecture"), dict):
        text = json.dumps(table["architecture"], sort_keys=True, separators=(",", ":")).encode()
        table["sha256"] = hashlib.sha256(text + b"\n" + weights.read_bytes()).hexdigest()
        card.write_text(json.dumps(table))

    def use() -> None:
        student = load_student(folder)
        student(torch.rand(2, *student.input_shape))

    return use


def fuzz_profile(r: random.Random, s: Samples) -> Callable[[], None]:
    """A cost profile."""
    path = s.place("profile.json")
    blob = path.read_bytes()
    path.write_bytes(damaged_text(r, json.loads(blob)) if r.random() < 0.8 else damaged_bytes(r, blob))
    student = build_student(StudentConfig(), (8, 8), 10)

    def use() -> None:
        profile = load_profile(path)
        cost = profile.cost(student, torch.tensor([[64, 48, 48]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.5]))
        assert torch.isfinite(cost.energy_ratio).all()

    return use


def fuzz_teachers(r: random.Random, s: Samples) -> Callable[[], None]:
    """The cache of trained teachers."""
    s.teachers.write_bytes(damaged_tensors(r, s.teachers.read_bytes()))

    def use() -> None:
        load_teachers(TEACHERS, s.data)

    return use


def fuzz_config(r: random.Random, s: Samples) -> Callable[[], None]:
    """A YAML config: damaged text, or YAML or JSON (which is YAML) of a damaged tree."""
    import yaml

    path = s.place("config.yaml")
    blob = (CONFIG_FOLDER / f"{r.choice(['default', 'smoke', 'conv', 'wide'])}.yaml").read_bytes()
    tree = yaml.safe_load(blob)
    kind = r.choice(["bytes", "json", "yaml", "yaml", "word"])
    if kind == "bytes":
        path.write_bytes(damaged_bytes(r, blob))
    elif kind == "json":
        path.write_bytes(damaged_text(r, tree))
    elif kind == "yaml":
        shallow = damaged_tree(r, tree)
        try:
            path.write_text(yaml.safe_dump(shallow), errors="replace")
        except (RecursionError, yaml.YAMLError, ValueError):
            path.write_bytes(damaged_text(r, tree))
    else:
        words = [
            "!!python/object/apply:os.system [true]",
            "&a",
            "*a",
            "<<: {a: 1}",
            "? [a]",
            "---",
            "%YAML 9.9",
            "|",
            ".inf",
            "0x",
            "1_0",
        ]
        lines = blob.decode().splitlines()
        lines.insert(r.randrange(len(lines) + 1), r.choice(["", "  ", "task: ", "ppo: "]) + r.choice(words))
        path.write_text("\n".join(lines))

    def use() -> None:
        config, _ = parse(new_parser("train", "", []), ["--config", str(path)], ExperimentConfig)
        assert config is not None
        config.check()
        build_student(config.student, (8, 8), 10)

    return use


def fuzz_events(r: random.Random, s: Samples) -> Callable[[], None]:
    """A run folder: event file as bytes, records with right checksums, or the result."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def record(content: bytes, length: int | None = None) -> bytes:
        head = struct.pack("<Q", len(content) if length is None else length)
        return head + struct.pack("<I", masked_crc32c(head)) + content + struct.pack("<I", masked_crc32c(content))

    kind = r.choice(["bytes", "records", "records", "result"])
    blob = s.events.read_bytes()
    if kind == "bytes":
        s.events.write_bytes(damaged_bytes(r, blob))
    elif kind == "result":
        path = s.place("run/result.json")
        path.write_bytes(damaged_text(r, json.loads(path.read_bytes())))
    else:
        place, records = 0, []
        while place < len(blob):
            length = int.from_bytes(blob[place : place + 8], "little")
            records.append(blob[place + 12 : place + 12 + length])
            place += 16 + length
        for _ in range(r.randint(1, 3)):
            i = r.randrange(len(records))
            change = r.choice(["damage", "damage", "swap", "double"])
            j = r.randrange(len(records))
            if change == "damage":
                records[i] = damaged_bytes(r, records[i])
            elif change == "swap":
                records[i], records[j] = records[j], records[i]
            else:
                records += [records[i]] * r.randint(1, 50)
        length_of = (
            {r.randrange(len(records)): r.choice([2**62, 2**40, 2**31, 2**63 + 5, 0])} if r.random() < 0.2 else {}
        )
        s.events.write_bytes(b"".join(record(c, length_of.get(i)) for i, c in enumerate(records)))

    def use() -> None:
        read_run(s.place("run"))

    return use


KINDS: dict[str, Callable[[random.Random, Samples], Callable[[], None]]] = {
    "policy bundle": fuzz_bundle,
    "student": fuzz_student,
    "cost profile": fuzz_profile,
    "teacher cache": fuzz_teachers,
    "config": fuzz_config,
    "event files and result": fuzz_events,
}


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    messages: set[str] = field(default_factory=set)


class HangError(BaseException):
    """An input took longer than any may."""


@contextmanager
def _limited() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 2 * MAX_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """No more than 1 GiB of address space beyond what the libraries took."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MAX_MIB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(num: int, seed: int, only: str | None = None, first: int = 0) -> dict[str, Tally]:
    """Try `num` inputs, spread evenly over the kinds (or all of one kind, from number `first`)."""
    kinds = {only: KINDS[only]} if only else KINDS
    tallies = {name: Tally() for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ.get("RLKD_CACHE")
        samples = Samples(Path(folder))
        try:
            for i in range(num):
                name = list(kinds)[i % len(kinds)]
                number = first + i // len(kinds)
                samples.restore()
                use = KINDS[name](random.Random(f"{seed} {name} {number}"), samples)
                _try(use, tallies[name], f"{name} {number}")
        finally:
            os.environ.pop("RLKD_CACHE")
            if cache is not None:
                os.environ["RLKD_CACHE"] = cache
    return tallies


def _try(use: Callable[[], None], tally: Tally, label: str) -> None:
    began = time.perf_counter()
    try:
        with _limited():
            use()
        tally.accepted += 1
    except UserError as error:
        tally.refused += 1
        tally.messages.add("".join(c for c in str(error) if not c.isdigit())[-60:])
        if len(str(error)) > 1000:
            tally.failures.append(f"{label}: a message of {len(str(error))} characters")
    except (Exception, HangError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}, {Path(where.filename).name}:{where.lineno}"
        tally.failures.append(f"{label}: {error!r:.150} at {at}")
    taken_s = time.perf_counter() - began
    if taken_s > MAX_S:
        tally.failures.append(f"{label}: took {taken_s:.1f} s")
    tally.slowest_s = max(tally.slowest_s, taken_s)


def page(tallies: dict[str, Tally], seed: int, wall_s: float, peak_mib: float, start_mib: float) -> str:
    """The figures as Markdown."""
    total = sum(t.accepted + t.refused + len(t.failures) for t in tallies.values())
    failed = sum(len(t.failures) for t in tallies.values())
    lines = [
        "# Damaged files",
        "",
        f"{total:,} damaged files, {failed} of which ended in anything but success or one `UserError`, or took more than "
        f"{MAX_S:g} s. Peak memory of the whole process {peak_mib:.0f} MiB, {start_mib:.0f} MiB of which the libraries and "
        f"sound files took before the first damaged one; address space was limited to {MAX_MIB} MiB beyond that.",
        "",
        "| file | inputs | accepted | refused | other | different refusals | slowest, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, t in tallies.items():
        num = t.accepted + t.refused + len(t.failures)
        lines.append(
            f"| {name} | {num:,} | {t.accepted:,} | {t.refused:,} | {len(t.failures)} | {len(t.messages)} | {t.slowest_s:.2f} |"
        )
    lines += [
        "",
        "*accepted*: the damage left the file sound, such as another provenance or another value within bounds. "
        "A loaded policy, student and profile is used once too: its answers must be finite numbers. "
        "*different refusals*: messages that differ in more than their numbers.",
        "",
        f"Command: `python experiments/fuzz.py --num {total} --seed {seed} --write docs/results/fuzz.md`, "
        f"{time.strftime('%Y-%m-%d')}, {wall_s:.0f} s on one core ({platform.machine()}, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}). `tests/test_fuzz.py` runs 200 inputs of it.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Fuzz, print, perhaps write; 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(len(KINDS), seed=-1)  # whatever libraries load late
    start_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    limit_memory()
    began = time.perf_counter()
    tallies = fuzz(options.num, options.seed, options.only, options.first)
    wall_s = time.perf_counter() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = page(tallies, options.seed, wall_s, peak_mib, start_mib)
    print(text)
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.write:
        options.write.write_text(text)
    return 1 if failures or peak_mib > MAX_MIB else 0


if __name__ == "__main__":
    sys.exit(main())
