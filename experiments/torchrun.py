"""Two processes against one: `torchrun -m rlkd distil` on a small language model, a resume of it, and time per step.

    python experiments/torchrun.py --out docs/results/torchrun

The same command runs alone, under torchrun with two processes, and under torchrun with a stop after half of the windows and a
resume. What is compared are the curves of the validation cross entropy and the weights that ship. Time per step is of windows of
a larger student, in turns: one process on one core, two processes on two cores, with and without gradient checkpointing.
"""

import argparse
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlkd.io.files import write_whole
from rlkd.io.records import write_json

WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = len(WORDS) + 3
NUM_WINDOWS, STOP_AFTER = 6, 3
OPTIONS = [
    *("--data", "texts.jsonl", "--teacher", "teacher", "--student", "small.json", "--num_windows", str(NUM_WINDOWS)),
    *("--train.steps_per_window", "20", "--train.batch_size", "16", "--train.learning_rate", "2e-3"),
    *(
        "--cost.batch_size",
        "4",
        "--cost.batches",
        "[]",
        "--tokens.top_k",
        "8",
        "--columns.max_length",
        "24",
        "--goal.keep",
        "0.5",
    ),
]
STOPPED = """
import sys
from rlkd.cli.main import main
from rlkd.io.journal import Journal
save = Journal.save_state
def stop(self, step, tensors, note):
    save(self, step, tensors, note)
    if step == int(sys.argv[1]):
        raise KeyboardInterrupt
Journal.save_state = stop
sys.exit(main(sys.argv[2:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ROUNDS, WINDOW = 3, 6  # timed windows in turns, and their steps


def llama(layers: int, width: int, seed: int) -> Any:
    """A LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **shape))


def texts(count: int, length: int = 22) -> list[str]:
    """Walks over the words in which each next word is one of three that follow the last one."""
    draw = random.Random(0)
    follows = {word: draw.sample(WORDS, 3) for word in WORDS}
    rows = []
    for _ in range(count):
        walk = [draw.choice(WORDS)]
        for _ in range(length - 1):
            walk.append(draw.choice(follows[walk[-1]]))
        rows.append(" ".join(walk))
    return rows


def build(folder: Path) -> None:
    """Write texts, a teacher that learned them for a moment, its tokenizer, and a student's configuration."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = texts(600)
    table = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    ids = tokenizer(rows, return_tensors="pt")["input_ids"]
    teacher = llama(3, 64, 1).train()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step in range(150):
        batch = ids[torch.randint(400, (32,), generator=torch.Generator().manual_seed(step))]
        teacher(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval().save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    llama(2, 32, 2).config.to_json_file(folder / "small.json", use_diff=False)


def call(folder: Path, *command: str, expected: tuple[int, ...] = (0,)) -> None:
    """Run a command in `folder` on one thread a process."""
    settings = {"OMP_NUM_THREADS": "1", "RLKD_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode not in expected:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def curve(folder: Path) -> list[float]:
    """Validation cross entropy of every window, in nats a token."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(1 - row["accuracy"]) * math.log(VOCABULARY) for row in rows]


def weights_apart(first: Path, second: Path) -> float:
    """Largest difference of the weights that ship; inf where they are not of one shape."""
    a, b = (load_file(next((folder / "student" / "model").glob("*.safetensors"))) for folder in (first, second))
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return math.inf
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def equality(folder: Path) -> dict[str, Any]:
    """Run the three ways; returns curves and differences."""
    (folder / "stopped.py").write_text(STOPPED)
    call(folder, *TORCHRUN, "-m", "rlkd", "distil", *OPTIONS, "--out", "two")
    profile = ["--cost.profile", str(folder / "two" / "cost_profile.json")]
    call(folder, sys.executable, "-m", "rlkd", "distil", *OPTIONS, *profile, "--out", "one")
    stop = ["stopped.py", str(STOP_AFTER), "distil", *OPTIONS, *profile, "--out", "resumed"]
    call(folder, *TORCHRUN, *stop, expected=(1, 130))
    call(folder, *TORCHRUN, "-m", "rlkd", "distil", "--resume", "resumed")
    curves = {name: curve(folder / name) for name in ("one", "two", "resumed")}
    pairs = {"two-one": ("two", "one"), "resumed-two": ("resumed", "two")}
    return {
        "curves": curves,
        "largest_curve_difference": {
            key: max(abs(x - y) for x, y in zip(curves[a], curves[b], strict=True)) for key, (a, b) in pairs.items()
        },
        "largest_weight_difference": {key: weights_apart(folder / a, folder / b) for key, (a, b) in pairs.items()},
        "same_bytes": (folder / "resumed" / "metrics.jsonl").read_bytes()
        == (folder / "two" / "metrics.jsonl").read_bytes(),
    }


