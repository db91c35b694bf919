"""Study: from dense students to what ships, on digits, letter and Fashion-MNIST; write docs/results/ships.json and ships.md.

    RLKD_DATA=data python experiments/ships.py --out runs/ships

Every data set and seed: distil with `--goal.keep 0.98 --goal.reference dense`, export to ONNX, quantise after the training
and on the grid, compare with PyTorch, and time all forms against each other. The run goes on where it was stopped.
"""

import argparse
import functools
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from rlkd.cli.main import main
from rlkd.cli.verify import config_of_run
from rlkd.compression import CompactStudent, compact
from rlkd.configs import DistilConfig
from rlkd.cost import timing
from rlkd.cost.timing import time_calls
from rlkd.data import load_dataset
from rlkd.export import surgery
from rlkd.export.flat import num_early_exits
from rlkd.export.measure import count_macs, parameters_of
from rlkd.export.onnx_file import compare, export_flat, runner_of, session_of, torch_runner
from rlkd.io.records import write_json
from rlkd.models import StudentConfig, build_student, initialise
from rlkd.runs.export import NUM_TRACED
from rlkd.runs.export_int8 import Form, aware_forms, int8_forms, weight_bytes
from rlkd.runs.folder import use_one_thread
from rlkd.runs.shipped import CHAIN_INPUT, open_shipped

ROOT = Path(__file__).parent.parent
DATA = {  # folder's name: title and options
    "digits": ("digits, linear 48-48", ["--task.dataset", "digits"]),
    "letter": ("letter, linear 48-48", ["--task.dataset", "letter"]),
    "fashion": ("Fashion-MNIST, convolutional 8-16", ["--config", "conv", "--task.dataset", "fashion_mnist"]),
}
BATCHES = (1, 32)
NUM_ROUNDS = 101
MOST_LOST = 1.0  # nothing is taken back here: what every form loses is reported
AWARE_STEPS = 400
CALL_TIME_S = 2e-4  # of one round of one form: short, so that other work on the machine interrupts few rounds


def distilled(folder: Path, options: list[str], seed: int) -> None:
    """Distil the student of a seed, unless its run is finished."""
    if (folder / "result.json").exists():
        return
    goal = ["--goal.keep", "0.98", "--goal.reference", "dense"]
    resume = ["--resume", str(folder)] if (folder / "config.yaml").exists() else ["--out", str(folder), *goal, *options]
    code = main(["distil", *resume, *([] if resume[0] == "--resume" else ["--seed", str(seed)])])
    if code not in (0, 1):
        raise SystemExit(f"{folder}: rlkd distil ended with {code}")


@functools.cache
def dense_student(structure: StudentConfig, data: str) -> tuple[CompactStudent, Form]:
    """Build the dense student of a structure and its graph; random weights, for it is timed alone."""
    loaded = load_dataset(data)
    student = build_student(structure, loaded.input_shape, loaded.num_classes)
    initialise(student, torch.Generator().manual_seed(0))
    dense = compact(student, student.full_masks(), 1.0).eval()
    inputs = loaded.inputs[:NUM_TRACED].reshape(NUM_TRACED, *dense.input_shape)
    flat = export_flat(dense, {CHAIN_INPUT: inputs}, False)
    return dense, Form("dense", surgery.fold_exits(flat, 0), flat, 0.0)


def row_of(folder: Path) -> dict[str, Any]:
    """Measure one run: the dense and the shipped student in both runtimes, and the integer forms."""
    opened = open_shipped(folder, config_of_run, None)
    config = config_of_run(folder, DistilConfig)[0]
    result = json.loads((folder / "result.json").read_text())
    assert opened.data is not None
    dense, dense_form = dense_student(config.student, config.task.dataset)
    flat = export_flat(opened.student, opened.batch(opened.few("validation", NUM_TRACED)), False)
    num_early = num_early_exits(opened.student)
    said: list[str] = []
    forms = int8_forms(opened, flat, num_early, MOST_LOST, said.append)
    forms += aware_forms(opened, flat, num_early, most_lost=MOST_LOST, num_steps=AWARE_STEPS, log=said.append)
    test = opened.splits["test"]
    parity = compare(runner_of(session_of(forms[0].graph)), [opened.student], opened.batch, test)
    counted = [opened.batch(row[None]) for row in test[:64]]
    figures = result["methods"]["policy"]
    return {
        "dense_accuracy": result["methods"]["dense"]["accuracy"],
        "accuracy": figures["accuracy"],
        "macs_ratio": count_macs(torch_runner(opened.student), counted) / count_macs(torch_runner(dense), counted[:1]),
        "parameters_ratio": parameters_of(opened.student) / parameters_of(dense),
        "parameters": parameters_of(opened.student),
        "num_early_exits": num_early,
        "goal_met": result["goal_met"],
        "parity": parity.largest,
        "parity_on_edge": parity.num_on_edge,
        "forms": {form.name: form_row(form, opened) for form in forms},
        "latency_s": {str(size): latencies(opened, dense, dense_form, forms=forms, size=size) for size in BATCHES},
        "said": said,
    }


