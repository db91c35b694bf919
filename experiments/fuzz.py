"""Damage every kind of file that rlkd reads, and see that each ends in success or in one clear line.

    python experiments/fuzz.py                                    # 10,000 inputs
    python experiments/fuzz.py --write docs/results/fuzz.md       # the same, with its figures written down
    python experiments/fuzz.py --only config --first 812 --num 1  # one input again

An input is a sound file with one to three damages: bits flipped, bytes cut, put in or repeated; fields swapped, gone,
doubled, nested, or given a value of another kind or size; tensors with other values and headers with other shapes,
their checksums made right again. Input i of a kind depends on the seed, the kind and i alone.
"""

import argparse
import contextlib
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

import torch
from damage import damaged_bytes, damaged_tensors, damaged_text, damaged_tree
from fuzz_states import KINDS as MORE
from fuzz_states import make
from safetensors import SafetensorError
from safetensors.torch import load
from samples import TEACHERS, Samples

from rlkd.agents.evaluation.report import read_run
from rlkd.agents.policy.bundle import load_bundle
from rlkd.cli.arguments import CONFIG_FOLDER, new_parser, parse
from rlkd.compression import load_student
from rlkd.configs import ExperimentConfig
from rlkd.cost import load_profile
from rlkd.envs import OBSERVATIONS
from rlkd.errors import UserError
from rlkd.models import StudentConfig, build_student
from rlkd.teachers import load_teachers
from rlkd.teachers.training import signed

MAX_S, MAX_MIB = 2.0, 1024


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
        assert ((policy.start >= 0) & (policy.start <= 1)).all()

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
    """The cache of trained teachers; four times in five with a checksum that is right."""
    s.teachers.write_bytes(damaged_tensors(r, s.teachers.read_bytes()))
    if r.random() < 0.8:
        with contextlib.suppress(SafetensorError, ValueError, KeyError, RuntimeError):  # no tensors are left to sign
            s.teachers.write_bytes(signed(load(s.teachers.read_bytes())))

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
        for scenario in config.scenarios:
            build_student(scenario.student, (8, 8), 10)

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
    **MORE,
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
    signal.setitimer(signal.ITIMER_REAL, 10 * MAX_S)  # waiting takes no processor time, and ends here
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
        samples = Samples(Path(folder), (make,))
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
    began = time.process_time()  # not the clock on the wall: other work on the machine is no hang
    try:
        with _limited():
            use()
        tally.accepted += 1
    except UserError as error:
        if len(str(error)) > 1000:
            tally.failures.append(f"{label}: a message of {len(str(error))} characters")
        else:
            tally.refused += 1
        tally.messages.add("".join(c for c in str(error) if not c.isdigit())[-60:])
    except (Exception, HangError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}, {Path(where.filename).name}:{where.lineno}"
        tally.failures.append(f"{label}: {error!r:.150} at {at}")
    taken_s = time.process_time() - began
    if taken_s > MAX_S and not any(failure.startswith(f"{label}: ") for failure in tally.failures[-1:]):
        tally.failures.append(f"{label}: took {taken_s:.1f} s")
    tally.slowest_s = max(tally.slowest_s, taken_s)


def _peak_mib() -> float:
    """Peak memory of this process alone; getrusage would also tell that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def page(tallies: dict[str, Tally], seed: int, wall_s: float, *, peak_mib: float, start_mib: float) -> str:
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
        "| file | inputs | accepted | refused | other | different refusals | slowest, s of processor |",
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
        "A loaded policy, student and profile is used once too: its answers must be finite numbers. Of a journal, a "
        "checkpoint and cached signals, *refused* means that what is damaged was named and left out. "
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
    start_mib = _peak_mib()
    limit_memory()
    began = time.perf_counter()
    tallies = fuzz(options.num, options.seed, options.only, options.first)
    wall_s = time.perf_counter() - began
    peak_mib = _peak_mib()
    text = page(tallies, options.seed, wall_s, peak_mib=peak_mib, start_mib=start_mib)
    print(text)
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.write:
        options.write.write_text(text)
    return 1 if failures or peak_mib > MAX_MIB else 0


if __name__ == "__main__":
    sys.exit(main())