def timed_window(checkpointing: bool, out: Path) -> None:
    """Time steps of a window, in this process or with others of torchrun; the first process writes to `out`."""
    from rlkd.data import Task
    from rlkd.data.anchors import Anchors
    from rlkd.data.examples import TokenExamples, next_token_mask
    from rlkd.io import processes
    from rlkd.models.real.attachment import AttachConfig, make_plan
    from rlkd.models.real.instrumented import Instrumented
    from rlkd.students.real.causal import CausalStudent
    from rlkd.students.real.train_config import ModuleTrainConfig
    from rlkd.teachers.real.token_signals import token_signals

    torch.set_num_threads(1)
    processes.join("cpu")
    g, order = torch.Generator().manual_seed(0), torch.arange(64)
    ids = torch.randint(3, VOCABULARY, (64, 96), generator=g)
    splits: Any = {"train": order[:48], "validation": order[48:56], "test": order[56:]}
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    data = TokenExamples("toy", inputs, order * 0, VOCABULARY, splits, next_token_mask(mask))
    student, teacher = llama(6, 256, 0), llama(2, 32, 1)
    plan, theirs = (make_plan(m, data.batch(order[:2]), AttachConfig(exits=()), 96) for m in (student, teacher))
    with processes.first_alone():
        signals = token_signals(teacher, theirs, [], data, 8, Anchors(float(VOCABULARY), 1.0))
    config = ModuleTrainConfig(batch_size=16, learning_rate=1e-3, gradient_checkpointing=checkpointing)
    made = CausalStudent(Instrumented(student, plan, []), data, signals, config, 10)
    made.reset([Task(0, 0, 0.0, splits["train"], data.labels[:48], (0.6, 0.3, 0.1), 0.0)])
    weights, seconds = torch.tensor([0.5, 0.5, 0.0, 0.0]), []
    made.student.train()
    for _ in range(WINDOW):
        began = time.perf_counter()
        made._train_step(torch.randint(48, (16,), generator=g), weights, torch.tensor(2.0), 1.0)
        seconds.append(time.perf_counter() - began)
    if not processes.index():
        out.write_text(json.dumps(seconds[1:]))
    processes.leave()


def times(folder: Path) -> dict[str, Any]:
    """Median seconds of a step and their spread, in turns."""
    one, two = [sys.executable], TORCHRUN
    ways = {"one process": (one, "0"), "two processes": (two, "0"), "one process, gradient checkpointing": (one, "1")}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (start, checkpointing) in ways.items():
            call(
                folder,
                *start,
                str(Path(__file__).resolve()),
                "--time",
                checkpointing,
                "--out",
                str(folder / "times.json"),
            )
            found[name] += json.loads((folder / "times.json").read_text())
    return {
        name: {"median_s": statistics.median(values), "quartiles_s": statistics.quantiles(values, n=4)[::2]}
        for name, values in found.items()
    }


def page(equal: dict[str, Any], timed: dict[str, Any] | None, command: str, date: str) -> str:
    """The page of results."""
    lines = [
        "# Two processes against one",
        "",
        f"Command: `{command}`, {date}. `torchrun --nproc_per_node 2 -m rlkd distil` on the CPU (gloo), one thread a process: a student LLaMA of",
        f"two blocks learns from one of three, {NUM_WINDOWS} windows of 20 steps. *Resumed* was stopped after window {STOP_AFTER} and went on with",
        "`torchrun --nproc_per_node 2 -m rlkd distil --resume`, two processes again.",
        "",
        f"| validation cross entropy, nats | {' | '.join(f'window {i + 1}' for i in range(NUM_WINDOWS))} |",
        f"|{'---|' * (NUM_WINDOWS + 1)}",
        *(f"| {name} | {' | '.join(f'{v:.6f}' for v in values)} |" for name, values in equal["curves"].items()),
        "",
        "| | largest difference of the curves, nats | of the weights that ship |",
        "|---|---|---|",
    ]
    for key, label in {"two-one": "two processes and one", "resumed-two": "resumed and undisturbed"}.items():
        curve_apart, apart = equal["largest_curve_difference"][key], equal["largest_weight_difference"][key]
        lines.append(f"| {label} | {curve_apart:.1e} | {apart:.1e} |")
    lines += [
        "",
        f"`metrics.jsonl` of the resumed run has {'the same' if equal['same_bytes'] else 'other'} bytes as the undisturbed one's.",
    ]
    return (
        "\n".join([*lines, *(["", "Time per step was not measured."] if timed is None else _times_table(timed))]) + "\n"
    )


def _times_table(timed: dict[str, Any]) -> list[str]:
    """Lines on the time of a step."""
    lines = [
        "",
        f"Time of one step, a LLaMA of 6 blocks, width 256, batches of 16 texts of 96 tokens; {ROUNDS} rounds in turns of {WINDOW - 1} steps.",
        "",
        "| way | median | quartiles | of one process |",
        "|---|---|---|---|",
    ]
    first = timed["one process"]["median_s"]
    for name, row in timed.items():
        low, high = row["quartiles_s"]
        lines.append(
            f"| {name} | {row['median_s']:.3f} s | {low:.3f} to {high:.3f} s | {row['median_s'] / first:.2f} |"
        )
    return lines


def main() -> int:
    """Run all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--time", choices=("0", "1"), default=None, help="time one window here, with gradient checkpointing or not"
    )
    parser.add_argument(
        "--without_times", action="store_true", help="compare curves alone, as on a machine that is not idle"
    )
    parser.add_argument("--out", type=Path, default=None, help="path without .md and .json; of --time, the file")
    options = parser.parse_args()
    if options.time is not None:
        timed_window(options.time == "1", options.out)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(folder)
        equal, timed = equality(folder), None if options.without_times else times(folder)
    command, date = shlex.join(["python", *sys.argv]), time.strftime("%Y-%m-%d")
    text = page(equal, timed, command, date)
    print(text)
    if options.out is not None:
        write_whole(options.out.with_suffix(".md"), text)
        write_json(options.out.with_suffix(".json"), {"command": command, "date": date, **equal, "times": timed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
