"""Write docs/results/goals.md, its figures and docs/results/goals/SET.json from the run folders of `rlkd compare`.

    rlkd compare configs/compare/*.yaml --policy RUN/policy --seed 4000 --out COMPARED
    python experiments/publish_goals.py COMPARED

Baselines of another run are added to COMPARED/SET by `merge_goals.py`. Every number comes from a result.json (schema 2); a bar that is missed says so. Folders SET.more, SET.2, ... hold further
floors of SET. docs/results/goals/about.txt says how the runs were made; it is copied into the page.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rlkd.agents.baselines.methods import METHODS
from rlkd.io.records import write_json

DOCS = Path(__file__).parent.parent / "docs" / "results"
MET = {"in_family": 0.95}  # least share of feasible tasks whose goal is met within 1 point; elsewhere MET_ELSEWHERE
MET_ELSEWHERE = 0.90
ALL_LED = "the 95 % interval of the lead is above 0 for every baseline"
SHOWN = ("dense", "nncf", "cubic", "one_shot", "constant", "tpe_25", "tpe_50", "tpe_100", "blind", "open_loop")


def read_sets(compared: Path) -> dict[str, dict[str, Any]]:
    """Return results by the name of their set; only those with a floor.

    Raises:
        SystemExit: there is none.
    """
    sets: dict[str, dict[str, Any]] = {}
    for path in sorted(compared.glob("*/result.json")):
        result, name = json.loads(path.read_text()), path.parent.name.partition(".")[0]
        if result.get("schema") != 2 or not floors(result):
            continue
        if name in sets:
            sets[name]["goals"] += result["goals"]
        else:
            sets[name] = result
    if not sets:
        raise SystemExit(f"{compared}: no folder in it has a result.json of schema 2 with a goal that keeps accuracy")
    return sets


def floors(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of `goals` that have an accuracy floor."""
    return [entry for entry in result.get("goals", []) if "keep" in entry["goal"]]


def lead(entry: dict[str, Any], name: str) -> tuple[float, float, float] | None:
    """The policy's mean lead over a method and its interval."""
    row = entry["paired"].get(f"policy-{name}")
    return (row["difference"], *row["ci95"]) if row else None