def form_row(form: Form, opened: Any) -> dict[str, Any]:
    """Report bytes, loss on validation and accuracy on test of one form."""
    return {
        "weight_bytes": weight_bytes(form.graph),
        "points_lost_on_validation": 100 * form.lost,
        "test_accuracy": opened.accuracy(runner_of(session_of(form.graph)), opened.splits["test"]),
    }


def latencies(opened: Any, dense: Any, dense_form: Form, *, forms: list[Form], size: int) -> dict[str, float]:
    """Time all forms against each other; seconds of a batch of real samples, medians."""
    test = opened.splits["test"]
    inputs = opened.batch(test[torch.arange(size) % len(test)])
    given = {name: value.numpy() for name, value in inputs.items()}
    calls = {
        "torch dense": partial(torch_runner(dense), inputs),
        "torch float32": partial(torch_runner(opened.student), inputs),
    }
    calls |= {f"onnx {f.name}": partial(session_of(f.graph).run, None, given) for f in (dense_form, *forms)}
    timed = time_calls(list(calls.values()), NUM_ROUNDS)
    return {name: latency.median_s for name, latency in zip(calls, timed, strict=True)}


NOTES = [  # written by hand after reading the tables; revise them when the study runs again
    "## What it says",
    "",
    "The linear students are so small that the fixed cost of a call hides most of what they save.",
    "",
    "Every integer form is slower than float32 in onnxruntime on networks of this size, on this processor (AVX-512 VNNI).",
    "Four-bit weights are stored in four bits and computed on as floats, so they save bytes alone.",
    "",
    "Larger dense students: [wide students](wide_students.md). MiniLM: [text classifier](text_ships.md). These students ship without an exit that decides.",
]


