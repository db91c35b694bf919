"""Study: MiniLM on movie-review snippets, from the dense student to what ships, and its integers.

    python experiments/text_ships.py --work data --out runs/text_ships --docs docs/results/text_ships

For every seed, a student of two of the teacher's six blocks is distilled under the goal 0.98 of the dense student's accuracy,
where the dense student is trained in the same way and as long. Speeds of both come from that run, interleaved.
The student is exported to onnxruntime and quantised after the training and on the grid. Teacher and texts are those of
`real.py reviews`. A second call goes on where the first one stopped.
"""

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real import reviews
from ships import distilled, form_row, integer_lines, interval
from study_results import write_results

from rlkd.cli.verify import config_of_run
from rlkd.cost.timing import time_calls
from rlkd.export.flat import num_early_exits
from rlkd.export.onnx_file import compare, export_flat, runner_of, session_of
from rlkd.io.records import write_json
from rlkd.runs.export import NUM_TRACED
from rlkd.runs.export_int8 import aware_forms, int8_forms
from rlkd.runs.folder import use_one_thread
from rlkd.runs.shipped import open_shipped

NAME = "MiniLM, 2 blocks"
OPTIONS = ("--cut.layers", "2", "--cut.keep", "influence", "--train.steps_per_window", "20", "--train.batch_size", "32")
OPTIONS += ("--columns.max_length", "64")
BATCHES = (1, 32)
NUM_ROUNDS = 31
MOST_LOST = 1.0  # nothing is taken back here: what every form loses is reported
AWARE_STEPS = 100


def row_of(folder: Path) -> dict[str, Any]:
    """Report one run, and quantise and time its student."""
    result = json.loads((folder / "result.json").read_text())
    opened = open_shipped(folder, config_of_run, None)
    flat = export_flat(opened.student, opened.batch(opened.few("validation", NUM_TRACED)), opened.has_length)
    num_early = num_early_exits(opened.student)
    said: list[str] = []
    forms = int8_forms(opened, flat, num_early, MOST_LOST, said.append)
    forms += aware_forms(opened, flat, num_early, most_lost=MOST_LOST, num_steps=AWARE_STEPS, log=said.append)
    test = opened.splits["test"]
    parity = compare(runner_of(session_of(forms[0].graph)), [opened.student], opened.batch, test)
    latency_s = {}
    for size in BATCHES:
        given = {name: value.numpy() for name, value in opened.batch(test[:size]).items()}
        timed = time_calls([partial(session_of(f.graph).run, None, given) for f in forms], NUM_ROUNDS)
        latency_s[str(size)] = {f"onnx {f.name}": t.median_s for f, t in zip(forms, timed, strict=True)}
    figures = result["methods"]["policy"]
    return {
        "dense_accuracy": result["methods"]["dense"]["accuracy"],
        "teacher_accuracy": figures["teacher_accuracy"],
        "accuracy": figures["accuracy"],
        "macs_ratio": figures["macs_ratio"],
        "goal_met": result["goal_met"],
        "speedup": {str(size): result["measured"][f"batch_{size}"]["speedup"] for size in BATCHES},
        "speedup_over_teacher": {
            str(size): result["measured"][f"batch_{size}"]["speedup_over_teacher"] for size in BATCHES
        },
        "num_early_exits": num_early,
        "parity": parity.largest,
        "forms": {form.name: form_row(form, opened) for form in forms},
        "latency_s": latency_s,
        "said": said,
    }


def page(rows: list[dict[str, Any]], command: str) -> str:
    """Write the page."""
    share = [r["accuracy"] / r["dense_accuracy"] for r in rows]
    speeds = [
        interval([r[kind][str(b)] for r in rows]) for kind in ("speedup", "speedup_over_teacher") for b in BATCHES
    ]
    gaps = [
        100 * (r["forms"]["int8 aware dynamic"]["test_accuracy"] - r["forms"]["int8 dynamic"]["test_accuracy"])
        for r in rows
        if {"int8 aware dynamic", "int8 dynamic"} <= set(r["forms"])
    ]
    return "\n".join(
        [
            "# What ships of a text classifier",
            "",
            f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}; {len(rows)} seeds,",
            "means with 95 % t-intervals over seeds. Accuracies are on test data. Teacher: MiniLM of six blocks on movie-review",
            f"snippets, {rows[0]['teacher_accuracy']:.4f}. Students: `rlkd distil --goal.keep 0.98 --goal.reference dense {shlex.join(OPTIONS)}`.",
            "",
            "## Dense student against the shipped float student",
            "",
            "Bar: at least 2.3 times faster at batch 1 or 32 and at least 40 % fewer MACs at 98 % of the dense student's accuracy.",
            "",
            "| dense accuracy | share of it | MACs kept | faster than dense, batch 1 | batch 32 | than the teacher, batch 1 | "
            "batch 32 | goals met |",
            "|---|---|---|---|---|---|---|---|",
            f"| {interval([r['dense_accuracy'] for r in rows])} | {interval(share)} | "
            f"{interval([r['macs_ratio'] for r in rows])} | {' | '.join(speeds)} | "
            f"{sum(bool(r['goal_met']) for r in rows)} of {len(rows)} |",
            "",
            "## Float against integers, in onnxruntime",
            "",
            "Bar: weights at least 3.5 times smaller, at most 0.8 points lost. `aware`: the same form after "
            f"{AWARE_STEPS} more steps",
            "of distillation on the integer grid. Nothing is taken back here.",
            "",
            *integer_lines({NAME: rows}),
            "",
            f"- aware less dynamic after the training, points of test accuracy: {interval(gaps)}",
            f"- largest difference of a logit between onnxruntime and PyTorch, float32: {max(r['parity'] for r in rows):.1e}",
            "",
        ]
    )


def run_study(options: argparse.Namespace) -> None:
    """Do what is missing, and write the results."""
    use_one_thread()
    config = reviews(options.work)
    rows = []
    for seed in range(options.seeds):
        folder = options.out / f"seed-{seed}"
        distilled(folder, ["--teacher", config.teacher, "--data", config.data, *OPTIONS], seed)
        if not (folder / "ships.json").exists():
            write_json(folder / "ships.json", row_of(folder))
        rows.append(json.loads((folder / "ships.json").read_text()))
        print(f"seed {seed}: done", file=sys.stderr)
    command = shlex.join(["python", *sys.argv])
    write_results(options.docs, page(rows, command), {"command": command, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="data and teachers are kept here")
    parser.add_argument("--out", type=Path, required=True, help="runs; a second call goes on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=None, help="write a page and JSON to this path")
    run_study(parser.parse_args())
