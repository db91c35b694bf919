"""The page of the study of a language model with fewer blocks."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from brown_corpus import NUM_WORDS

from rlkd.envs.guard import UNTOUCHED

NUM_BOOTSTRAPS = 10_000
SHOWN = ("weight_hard_label", "weight_response", "weight_feature", "weight_attention", "temperature", "unit_keep")


def ratio_interval(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the ratio of perplexities, mean over paired seeds, and its 95 % interval over resampled test pieces."""
    counts = np.array(rows[0]["test_tokens"], dtype=np.float64)  # [P]
    differences = [np.subtract(a["test_nats"], b["test_nats"]) for a, b in zip(rows, others, strict=True)]
    difference = np.mean(differences, axis=0)  # [P]
    drawn = np.random.default_rng(0).integers(len(counts), size=(NUM_BOOTSTRAPS, len(counts)))
    ratios = np.exp(difference[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.exp(difference.sum() / counts.sum())), float(low), float(high)


def page(rows: dict[str, list[dict[str, Any]]], timed: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Results as Markdown.

    Args:
        rows: of the teacher and every method, one a seed; those that train nothing have one for all seeds.
        timed: latencies of each seed's networks.
        about: what all rows share.
    """
    study, teacher = about["study"], rows["teacher"][0]
    pieces = teacher["num_pieces"]
    won = all(
        ratio_interval(rows["policy"], _paired(rows, name))[2] < 1.0
        for name in rows
        if name not in ("teacher", "policy")
    )
    lines = [
        "# A language model with two thirds of its blocks",
        "",
        f"Command: `{about['command']}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__},",
        f"{about['processor']}.",
        "",
        f"Teacher: SmolLM2-135M-Instruct, rounded to 4 bits, {teacher['num_blocks']} blocks. Students have {study['layers']} blocks.",
        f"Text: the first {NUM_WORDS} words of documents of the Brown corpus, split by document, in pieces of at most {about['length']} tokens:",
        f"{pieces['train']} / {pieces['validation']} / {pieces['test']} pieces of train, validation and test, with {sum(teacher['test_tokens']):,} predicted tokens of test.",
        f"{study['num_windows']} windows of {study['steps_per_window']} steps of {study['batch_size']} pieces for every method that trains; number of seeds: {about['num_seeds']}.",
        f"Learning rate by validation perplexity after {about['rate_steps']} steps of plain distillation: "
        + ", ".join(f"{rate} gives {value:.1f}" for rate, value in about["rates"].items())
        + ".",
        f"The cut keeps blocks {about['blocks']}, numbered from 1.",
        "",
        "Bar: test perplexity of `policy` below that of every other student, with intervals below 1: "
        + ("reached." if won else "missed."),
        "",
        "| method | test perplexity | validation | times plain's (95 %) | parameters | latency, batch 1 | batch 8 | faster than teacher, batch 1 | batch 8 |",
        "|" + "---|" * 9,
        *(_line(name, rows, timed, about["batches"]) for name in rows),
        "",
        f"- Latency is processor time of one call, the median of {about['num_rounds']} rounds in which all networks take turns.",
        "- The interval of a ratio of perplexities is over resampled test pieces, paired; it says nothing about other seeds.",
        "- `policy` is asked to keep the teacher's perplexity and to be as fast as possible: while it is above, the guard keeps all of its units.",
        "",
        "## What fell short",
        "",
        *(
            ["- Fewer than three seeds: how much the figures differ between seeds is unknown."]
            if about["num_seeds"] < 3
            else []
        ),
        f"- {study['num_windows'] * study['steps_per_window']} steps of {study['batch_size']} short texts are few: the trainings end far above the teacher's perplexity.",
        "- The policy removes units of blocks; that it skips whole blocks (`--attach.units depth`) was not tried.",
        "",
        "## What the policy set",
        "",
    ]
    for row in rows["policy"]:
        ships = f"window {row['best_window']}" if row["best_window"] > UNTOUCHED else "the untouched student"
        lines += [f"`{row['method']}`, seed {row['seed']}, {ships} ships:", "", *_windows(row), ""]
    return "\n".join(lines)


def _paired(rows: dict[str, list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """Rows of a method, one for each seed of `plain`."""
    return rows[name] * (len(rows["plain"]) // len(rows[name]))


def _line(name: str, rows: dict[str, list[dict[str, Any]]], timed: list[dict[str, Any]], batches: Sequence[int]) -> str:
    some = rows[name]
    perplexities = [row["test_perplexity"] for row in some]
    ratio, low, high = ratio_interval(_paired(rows, name), rows["plain"])
    seconds, whole = (
        [[m[other][f"batch_{size}"]["processor_s"] for m in timed] for size in batches] for other in (name, "teacher")
    )
    spread = f" ({min(perplexities):.1f} to {max(perplexities):.1f})" if len(some) > 1 else ""
    cells = [
        name,
        f"{np.mean(perplexities):.1f}{spread}",
        f"{np.mean([row['validation_perplexity'] for row in some]):.1f}",
        "" if name == "plain" else f"{ratio:.3f} ({low:.3f} to {high:.3f})",
        f"{np.mean([row['parameters'] for row in some]) / 1e6:.1f} million",
        *(f"{1e3 * np.median(own):.0f} ms" for own in seconds),
        *(f"{np.median(np.divide(teacher, own)):.2f} x" for teacher, own in zip(whole, seconds, strict=True)),
    ]
    return f"| {' | '.join(cells)} |"


def _windows(row: dict[str, Any]) -> list[str]:
    lines = [
        "| window | hard label | response | feature | attention | T | units kept | step size | validation quality | floor |",
        "|" + "---|" * 10,
    ]
    for number, window in enumerate(row["windows"], start=1):
        cells = [str(number), *(f"{window[name]:.3f}" for name in SHOWN), f"{window['step_size']:.1e}"]
        lines.append(f"| {' | '.join(cells)} | {window['accuracy']:.4f} | {window['floor']:.4f} |")
    return lines
