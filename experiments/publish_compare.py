"""Write docs/results/compare.md and its figures from a training run and the comparisons made with its policy.

    rlkd train --config default --out RUN
    rlkd compare configs/compare/*.yaml --policy RUN/policy --seed 4000 --out COMPARED
    python experiments/publish_compare.py RUN COMPARED

Nothing is typed by hand; bars that are missed say so.
"""

import csv
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import trim_mean

from rlkd.data import TaskDistribution, draw_task, load_dataset

DOCS = Path(__file__).parent.parent / "docs" / "results"
NUM_RESAMPLES = 5000
TRANSFERS = {
    "fashion_mnist_8x8": ("Fashion-MNIST 8x8", 1.0),
    "letter": ("LetterRecognition", 1.0),
    "satellite": ("Satellite", 1.0),
    "conv": ("digits, convolutional student", 0.8),
}
LEADS = ("dynamic", "in_family")  # comparisons in the figure
FURTHER = (
    "Further tasks (seed 5000, `--methods policy,tpe_100 --comparison.num_tasks 128`, one run a weight) were drawn once the first comparison had been seen, because its intervals were wider than",
    "its leads. They stand for themselves and are not pooled with it.",
)
SCHEDULES = (
    *("published", "annealed", "alpha_weighted", "temperature_decay", "temperature_stages", "fewer_features"),
    *("alpha_by_confidence", "curriculum", "linear", "cosine", "ctkd", "hypergradient", "pbt"),
)


def lead(entry: dict[str, Any], baseline: str) -> str:
    """The policy's lead over a baseline with its interval."""
    row = entry["paired"][f"policy-{baseline}"]
    return f"{row['difference']:+.4f} ({row['ci95'][0]:+.4f} to {row['ci95'][1]:+.4f})"


def above(entry: dict[str, Any], baseline: str) -> bool:
    """Whether the interval of the lead lies above 0."""
    return bool(entry["paired"][f"policy-{baseline}"]["ci95"][0] > 0)


