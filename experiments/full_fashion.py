"""Study: a convolutional student on all of Fashion-MNIST, dense, then pruned under a limit on MACs.

    RLKD_DATA=data python experiments/full_fashion.py --out runs/full_fashion --docs docs/results/full_fashion

The dense student has three 3x3 convolutions and fewer than 100,000 parameters. It learns from labels: 55,000 of the 60,000
official training images, shifted and mirrored at random. `rlkd.distil` then prunes a copy of it to at most 38 % of its
MACs, with the dense student as teacher and the policy that comes with rlkd. 5,000 training images validate, the 10,000
official test images are read once a student. A second call goes on where the first one stopped.
"""

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ships import interval
from study_results import write_results
from torch import Tensor, nn

import rlkd
from rlkd.cost.timing import time_calls
from rlkd.data.files import FASHION_FOLDER, find_file, read_idx
from rlkd.export.measure import count_macs, parameters_of
from rlkd.io.records import write_json
from rlkd.runs.folder import use_one_thread
from rlkd.students.optimizers import new_optimizer, schedule

NUM_VALIDATION = 5000
BATCH_SIZE, NUM_EPOCHS = 128, 15
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 0.01
SHIFT = 2  # pixels that a training image is moved by at most, in both directions
MACS_LIMIT = 0.38
DISTIL = {
    "num_windows": 12,
    "train.steps_per_window": 200,
    "train.batch_size": 128,
    "train.evaluation_batch_size": 500,
    "train.validation_size": 2000,
    "attach.exits": (),
    "cost.batch_size": 32,
}
BATCHES = (1, 32)
NUM_ROUNDS = 51

Data = dict[str, tuple[Tensor, Tensor]]


class Conv(nn.Module):
    """Three convolutions with batch normalisation, two halvings, and a linear head: 87,274 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[k], widths[k + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(widths[k + 1]),
                nn.ReLU(),
                nn.MaxPool2d(2) if k < 2 else nn.Identity(),
            )
            for k in range(3)
        )
        self.head = nn.Linear(64 * 49, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 10] of images [B, 1, 28, 28] in [0, 1]."""
        for stage in self.stages:
            images = stage(images)
        logits: Tensor = self.head(images.flatten(1))
        return logits


def load_data() -> Data:
    """Return images [S, 1, 28, 28] and labels [S] of train, validation and test."""
    parts = {}
    for name in ("train", "t10k"):
        paths = [
            find_file(f"{name}-{what}-ubyte.gz", "fashion-mnist", FASHION_FOLDER, "dataset-fashion-mnist")
            for what in ("images-idx3", "labels-idx1")
        ]
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        parts[name] = torch.from_numpy(images.copy())[:, None].float() / 255.0, torch.from_numpy(labels.copy()).long()
    images, labels = parts["train"]
    cut = len(labels) - NUM_VALIDATION
    return {
        "train": (images[:cut], labels[:cut]),
        "validation": (images[cut:], labels[cut:]),
        "test": parts["t10k"],
    }


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images [B, 1, 28, 28] and move each by up to SHIFT pixels."""
    count = len(images)
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (SHIFT,) * 4)
    moves = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)  # rows, then columns
    size = torch.arange(images.shape[-1])
    rows, columns = moves[0, :, None] + size, moves[1, :, None] + size  # [B, 28] each
    return padded[torch.arange(count)[:, None, None, None], 0, rows[:, None, :, None], columns[:, None, None, :]]


@torch.inference_mode()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of right answers."""
    answers = torch.cat([model(images=some).argmax(-1) for some in torch.split(data[0], 500)])
    return float((answers == data[1]).double().mean())