def interval(values: list[float]) -> str:
    """Return mean and 95 % t-interval over seeds."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def student_lines(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Table of dense against shipped float students."""
    lines = [
        "| data | share of the dense accuracy | MACs kept | faster, torch, batch 1 | batch 32 | onnxruntime, batch 1 | batch 32 | "
        "goals met | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        share = [r["accuracy"] / r["dense_accuracy"] for r in seeds]
        speeds = {
            (kind, size): [
                r["latency_s"][size][f"{kind} dense"] / r["latency_s"][size][f"{kind} float32"] for r in seeds
            ]
            for kind in ("torch", "onnx")
            for size in map(str, BATCHES)
        }
        best = max(float(np.mean(values)) for values in speeds.values())
        missed = [
            *(["accuracy below 98 %"] if np.mean(share) < 0.98 else []),
            *(["fewer than 40 % of the MACs saved"] if np.mean([r["macs_ratio"] for r in seeds]) > 0.6 else []),
            *([f"at most {best:.2f} times faster"] if best < 2.3 else []),
        ]
        cells = [interval(share), interval([r["macs_ratio"] for r in seeds]), *map(interval, speeds.values())]
        met = f"{sum(bool(r['goal_met']) for r in seeds)} of {len(seeds)}"
        lines.append(
            f"| {name} | {' | '.join(cells)} | {met} | {'missed: ' + '; '.join(missed) if missed else 'reached'} |"
        )
    return lines


def integer_lines(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Table of the integer forms against float32 in onnxruntime."""
    lines = [
        "| data | form | weights smaller by | points lost on test | faster at batch 1 | batch 32 | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        for form in [f for f in seeds[0]["forms"] if f != "float32"]:
            some = [r for r in seeds if form in r["forms"]]
            size = [r["forms"]["float32"]["weight_bytes"] / r["forms"][form]["weight_bytes"] for r in some]
            lost = [100 * (r["forms"]["float32"]["test_accuracy"] - r["forms"][form]["test_accuracy"]) for r in some]
            speeds = [
                interval([r["latency_s"][b]["onnx float32"] / r["latency_s"][b][f"onnx {form}"] for r in some])
                for b in map(str, BATCHES)
            ]
            missed = [
                *([f"{np.mean(size):.2f} times smaller"] if np.mean(size) < 3.5 else []),
                *([f"{np.mean(lost):.2f} points"] if np.mean(lost) > 0.8 else []),
            ]
            verdict = "missed: " + ", ".join(missed) if missed else "reached"
            lines.append(
                f"| {name} | {form} | {interval(size)} | {interval(lost)} | {' | '.join(speeds)} | {verdict} |"
            )
    return lines


def paired_lines(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines that pair the training on the grid with post-training static int8, seed by seed."""
    lines = []
    for name, seeds in rows.items():
        gaps = [
            100 * (r["forms"]["int8 aware"]["test_accuracy"] - r["forms"]["int8 static"]["test_accuracy"])
            for r in seeds
            if {"int8 aware", "int8 static"} <= set(r["forms"])
        ]
        lines.append(f"- {name}: aware less post-training static, points of test accuracy: {interval(gaps)}")
    return lines


def page(rows: dict[str, list[dict[str, Any]]], command: str, policy: str) -> str:
    """Write the page."""
    largest = max(r["parity"] for seeds in rows.values() for r in seeds)
    same = all(
        abs(r["forms"]["float32"]["test_accuracy"] - r["accuracy"]) < 1e-6 for seeds in rows.values() for r in seeds
    )
    num_seeds = len(next(iter(rows.values())))
    return "\n".join(
        [
            "# What ships: small, exported, in integers",
            "",
            f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}; {num_seeds} seeds a data",
            f"set, means with 95 % t-intervals over seeds. All forms of a seed are timed in turns ({NUM_ROUNDS} rounds, medians); the machine",
            "had other work, so only ratios count. Accuracies are on test data.",
            f"Students: `rlkd distil --goal.keep 0.98 --goal.reference dense`, policy {policy[:12]}.",
            "",
            "## Dense student against the shipped float student",
            "",
            "Bar: at least 2.3 times faster at batch 1 or 32 and at least 40 % fewer MACs at 98 % of the dense student's accuracy.",
            "",
            *student_lines(rows),
            "",
            "## Float against integers, in onnxruntime",
            "",
            "Bar: weights at least 3.5 times smaller, at most 0.8 points lost. `dynamic` and `static`: after the training.",
            f"`aware`: {AWARE_STEPS} steps of distillation on the integer grid, which the others do not have: part of its lead is more",
            "training. Nothing is taken back here.",
            "",
            *integer_lines(rows),
            "",
            *paired_lines(rows),
            "",
            "## Parity",
            "",
            f"Largest difference of a logit between onnxruntime and PyTorch over all runs, at batch 1 and 17: {largest:.2e} (bar: 1e-4).",
            f"The exported float students are as accurate on test as reported: {'yes, all' if same else 'NO'}.",
            "",
            *NOTES,
            "",
        ]
    )


def run_study(out: Path, num_seeds: int, docs: Path) -> None:
    """Do what is missing, and write the results."""
    use_one_thread()
    timing.CALL_TIME_S = CALL_TIME_S
    rows: dict[str, list[dict[str, Any]]] = {}
    folders = []
    for seed in range(num_seeds):
        for key, (name, options) in DATA.items():
            folder = out / f"{key}-{seed}"
            distilled(folder, options, seed)
            folders.append(folder)
            if not (folder / "ships.json").exists():
                write_json(folder / "ships.json", row_of(folder))
            rows.setdefault(name, []).append(json.loads((folder / "ships.json").read_text()))
            print(f"{name}, seed {seed}: done", file=sys.stderr)
    command = f"python experiments/ships.py --out runs/ships --seeds {num_seeds}"
    (policy,) = {json.loads((path / "student" / "student.json").read_text())["policy_sha256"] for path in folders}
    write_json(
        docs / "ships.json",
        {"command": command, "policy_sha256": policy, "date": time.strftime("%Y-%m-%d"), "rows": rows},
    )
    (docs / "ships.md").write_text(page(rows, command, policy))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    run_study(options.out, options.seeds, options.docs)