def table(result: dict[str, Any]) -> str:
    """All preferences and methods as one Markdown table."""
    lines = [
        "| accuracy weight | method | trainings a task | J mean | J IQM (95 %) | accuracy | MACs kept | latency | policy's lead in J (95 %) | wins |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for weight, entry in result["preferences"].items():
        for name, m in entry["methods"].items():
            low, high = m["score"]["ci95"]
            pair = entry["paired"].get(f"policy-{name}")
            gap = lead(entry, name) if pair else ""
            wins = f"{pair['probability_of_improvement']:.0%}" if pair else ""
            shown = f"**{name}**" if name == "policy" else name
            lines.append(
                f"| {weight} | {shown} | {m['trainings_per_task']:.0f} | {m['score']['mean']:.4f} | {m['score']['iqm']:.4f} ({low:.4f} to {high:.4f}) "
                f"| {m['accuracy']['mean']:.3f} | {m['macs_ratio']['mean']:.3f} | {m['latency_ratio']['mean']:.3f} | {gap} | {wins} |"
            )
    return "\n".join(lines)


def scores(folder: Path, weight: str, method: str) -> NDArray[np.float64]:
    """[M] scores of a method under one accuracy weight, from result.csv."""
    with (folder / "result.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["accuracy_weight"] == weight and r["method"] == method]
    return np.array([float(r["score"]) for r in rows])


def share_of_search(folder: Path, weight: str) -> tuple[float, float, float]:
    """(policy - static) / (TPE-50 - static), ratio of mean differences, with its bootstrap interval over tasks."""
    policy, static, search = (scores(folder, weight, name) for name in ("policy", "static", "tpe_50"))
    generator = np.random.default_rng(0)
    index = generator.integers(len(policy), size=(NUM_RESAMPLES, len(policy)))
    ratio = (policy - static)[index].mean(1) / (search - static)[index].mean(1)
    low, high = np.quantile(ratio, [0.025, 0.975])
    return float((policy - static).mean() / (search - static).mean()), float(low), float(high)


def bars(run: dict[str, Any], found: dict[str, dict[str, Any]], folder: Path) -> str:
    """One line a bar: what it asks, what was measured, whether it is met."""
    lines = ["| bar | measured | met |", "|---|---|---|"]

    def add(bar: str, measured: str, met: bool) -> None:
        lines.append(f"| {bar} | {measured} | {'yes' if met else '**no**'} |")

    for weight, entry in found.get("in_family", {}).get("preferences", {}).items():
        for baseline in ("tpe_100", "tpe_linear_50"):
            add(f"above {baseline} at accuracy weight {weight}", lead(entry, baseline), above(entry, baseline))
    for name in (name for name in found if name.startswith("further")):
        for weight, entry in found[name]["preferences"].items():
            bar = f"above tpe_100 at accuracy weight {weight}, {found[name]['num_tasks']} further tasks"
            add(bar, lead(entry, "tpe_100"), above(entry, "tpe_100"))
    for weight, entry in found.get("dynamic", {}).get("preferences", {}).items():
        beaten = [r for r in SCHEDULES if above(entry, r)]
        missed = [f"{r} {lead(entry, r)}" for r in SCHEDULES if r not in beaten]
        closest = min(SCHEDULES, key=lambda r: entry["paired"][f"policy-{r}"]["difference"])
        text = f"{len(beaten)} of {len(SCHEDULES)}; closest: {closest} {lead(entry, closest)}"
        add(
            f"above every schedule, ctkd, hypergradient, pbt at {weight}",
            text + ("; not above: " + ", ".join(missed) if missed else ""),
            not missed,
        )
        for baseline in ("open_loop", "mean_action"):
            add(f"above own {baseline} at {weight}", lead(entry, baseline), above(entry, baseline))
    for name, (title, bar) in TRANSFERS.items():
        for weight in found.get(name, {}).get("preferences", {}):
            value, low, high = share_of_search(folder / name, weight)
            add(
                f"{title}: (policy - static) / (TPE-50 - static) >= {bar:g} at {weight}",
                f"{value:.2f} ({low:.2f} to {high:.2f})",
                value >= bar,
            )
    front = found.get("front", {}).get("front")
    if front:
        baseline = next(name for name in front["methods"] if name.startswith("search"))
        spent = front["methods"][baseline]["trainings_per_task"]
        add(
            f"hypervolume of 9 preferences at least that of a multi-objective search with {spent} trainings a task",
            lead(front, baseline),
            front["paired"][f"policy-{baseline}"]["difference"] >= 0,
        )
    cost = run["cost"]
    parts = {name: cost[f"{name}_trainings"] for name in ("search", "planning", "agent", "gate")}
    spent = sum(parts.values())
    add(
        "policy from at most 20,000 trainings",
        f"{spent:,} (static search {parts['search']:,}, plan {parts['planning']:,}, PPO {parts['agent']:,}, its test {parts['gate']:,})",
        spent <= 20_000,
    )
    add(
        "policy in at most 20 minutes on 2 cores",
        f"{cost['wall_s'] / 60:.1f} min with the comparison that ends the run, one thread",
        cost["wall_s"] <= 1200,
    )
    lines += [
        "",
        f"Break-even against TPE-25: the policy's {spent:,} trainings are earned back after {spent / 24:.0f} students (1 training each instead of 25).",
    ]
    return "\n".join(lines)


def by_teacher(folder: Path) -> str:
    """Mean lead over TPE-100 by the task's teacher, and the interquartile mean of the paired leads."""
    with (folder / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data, groups = load_dataset("digits"), {"poorest": (0, 1), "next two": (1, 3), "other five": (3, 8)}
    lines = [
        "| accuracy weight | all tasks, mean | all tasks, IQM (95 %) | " + " | ".join(groups) + " |",
        "|---|---|---|" + "---|" * len(groups),
    ]
    for weight in dict.fromkeys(row["accuracy_weight"] for row in rows):
        found = {
            method: {
                int(r["task_seed"]): float(r["score"])
                for r in rows
                if (r["accuracy_weight"], r["method"]) == (weight, method)
            }
            for method in ("policy", "tpe_100")
        }
        seeds = list(found["policy"])
        teacher = np.array([draw_task(s, TaskDistribution(), data, 8).teacher for s in seeds])
        gap = np.array([found["policy"][s] - found["tpe_100"][s] for s in seeds])
        cells = [
            f"{gap[(teacher >= low) & (teacher < high)].mean():+.3f} ({int(((teacher >= low) & (teacher < high)).sum())} tasks)"
            for low, high in groups.values()
        ]
        drawn = gap[np.random.default_rng(0).integers(len(gap), size=(NUM_RESAMPLES, len(gap)))]  # [R, M]
        low, high = np.quantile(trim_mean(drawn, 0.25, axis=1), [0.025, 0.975])
        middle = f"{trim_mean(gap, 0.25):+.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(f"| {weight} | {gap.mean():+.4f} | {middle} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def forest(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Leads over every baseline with their intervals, one panel a preference."""
    weights = list(dict.fromkeys(w for name in LEADS if name in found for w in found[name]["preferences"]))
    rows: dict[str, dict[str, dict[str, Any]]] = {weight: {} for weight in weights}  # by preference, by baseline
    for name in LEADS:
        for weight, entry in found.get(name, {}).get("preferences", {}).items():
            rows[weight] |= {baseline.removeprefix("policy-"): row for baseline, row in entry["paired"].items()}
    names = list(
        dict.fromkeys(baseline for panel in rows.values() for baseline in panel)
    )  # a line is one baseline in all panels
    figure = Figure(figsize=(4.2 * len(weights), 1.5 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    for ax, (weight, panel) in zip(axes, rows.items(), strict=True):
        for baseline, row in panel.items():
            (low, high), y = row["ci95"], names.index(baseline)
            colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
            ax.plot([low, high], [y, y], color=colour, lw=2)
            ax.plot([row["difference"]], [y], "o", color=colour, ms=4)
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(names)), names)
        ax.set_xscale("symlog", linthresh=0.02)
        ax.set_xticks([-0.05, -0.02, 0, 0.02, 0.05, 0.2], ["-0.05", "-0.02", "0", "0.02", "0.05", "0.2"], fontsize=8)
        ax.set_xlim(-0.06, 0.6)
        ax.set_title(f"accuracy weight {weight}", fontsize=10)
        ax.set_xlabel("policy's lead in J, 95 %")
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def plane(front: dict[str, Any], path: Path) -> None:
    """Mean accuracy and cost of the policy and of the static settings, by preference."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, m in front["methods"].items():
        if m["front"]:
            points = sorted((p["cost"], p["accuracy"]) for p in m["front"])
            ax.plot(*zip(*points, strict=True), "o-", label=f"{name}: hypervolume {m['hypervolume']['mean']:.4f}")
        else:
            ax.plot([], [], " ", label=f"{name}: hypervolume {m['hypervolume']['mean']:.4f}")
    ax.set_xlabel("cost: 0.75 latency + 0.25 energy, ratios to the dense student")
    ax.set_ylabel("test accuracy")
    ax.set_title("nine preferences, means over held-out tasks", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)


def page(run: dict[str, Any], found: dict[str, dict[str, Any]], folder: Path) -> str:
    """The whole of compare.md."""
    parts = [
        "# Against its baselines",
        "",
        f"Commands: `rlkd train --config default --out RUN`, `rlkd compare configs/compare/*.yaml --policy RUN/policy --seed 4000 --out COMPARED`, "
        f"`python experiments/publish_compare.py RUN COMPARED`, {time.strftime('%Y-%m-%d')}, two cores, one torch thread a process. One policy, of seed 0, learned on digits and seven generated sets, MLPs alone (configs/default.yaml).",
        "Every task has a seed of its own (teacher, corrupted labels, initial weights, batches), the same for all methods. Test data; searches select on",
        "validation. Intervals: percentile bootstrap over tasks, paired. The agent's settings (features, phases, training data) were chosen on the tasks of seed 3000: test figures of digits, Fashion-MNIST 8x8, letter and the convolutional student. Satellite was not looked at.",
        *(FURTHER if any(name.startswith("further") for name in found) else ()),
        "",
        bars(run, found, folder),
        "",
        "![Leads](compare_leads.png)",
        "",
    ]
    titles = {
        "in_family": "Searches that train every task many times",
        **{name: "The hardest of them on further tasks" for name in found if name.startswith("further")},
        "dynamic": "Schedules, gradient followers, population-based training, the policy blind or maimed",
        "multi_teacher": "Several teachers a task: MTKD-RL's weights, sample by sample",
        "tuned_exit": "The same with every method's exit tuned on validation afterwards",
        **{name: f"Never seen: {title}" for name, (title, _) in TRANSFERS.items()},
    }
    for name, title in titles.items():
        if name in found:
            result = found[name]
            parts += [
                f"## {title}",
                "",
                f"{result['num_tasks'] * result['num_seeds']} tasks, accuracy weights {', '.join(result['preferences'])}. Machine-readable: [compare/{name}.json](compare/{name}.json).",
                "",
                table(result),
                "",
            ]
    if "in_family" in found:
        parts += [
            "## Its lead over TPE-100",
            "",
            "By the quality of the task's teacher (default teachers saw 24 to 897 samples):",
            "",
            by_teacher(folder / "in_family"),
            "",
        ]
    front = found.get("front", {}).get("front")
    if front:
        parts += [
            "## The accuracy-cost plane",
            "",
            "![Fronts](compare_front.png)",
            "",
            "| front | trainings a task | hypervolume mean | IQM (95 %) | policy's lead (95 %) |",
            "|---|---|---|---|---|",
        ]
        for name, m in front["methods"].items():
            area = m["hypervolume"]
            gap = lead(front, name) if f"policy-{name}" in front["paired"] else ""
            parts.append(
                f"| {name} | {m['trainings_per_task']} | {area['mean']:.4f} | {area['iqm']:.4f} ({area['ci95'][0]:.4f} to {area['ci95'][1]:.4f}) | {gap} |"
            )
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the page, copies of the results, and the figures."""
    if len(sys.argv) != 3:
        print("usage: python experiments/publish_compare.py RUN COMPARED", file=sys.stderr)
        return 2
    run = json.loads((Path(sys.argv[1]) / "result.json").read_text())
    folder = Path(sys.argv[2])
    found = {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/result.json"))}
    (DOCS / "compare").mkdir(parents=True, exist_ok=True)
    for stale in (*(DOCS / "compare").glob("*.json"), *DOCS.glob("compare_*.png")):
        stale.unlink()  # of an earlier policy
    for name in found:
        shutil.copy(folder / name / "result.json", DOCS / "compare" / f"{name}.json")
    if any(name in found for name in LEADS):
        forest(found, DOCS / "compare_leads.png")
    if "front" in found:
        plane(found["front"]["front"], DOCS / "compare_front.png")
    (DOCS / "compare.md").write_text(page(run, found, folder))
    print(bars(run, found, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
