"""Write docs/results/main.md from a run of `make train`, and from the benchmark beside it.

    rlkd bench --out BENCH
    python experiments/publish.py RUN BENCH

Copies result.json and the reward curves too. Nothing is typed by hand: run it again after another run.
"""

import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs" / "results"


def table(result: dict[str, Any]) -> str:
    """All goals and methods as one Markdown table."""
    lines = [
        "| goal | method | J (mean) | J (IQM, 95 %) | goals met within 1 point | accuracy | MACs kept | latency | energy "
        "| policy's lead in J (95 %) | wins |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["goals"]:
        for name, m in entry["methods"].items():
            low, high = m["score"]["ci95"]
            pair = entry["paired"].get(f"policy-{name}")
            lead, wins = "", ""
            if pair:
                lead = f"{pair['difference']:+.3f} ({pair['ci95'][0]:+.3f} to {pair['ci95'][1]:+.3f})"
                wins = f"{pair['probability_of_improvement']:.0%}"
            costs = " | ".join(f"{m[key]['mean']:.3f}" for key in ("macs_ratio", "latency_ratio", "energy_ratio"))
            met = "" if m["goal_met_within_1_point"] is None else f"{m['goal_met_within_1_point']:.0%}"
            shown = f"**{name}**" if name == "policy" else name
            lines.append(
                f"| {entry['name']} | {shown} | {m['score']['mean']:.3f} | {m['score']['iqm']:.3f} ({low:.3f} to {high:.3f}) "
                f"| {met} | {m['accuracy']['mean']:.3f} | {costs} | {lead} | {wins} |"
            )
    return "\n".join(lines)


def student_table(student: dict[str, Any]) -> str:
    """Measured latency of the compacted student beside the dense one."""
    measured = student["measured"]
    lines = ["| batch | compacted (IQR) | dense (IQR) | speed-up |", "|---|---|---|---|"]
    for key, row in measured.items():
        if isinstance(row, dict):
            us = [f"{row[name] * 1e6:.1f}" for name in ("latency_s", "spread_s", "dense_latency_s", "dense_spread_s")]
            lines.append(
                f"| {key.removeprefix('batch_')} | {us[0]} us ({us[1]}) | {us[2]} us ({us[3]}) | {row['speedup']:.2f} |"
            )
    return "\n".join(lines)


def bench_table(bench: dict[str, Any]) -> str:
    """Updates/s and ratios."""
    ratios = bench["ratio"]
    header = ["way", "updates/s", "lowest", "highest", *(f"{name} is" for name in ratios)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, row in bench["updates_per_s"].items():
        cells = [f"{r[name]:.1f} times that" if name in r else "" for r in ratios.values()]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{row[k]:,.0f}" for k in ("median", "low", "high"))
            + " | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def page(run: Path, bench: Path) -> str:
    """The whole of main.md."""
    result, rates = (json.loads(p.read_text()) for p in (run / "result.json", bench))
    profile = json.loads((run / "cost_profile.json").read_text())
    versions = json.loads((run / "versions.json").read_text())
    student, cost = result["student"], result["cost"]
    counted = ", ".join(
        f"{value:,} for {name.removesuffix('_trainings')}"
        for name, value in cost.items()
        if name.endswith("_trainings")
    )
    return f"""# The main job: one policy for many scenarios

Command: `make train` (which is `rlkd train --config default`), {time.strftime("%Y-%m-%d")}, two cores, one torch thread,
Python {platform.python_version()}, torch {versions["torch"]}. It took {cost["wall_s"]:.0f} s after the installation.
Student trainings: {counted}; {cost["updates_per_s"]:,.0f} student updates/s in all.
Machine-readable: [main.json](main.json). Seed 0, one policy; policies of other seeds were not averaged.

{result["num_tasks"]} held-out tasks, test data, every method one training a task on the same weights and batches. Costs are ratios to the dense
student. Latency is the cost profile's (measured on this machine, batch {profile["batch_size"]}, fit residual {profile["provenance"]["relative_residual"]:.1%}); energy is modelled.

{table(result)}

![Reward curves](reward_curves.png)

Stronger baselines, the policy's own ablations and data sets that it never saw: [goals.md](goals.md).

## The student that ships

`student/` of the same run: clean labels, the best teacher. Accuracy {student["accuracy"]:.3f} (teacher {student["teacher_accuracy"]:.3f})
with {student["macs_ratio"]:.3f} of the dense MACs; the compacted network's own answers score {student["compacted_accuracy"]:.3f}. Measured on one thread,
medians of interleaved rounds; the profile had predicted {student["measured"]["profile_latency_s"] * 1e6:.1f} us at batch {student["measured"]["profile_batch"]}.

{student_table(student)}

## Lock-step training

Command: `rlkd bench`. SubprocVecEnv's two processes have a core each, so the population is measured on one thread and on two.

{bench_table(rates)}

An environment step spends its time on: {", ".join(f"{name} {share:.0%}" for name, share in rates["step_share"].items())}.

## Where it falls short

- At batch 1 the student gains little: its latency is the cost of calling its layers.
- Exits that decide sample by sample do not pay at this size (docs/decisions/0001): shares of samples that leave at each exit of the
  student above: {", ".join(f"{rate:.2f}" for rate in student["exit_rates"])}.
"""


def main() -> int:
    """Write the page, the JSON and the figure."""
    if len(sys.argv) != 3:
        print("usage: python experiments/publish.py RUN BENCH", file=sys.stderr)
        return 2
    run, bench = map(Path, sys.argv[1:])
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "main.md").write_text(page(run, bench))
    shutil.copy(run / "result.json", DOCS / "main.json")
    shutil.copy(run / "reward_curves.png", DOCS / "reward_curves.png")
    print(table(json.loads((run / "result.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