def trained_dense(data: Data, folder: Path, seed: int) -> Conv:
    """Train the dense student of a seed, or read it; the state of every epoch is kept until the training ends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # modules draw their first weights from the global generator
        model = Conv()
    done, state = folder / "dense.pt", folder / "dense_state.pt"
    if done.exists():
        model.load_state_dict(torch.load(done, weights_only=True))
        return model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    model.to(memory_format=torch.channels_last)
    optimizer = new_optimizer(model, "adamw", LEARNING_RATE, WEIGHT_DECAY)
    images, labels = data["train"]
    per_epoch = len(labels) // BATCH_SIZE
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["epoch"]
    for epoch in range(first, NUM_EPOCHS):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(labels), generator=generator)[: per_epoch * BATCH_SIZE]
        model.train()
        for step, rows in enumerate(order.split(BATCH_SIZE), start=epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step, NUM_EPOCHS * per_epoch, 0.1, 0.0)
            batch = augment(images[rows], generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, state)
        print(f"seed {seed}, epoch {epoch + 1}: {accuracy(model, data['validation']):.4f} on validation", flush=True)
    torch.save(model.to(memory_format=torch.contiguous_format).state_dict(), done)
    state.unlink()
    return model.eval()


def row_of(data: Data, folder: Path, seed: int) -> dict[str, Any]:
    """Train and prune the student of a seed; returns what was measured."""
    dense = trained_dense(data, folder, seed)
    result = rlkd.distil(
        dense, None, data, goal=rlkd.Goal(macs=MACS_LIMIT), seed=seed, out=folder / "distil", options=DISTIL
    )
    shipped = result.student
    few = data["test"][0][:32]
    macs = [count_macs(model, [{"images": few[:1]}]) for model in (run(dense), run(shipped))]
    calls = {
        (name, size): partial(model, images=few[:size])
        for size in BATCHES
        for name, model in (("dense", dense), ("shipped", shipped))
    }
    timed = dict(zip(calls, time_calls(list(calls.values()), NUM_ROUNDS), strict=True))
    return {
        "dense_accuracy": accuracy(dense, data["test"]),
        "dense_parameters": parameters_of(dense),
        "accuracy": accuracy(shipped, data["test"]),
        "reported_accuracy": result.metrics["accuracy"],
        "parameters": parameters_of(shipped),
        "macs": macs[1],
        "macs_ratio": macs[1] / macs[0],
        "reported_macs_ratio": result.metrics["macs_ratio"],
        "speedup": {
            str(size): timed["dense", size].processor_s / timed["shipped", size].processor_s for size in BATCHES
        },
    }


def run(model: nn.Module) -> Any:
    """Return a call that takes inputs by name."""
    return lambda inputs: model(**inputs)


def page(rows: list[dict[str, Any]], command: str) -> str:
    """Write the page."""
    lost = [100 * (row["dense_accuracy"] - row["accuracy"]) for row in rows]
    dense, saved = [row["dense_accuracy"] for row in rows], [1 - row["macs_ratio"] for row in rows]
    reached = np.mean(dense) >= 0.925 and np.mean(saved) >= 0.62 and np.mean(lost) <= 1.8
    lines = [
        "# A convolutional student on all of Fashion-MNIST",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}; {len(rows)} seeds, in brackets",
        "95 % t-intervals over seeds. 55,000 training images, 5,000 of validation, the 10,000 official test images.",
        f"The dense student has {rows[0]['dense_parameters']:,} parameters and learns from labels for {NUM_EPOCHS} epochs. `rlkd.distil` prunes a copy",
        f"of it with `Goal(macs={MACS_LIMIT})`, {DISTIL['num_windows']} windows of {DISTIL['train.steps_per_window']} steps of {DISTIL['train.batch_size']}, the dense student as teacher.",
        "",
        "Bar: at least 0.925 dense, at least 62 % fewer MACs, at most 1.8 points lost: "
        + ("reached" if reached else "missed")
        + ".",
        "",
        "| | figure |",
        "|---|---|",
        f"| test accuracy, dense | {interval(dense)} |",
        f"| test accuracy, shipped | {interval([row['accuracy'] for row in rows])} |",
        f"| points lost | {interval(lost)} |",
        f"| MACs saved | {interval(saved)} |",
        f"| parameters, shipped | {interval([row['parameters'] for row in rows])} |",
        *(
            f"| times faster in torch, batch {size} (processor time) | {interval([row['speedup'][str(size)] for row in rows])} |"
            for size in BATCHES
        ),
        "",
        "| seed | dense | shipped | points lost | MACs kept |",
        "|---|---|---|---|---|",
        *(
            f"| {seed} | {row['dense_accuracy']:.4f} | {row['accuracy']:.4f} | {100 * (row['dense_accuracy'] - row['accuracy']):.2f} | {row['macs_ratio']:.3f} |"
            for seed, row in enumerate(rows)
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Do what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--docs", type=Path, default=None)
    options = parser.parse_args()
    use_one_thread()
    data, rows = load_data(), []
    for seed in range(options.seeds):
        file = options.out / f"{seed}" / "row.json"
        if not file.exists():
            write_json(file, row_of(data, file.parent, seed))
        rows.append(json.loads(file.read_text()))
        print(f"seed {seed}: {rows[-1]}", flush=True)
    command = shlex.join(["python", *sys.argv])
    write_results(options.docs, page(rows, command), {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
