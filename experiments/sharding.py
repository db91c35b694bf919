"""Memory of weights, gradients and moments in each of two processes: whole, and sharded over the processes.

    python experiments/sharding.py --out docs/results/sharding

A student LLaMA takes steps with its teacher beside it, in two processes of torchrun on the CPU. Bytes are counted from the
tensors: what a process holds between steps, and the most that it holds in a step, with the whole weights and gradients of
blocks that are gathered for the moment. Activations and buffers of messages are not counted.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.data import Task
from rlkd.data.anchors import Anchors
from rlkd.data.examples import TokenExamples, next_token_mask
from rlkd.io import processes
from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.sharding import part
from rlkd.students.real.causal import CausalStudent
from rlkd.students.real.train_config import ModuleTrainConfig
from rlkd.teachers.real.sharded import shard_teacher
from rlkd.teachers.real.token_signals import token_signals

VOCABULARY, LENGTH, NUM_STEPS = 8_192, 32, 3
STUDENT = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024}
TEACHER = {"num_hidden_layers": 12, "hidden_size": 384, "intermediate_size": 1536}
MIB = 2**20
WAYS = ("whole", "sharded")


def llama(sizes: dict[str, int], seed: int) -> Any:
    """A LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: Any = {"num_attention_heads": 4, "attn_implementation": "eager", **sizes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **shape)).eval()


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of this process's parts of the tensors."""
    return sum(part(t).numel() * t.element_size() for t in tensors if t is not None)


def gathered(model: nn.Module, own: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters that `model` has now besides the process's own ones: whole weights of sharded modules."""
    known = {id(tensor) for tensor in own}
    now = {id(p): p for module in model.modules() for p in module.parameters(recurse=False) if id(p) not in known}
    return list(now.values())


def build(sharded: bool) -> CausalStudent:
    """Return the student, with its teacher beside it."""
    g, order = torch.Generator().manual_seed(0), torch.arange(24)
    ids = torch.randint(3, VOCABULARY, (24, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    splits: Any = {"train": order[:16], "validation": order[16:20], "test": order[20:]}
    inputs = {"input_ids": ids, "attention_mask": mask}
    data = TokenExamples("toy", inputs, order * 0, VOCABULARY, splits, next_token_mask(mask))
    student, teacher = llama(STUDENT, 0), llama(TEACHER, 1)
    few = data.batch(order[:2])
    plan, theirs = (make_plan(m, few, AttachConfig(), LENGTH) for m in (student, teacher))
    if sharded:
        shard_teacher(teacher, theirs.blocks, few, torch.device("cpu"))
    signals = token_signals(teacher, theirs, [], data, 8, Anchors(float(VOCABULARY), 1.0))
    config = ModuleTrainConfig(batch_size=8, learning_rate=1e-3, shard=sharded)
    made = CausalStudent(Instrumented(student, plan, []), data, signals, config, 10, teacher=teacher)
    made.reset([Task(0, 0, 0.0, splits["train"], data.labels[:16], (0.6, 0.3, 0.1), 0.0)])
    return made


def measure(way: str, out: Path) -> None:
    """Count bytes of this process in some steps; writes them to `out`, a folder, by the process's index."""
    torch.set_num_threads(1)
    processes.join("cpu")
    made = build(way == "sharded")
    student, teacher = made.student, made._beside
    assert teacher is not None
    own, frozen = list(student.parameters()), list(teacher.parameters())
    peaks: dict[str, int] = {}

    def look(*_: Any) -> None:
        moments = [m for row in made._optimizer.state.values() for name, m in row.items() if name != "step"]
        extra, beside = gathered(student, own), gathered(teacher, frozen)
        now = {
            "weights": num_bytes(own),
            "gradients": num_bytes(p.grad for p in own),
            "moments": num_bytes(moments),
            "gathered": num_bytes([*extra, *(p.grad for p in extra)]),
            "teacher": num_bytes([*frozen, *beside]),
        }
        for name, size in {**now, "student": sum(now.values()) - now["teacher"], "all": sum(now.values())}.items():
            peaks[name] = max(peaks.get(name, 0), size)

    for module in [*student.modules(), *teacher.modules()]:
        if isinstance(module, nn.Linear):
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)
    student.train()
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0])
    for step in range(NUM_STEPS):
        made._train_step((torch.arange(8) + step) % 16, weights, torch.tensor(2.0), 1.0)
        look()
    (out / f"{way}-{processes.index()}.json").write_text(json.dumps(peaks))
    processes.leave()


def page(found: dict[str, list[dict[str, int]]], command: str, date: str) -> str:
    """Return the page of results."""
    rows = {
        "weights": "student: weights",
        "gradients": "student: gradients",
        "moments": "student: moments of AdamW",
        "gathered": "student: whole weights and gradients that are gathered, at most",
        "student": "**student: most in a step**",
        "teacher": "**teacher: most in a step**",
        "all": "**both: most in a step**",
    }
    lines = [
        "# Memory of sharded weights",
        "",
        f"Command: `{command}`, {date}. Two processes of `torchrun` on the CPU, float32: a student LLaMA of {STUDENT['num_hidden_layers']} blocks, width",
        f"{STUDENT['hidden_size']}, with a teacher of {TEACHER['num_hidden_layers']} blocks, width {TEACHER['hidden_size']}, beside it, vocabulary {VOCABULARY:,}. The larger of the two",
        "processes; activations and buffers of messages are not counted.",
        "",
        "| MiB in one process | whole | sharded | share |",
        "|---|---|---|---|",
    ]
    for key, label in rows.items():
        whole, sharded = (max(process[key] for process in found[way]) for way in WAYS)
        share = f"{sharded / whole:.0%}" if whole else ""
        lines.append(f"| {label} | {whole / MIB:.1f} | {sharded / MIB:.1f} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run both ways, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=WAYS, default=None, help="count here, in a process of torchrun")
    parser.add_argument("--out", type=Path, default=None, help="path without .md and .json; of --measure, a folder")
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.out)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        for way in WAYS:
            settings = {**os.environ, "OMP_NUM_THREADS": "1", "RLKD_CACHE": f"{scratch}/cache-{way}"}
            command = [*start, str(Path(__file__).resolve()), "--measure", way, "--out", scratch]
            subprocess.run(command, check=True, env=settings)
        found = {way: [json.loads((Path(scratch) / f"{way}-{i}.json").read_text()) for i in (0, 1)] for way in WAYS}
    called, date = shlex.join(["python", *sys.argv]), time.strftime("%Y-%m-%d")
    text = page(found, called, date)
    print(text)
    if options.out is not None:
        write_whole(options.out.with_suffix(".md"), text)
        write_json(options.out.with_suffix(".json"), {"command": called, "date": date, "bytes": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
