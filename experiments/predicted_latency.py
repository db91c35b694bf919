"""Does the cost profile of a real model predict how fast its shipped students are?

    python experiments/predicted_latency.py --docs docs/results/predicted_latency

For three families (a BERT, a vision transformer, a ResNet, each small, with random weights) the profile is measured as
before a distillation. Then students with random masks, other than those of the profile's grid, are cut and shipped: every
group keeps a random share of random units, some leave out tokens, some have an exit that all samples take or that some
take by a threshold. All students of a family are timed in turns, at batches of 1, 8 and 32, on one thread. Speed does not
depend on what weights were learned.

Two clocks: wall time, and the processor time of the thread, which other processes of a busy machine do not lengthen. The
profile counts processor time; on an idle machine both agree.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from study_results import write_results
from torch import Tensor, nn

from rlkd.compression.real.cut import ship
from rlkd.compression.selection import exits_taken
from rlkd.cost.profile import machine
from rlkd.cost.real import ModuleProfile
from rlkd.cost.real_timing import measure
from rlkd.cost.real_work import count_work
from rlkd.cost.timing import time_calls
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import Kind, new_model, transformers
from rlkd.models.real.shrink import kept_units
from rlkd.runs.folder import use_one_thread

BATCHES = (1, 8, 32)
NUM_STUDENTS = 10  # a family
LEAVES = ("never", "never", "some", "never", "always", "never", "some", "never")
LENGTH, IMAGE_SIZE, NUM_CLASSES = 32, 32, 10
MIN_CORRELATION, MAX_ERROR = 0.9, 0.15
NUM_RESAMPLES = 2000
MAX_SHARED = 1.2  # wall time over processor time, above which wall time tells of other work


def families() -> dict[str, tuple[Kind, Any]]:
    """Configurations by name."""
    t = transformers()
    size: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    size |= {"intermediate_size": 1024, "num_labels": NUM_CLASSES}
    resnet = t.ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 2, 2], layer_type="basic", num_labels=NUM_CLASSES
    )
    return {
        "bert": ("sequence_classification", t.BertConfig(vocab_size=2000, max_position_embeddings=64, **size)),
        "vit": ("image_classification", t.ViTConfig(image_size=IMAGE_SIZE, patch_size=4, **size)),
        "resnet": ("image_classification", resnet),
    }


def inputs_of(kind: Kind, num_samples: int) -> dict[str, Tensor]:
    """Random texts without padding, or images."""
    generator = torch.Generator().manual_seed(1)
    if kind == "image_classification":
        return {"pixel_values": torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    ids = torch.randint(5, 2000, (num_samples, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def drawn_masks(student: Instrumented, generator: torch.Generator) -> tuple[Tensor, ...]:
    """For every group a random share, from a tenth to all, of random units."""
    masks = []
    for group in student.plan.groups:
        count = max(1, round((0.1 + 0.9 * float(torch.rand((), generator=generator))) * group.size))
        masks.append((torch.randperm(group.size, generator=generator) < count).float())
    return tuple(masks)


@torch.no_grad()
def exit_rates(student: Instrumented, inputs: dict[str, Tensor], masks: Any, keep: float, threshold: float) -> Tensor:
    """Share of the samples that leave at every exit, [E]."""
    logits = torch.stack(student(inputs, masks, keep).logits)  # [E, B, C]
    confidence, answer = logits.softmax(-1).max(-1)
    limit = torch.tensor([threshold])
    return exits_taken(confidence[None], answer[None], limit, logits.shape[-1])[0].float().mean(-1)


@torch.no_grad()
def drawn_threshold(student: Instrumented, inputs: dict[str, Tensor], masks: Any, keep: float, share: float) -> float:
    """A threshold that this share of the samples pass at the first exit."""
    confidence = student(inputs, masks, keep).logits[0].softmax(-1).amax(-1)
    return float(confidence.quantile(1.0 - share))


def rows_of(name: str, kind: Kind, config: Any) -> tuple[list[dict[str, Any]], ModuleProfile, float]:
    """One row a student and batch size: predicted and measured seconds; the profile, and the seconds it took."""
    model: nn.Module = new_model(config, kind, seed=0)
    samples = inputs_of(kind, max(BATCHES))
    one = {key: values[:1] for key, values in samples.items()}
    plan = make_plan(model, {key: values[:4] for key, values in samples.items()}, AttachConfig(), None)
    work = count_work(model, one, plan)
    start = time.perf_counter()
    profile = measure(model, one, plan, kind, work=work, batch_size=8, sizes=BATCHES)
    profile_s = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    calls = []
    with Instrumented(model, plan, []).eval() as student:
        for head in student.heads:
            for parameter in head.parameters():
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        for number in range(NUM_STUDENTS):
            masks = drawn_masks(student, generator)
            keep = (1.0, 0.7, 0.4)[number % 3] if plan.select_after is not None else 1.0
            leaves, share = LEAVES[number % len(LEAVES)], float(torch.rand((), generator=generator))
            threshold = {"never": 1.0, "always": 0.0}.get(leaves)
            if threshold is None:
                threshold = drawn_threshold(student, samples, masks, keep, 0.2 + 0.6 * share)
            shipped = ship(student, kind, masks, keep, threshold)
            counts = [float(len(kept_units(g, mask))) for g, mask in zip(plan.groups, masks, strict=True)]
            kept = torch.tensor([keep * plan.num_positions, *counts]).double()
            for size in BATCHES:
                batch = {key: values[:size].contiguous() for key, values in samples.items()}
                rates = exit_rates(student, batch, masks, keep, threshold)
                predicted = profile.latency_s(kept, rates.double(), torch.tensor(threshold), size)
                rows.append(
                    {
                        "family": name,
                        "student": number,
                        "batch_size": size,
                        "parameters": sum(p.numel() for p in shipped.parameters()),
                        "kept_tokens": keep,
                        "leaves": leaves,
                        "exit_rates": rates.tolist(),
                        "predicted_s": predicted,
                    }
                )
                calls.append(partial(shipped, **batch))
    for row, latency in zip(rows, time_calls(calls), strict=True):
        row |= {"processor_s": latency.processor_s, "wall_s": latency.median_s, "spread_s": latency.spread_s}
        row["error"] = row["predicted_s"] / row["processor_s"] - 1
        row["wall_error"] = row["predicted_s"] / row["wall_s"] - 1
    return rows, profile, profile_s


def figures_of(rows: Sequence[dict[str, Any]], clock: str) -> dict[str, Any]:
    """Rank correlation and median error with 95 % intervals (bootstrap over students)."""
    predicted = np.array([row["predicted_s"] for row in rows])
    measured = np.array([row[clock] for row in rows])
    students = np.array([f"{row['family']} {row['student']}" for row in rows])
    names = np.unique(students)
    places = {name: np.flatnonzero(students == name) for name in names}
    draw = np.random.default_rng(0)

    def of(index: NDArray[np.int64]) -> tuple[float, float]:
        errors = np.abs(predicted[index] / measured[index] - 1)
        return float(spearmanr(predicted[index], measured[index]).statistic), float(np.median(errors))

    samples = np.array(
        [of(np.concatenate([places[n] for n in draw.choice(names, len(names))])) for _ in range(NUM_RESAMPLES)]
    )
    correlation, error = of(np.arange(len(rows)))
    low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    return {
        "num_students": len(names),
        "rank_correlation": correlation,
        "rank_correlation_ci95": [float(low[0]), float(high[0])],
        "median_error": error,
        "median_error_ci95": [float(low[1]), float(high[1])],
        "worst_error": float(np.abs(predicted / measured - 1).max()),
    }


def page_of(result: dict[str, Any], command: str) -> str:
    """The page of the study."""
    lines = [
        "# Does the cost profile predict how fast shipped students are?",
        "",
        f"Command: `{command}`, {result['date']}, one thread, torch {torch.__version__}, "
        f"{result['machine']['processor']}, {os.cpu_count()} cores, load {result['load_before']:.1f} before and "
        f"{result['load_after']:.1f} after.",
        "",
        f"{result['all']['num_students']} shipped students of three small families with random masks; none is in the grid "
        "that the profile was fitted to.",
        f"Bars: rank correlation at least {MIN_CORRELATION}, median error at most {MAX_ERROR:.0%}. In brackets 95 % "
        "intervals, bootstrap over students.",
        "*Processor* is the time of the thread, which other processes of a busy machine do not lengthen; the profile counts "
        "it, and the bars are read on it. *Wall* is the clock.",
        "",
        "| students | batch | rank correlation | median error | worst error | median error, wall | wall / processor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        c, w = row["processor"], row["wall"]
        lines.append(
            f"| {row['family']} | {row['batch_size']} | {c['rank_correlation']:.3f} "
            f"({c['rank_correlation_ci95'][0]:.3f} to {c['rank_correlation_ci95'][1]:.3f}) | {c['median_error']:.1%} "
            f"({c['median_error_ci95'][0]:.1%} to {c['median_error_ci95'][1]:.1%}) | {c['worst_error']:.0%} | "
            f"{w['median_error']:.1%} | {row['wall_over_processor']:.2f} |"
        )
    lines += ["", "| profile | seconds to measure | residual (RMS) | median error on its own grid | rounds |"]
    lines += ["|---|---|---|---|---|"]
    for name, p in result["profiles"].items():
        lines.append(
            f"| {name} | {p['seconds']:.0f} | {p['relative_residual']:.1%} | {p['median_error']:.1%} | {p['num_rounds']} |"
        )
    short = list(result["fell_short"])
    if result["table"][0]["wall_over_processor"] > MAX_SHARED:
        ratio = result["table"][0]["wall_over_processor"]
        short.append(
            f"other work ran on the machine, so wall time was {ratio:.0f} times processor time and tells of that work; "
            "on wall time the bars were not tested"
        )
    lines += ["", f"What fell short: {'; '.join(short) if short else 'nothing of the bars'}."]
    return "\n".join(lines) + "\n"


def study() -> dict[str, Any]:
    """Measure everything."""
    load_before = os.getloadavg()[0]
    rows, profiles = [], {}
    for name, (kind, config) in families().items():
        found, profile, seconds = rows_of(name, kind, config)
        rows += found
        keys = ("relative_residual", "median_error", "num_rounds", "batch_sizes", "grid")
        profiles[name] = {"seconds": seconds, **{key: profile.provenance[key] for key in keys}}
        print(name, json.dumps(figures_of(found, "processor_s")), flush=True)
    table = []
    for family in ("all", *profiles):
        for size in ("all", *BATCHES):
            some = [r for r in rows if family in ("all", r["family"]) and size in ("all", r["batch_size"])]
            ratio = float(np.median([r["wall_s"] / r["processor_s"] for r in some]))
            clocks = {clock: figures_of(some, f"{clock}_s") for clock in ("processor", "wall")}
            table.append({"family": family, "batch_size": size, **clocks, "wall_over_processor": ratio})
    short = []
    for row in table:
        f = row["processor"]
        where = f"{row['family']} at batch {row['batch_size']}"
        if f["rank_correlation"] < MIN_CORRELATION:
            short.append(f"{where}: rank correlation {f['rank_correlation']:.3f}")
        if f["median_error"] > MAX_ERROR:
            short.append(f"{where}: median error {f['median_error']:.1%}")
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "all": table[0]["processor"],
        "table": table,
        "fell_short": short,
        "profiles": profiles,
        "rows": rows,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=None, help="write the page to this path with .md and .json")
    options = parser.parse_args()
    use_one_thread()
    result = study()
    write_results(options.docs, page_of(result, shlex.join(["python", *sys.argv])), result)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"predicted_latency: {error}", file=sys.stderr)
        sys.exit(2)
