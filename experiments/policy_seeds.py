"""Write docs/results/policy_seeds.md: policies of several seeds of the whole training beside the same baselines.

    python experiments/policy_seeds.py COMPARED0 COMPARED1 COMPARED2

Each COMPARED holds SET/result.json of one policy, merged with baselines by `merge_goals.py`, as for `publish_goals.py`.
"""

import sys
import time
from pathlib import Path
from typing import Any

from publish_goals import DOCS, floors, lead, read_sets, share
from study_results import write_results

KEEP = 0.98
ONE_TRAINING = ("dense", "start", "constant", "nncf", "cubic", "open_loop")


def kept(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what the page says of a set: the policy's entry and its leads."""
    return {"policy": entry["methods"]["policy"], "paired": entry["paired"], "num_feasible": entry["num_feasible"]}


def row(name: str, number: int, entry: dict[str, Any]) -> str:
    """One line of the table: a set and the policy of a seed."""
    policy = entry["methods"]["policy"]
    leads = {method: lead(entry, method) for method in entry["methods"] if method != "policy"}
    behind = [m for m in ONE_TRAINING if (gap := leads.get(m)) is not None and gap[1] <= 0]
    nearest = min((m for m in leads if leads[m] and m in ONE_TRAINING), key=lambda m: (leads[m] or (0.0,))[0])
    gap = leads[nearest]
    assert gap is not None
    searches = [
        f"{m} {found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f})"
        for m, found in leads.items()
        if found and m.startswith("tpe")
    ]
    cells = [
        name,
        str(number),
        f"{policy['score']['mean']:.4f}",
        share(policy["goal_met_within_1_point"]),
        f"{nearest} {gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})",
        ", ".join(behind) or "none",
        "; ".join(searches),
    ]
    return "| " + " | ".join(cells) + " |"


def page(compared: list[dict[str, dict[str, Any]]], policies: list[str]) -> str:
    """Results as Markdown."""
    lines = [
        "# Three seeds of the whole training",
        "",
        f"{time.strftime('%Y-%m-%d')}. `rlkd train --config full --seed N --comparison.keeps [0.98] --comparison.num_tasks 32`; "
        f"the policies: {', '.join(f'seed {k} {digest[:12]}' for k, digest in enumerate(policies))}. Seed 0 is the bundled "
        "one. Keep 0.98, test data, the tasks and baselines of [goals](goals.md): baselines were tuned and trained once, each "
        "policy, its open loop and its start on the same tasks with the same cost profile. Bar: each seed above every baseline "
        "of one training, intervals above 0; the policy's own open loop and start count among them.",
        "",
        "| set | seed | J | met within 1 point | least lead over a baseline of one training (95 %) | interval not above 0 | "
        "lead over searches |",
        "|" + "---|" * 7,
    ]
    for name in compared[0]:
        for number, sets in enumerate(compared):
            if name in sets:
                (entry,) = [e for e in floors(sets[name]) if e["goal"]["keep"] == KEEP]
                lines.append(row(name, number, entry))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page and its numbers."""
    if len(sys.argv) < 3:
        print("usage: python experiments/policy_seeds.py COMPARED0 COMPARED1 ...", file=sys.stderr)
        return 2
    compared = [read_sets(Path(path)) for path in sys.argv[1:]]
    policies = [next(iter(sets.values()))["policy_sha256"] for sets in compared]
    numbers = [
        {name: next(kept(e) for e in floors(result) if e["goal"]["keep"] == KEEP) for name, result in sets.items()}
        for sets in compared
    ]
    write_results(DOCS / "policy_seeds", page(compared, policies), {"policies": policies, "seeds": numbers})
    return 0


if __name__ == "__main__":
    sys.exit(main())