def table(result: dict[str, Any]) -> str:
    """All floors and methods as one Markdown table."""
    header = ["keep", "method", "trainings a task", "J mean", "met within 1 point", "met", "shortfall", "accuracy"]
    header += ["latency", "MACs", "policy's lead in J (95 %)", "wins"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for entry in floors(result):
        for name, m in entry["methods"].items():
            row, gap = entry["paired"].get(f"policy-{name}"), lead(entry, name)
            cells = [
                f"{entry['goal']['keep']:g}",
                name,
                f"{m['trainings_per_task']:.0f}",
                f"{m['score']['mean']:.4f}",
                share(m["goal_met_within_1_point"]),
                share(m["goal_met"]),
                f"{m['shortfall']:.4f}",
                *(f"{m[key]['mean']:.3f}" for key in ("accuracy", "latency_ratio", "macs_ratio")),
                f"{gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f})" if gap else "",
                f"{row['probability_of_improvement']:.0%}" if row else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(value: float | None) -> str:
    """A percentage, or a dash where no task is feasible."""
    return "-" if value is None else f"{value:.1%}"


def bars(name: str, result: dict[str, Any]) -> list[str]:
    """One line a floor: goals met, and the baselines that the policy does not lead with its whole interval."""
    lines = []
    for entry in floors(result):
        if "policy" not in entry["methods"]:
            continue
        met, wanted = entry["methods"]["policy"]["goal_met_within_1_point"], MET.get(name, MET_ELSEWHERE)
        behind = [m for m in entry["methods"] if (gap := lead(entry, m)) and gap[1] <= 0]
        verdict = "reached" if met is not None and met >= wanted else "MISSED"
        lines.append(
            f"- keep {entry['goal']['keep']:g}: goals met within 1 point on {share(met)} of {entry['num_feasible']} "
            f"feasible tasks (bar {wanted:.0%}: {verdict}); "
            + (f"the 95 % interval of the lead is not above 0 for {', '.join(behind)}" if behind else ALL_LED)
        )
    return lines


def draw(sets: dict[str, dict[str, Any]], path: Path) -> None:
    """The policy's leads with intervals, and goals met, one row of panels a floor."""
    keeps = sorted({entry["goal"]["keep"] for result in sets.values() for entry in floors(result)})
    figure = Figure(figsize=(13, 1.2 + 3.2 * len(keeps)), layout="constrained")
    panels = figure.subplots(len(keeps), 2, squeeze=False)
    for (left, right), keep in zip(panels, keeps, strict=True):
        entries = {
            name: entry for name, result in sets.items() for entry in floors(result) if entry["goal"]["keep"] == keep
        }
        for k, baseline in enumerate(SHOWN):
            for i, entry in enumerate(entries.values()):
                at, gap = i + 0.08 * (k - len(SHOWN) / 2), lead(entry, baseline)
                if gap:
                    error = [[gap[0] - gap[1]], [gap[2] - gap[0]]]
                    left.errorbar([at], [gap[0]], error, fmt="o", ms=3, color=f"C{k}", label=baseline)
        for k, method in enumerate(("policy", *SHOWN)):
            for i, entry in enumerate(entries.values()):
                met = entry["methods"].get(method, {}).get("goal_met_within_1_point")
                if met is not None:
                    color = "black" if method == "policy" else f"C{k - 1}"
                    right.plot([i + 0.08 * (k - len(SHOWN) / 2)], [met], "o", ms=3, color=color, label=method)
        for panel, title in ((left, "policy's lead in J"), (right, "goals met within 1 point (feasible tasks)")):
            panel.set_title(f"keep {keep:g}: {title}", fontsize=10)
            panel.set_xticks(range(len(entries)), list(entries), rotation=20, fontsize=8)
            handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
            panel.legend(handles.values(), handles.keys(), fontsize=6, ncols=2)
        left.axhline(0, color="gray", lw=0.8)
        right.axhline(MET_ELSEWHERE, color="gray", lw=0.8)
    figure.savefig(path, dpi=110)


def page(sets: dict[str, dict[str, Any]]) -> str:
    """The whole of goals.md."""
    parts = [
        "# Goals: keep this share of the accuracy, be as fast as possible",
        "",
        "A floor is `keep` times what the dense student reaches on the same task. J = 0.75 latency saved + 0.25 energy saved"
        " - min(2, 10 x accuracy below the floor). All on test data, read once; every method trains the same tasks, first"
        " weights and batches, and ships the best of its windows as validation saw them. A task is feasible if one of the"
        " methods (dense is always among them) met its floor within 1 point. Latency is the cost profile's.",
        "",
        "![Leads and goals met](goals/leads.png)",
        "",
        (DOCS / "goals" / "about.txt").read_text(),
    ]
    named = dict.fromkeys(m for result in sets.values() for e in floors(result) for m in e["methods"])
    parts += [f"- `{name}`: {METHODS[name].meaning}" for name in named if name in METHODS]
    for name, result in sets.items():
        num_tasks = result["num_tasks"] * result["num_seeds"]
        parts += [
            "",
            f"## {name}",
            "",
            f"{num_tasks} tasks. Machine-readable: [goals/{name}.json](goals/{name}.json).",
            "",
        ]
        parts += [*bars(name, result), "", table(result)]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the page, the JSON files and the figure."""
    if len(sys.argv) != 2:
        print("usage: python experiments/publish_goals.py COMPARED", file=sys.stderr)
        return 2
    compared = Path(sys.argv[1])
    sets = read_sets(compared)
    (DOCS / "goals").mkdir(parents=True, exist_ok=True)
    for name, result in sets.items():
        write_json(DOCS / "goals" / f"{name}.json", result)
    draw(sets, DOCS / "goals" / "leads.png")
    (DOCS / "goals.md").write_text(page(sets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
