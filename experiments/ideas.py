"""Write docs/results/ideas.md: parts of the agent that were tried around a learned plan, and what each brought.

    python experiments/ideas.py RUN [--ideas rollback,rates] [--seeds 0,1]

RUN is the folder of a finished `rlkd train`. Every idea is measured paired: the same tasks, initial weights and batches
with and without it. Ideas can be run one by one; each replaces its own entry of ideas.json, and the page is written anew
from all entries (`--ideas ""`: from those that are there). `recurrent` needs `pip install sb3-contrib` of stable-baselines3's version.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import idea_agents
import idea_students
import numpy as np
import torch

from rlkd.agents.bundle import load_bundle
from rlkd.agents.comparison import interval
from rlkd.agents.held_out import stream_seed
from rlkd.agents.policy import Policy
from rlkd.agents.resume import PROFILE, with_own_profile
from rlkd.agents.runs import use_one_thread
from rlkd.cli.arguments import new_parser, parse
from rlkd.configs import ExperimentConfig
from rlkd.envs.world import World, build_world
from rlkd.errors import UserError

DOCS = Path(__file__).parent.parent / "docs" / "results"
CHOICE_STREAM, JUDGE_STREAM = 0, 7  # of `stream_seed`; a run's own parts have 1 to 6
NUM_CHOICE = idea_students.NUM_FIRST + idea_students.NUM_SECOND
NUM_HELD_OUT, ACCURACY_WEIGHTS = 256, (0.6, 0.9)
WORTH = 0.003  # of J, that an idea must bring besides an interval above 0
Row = idea_students.Row


@dataclass(frozen=True)
class Bench:
    """What ideas are tried on."""

    config: ExperimentConfig
    worlds: list[World]  # the run's, with its learned plan
    policy: Policy
    digest: str  # the policy's
    seeds: tuple[int, ...]  # of agents

    @property
    def choice(self) -> list[int]:
        """Seeds of tasks to choose on."""
        return _draw(CHOICE_STREAM, NUM_CHOICE, 0)

    @property
    def held_out(self) -> list[int]:
        """Seeds of tasks to judge on, out of a range that nothing is trained on."""
        return _draw(JUDGE_STREAM, NUM_HELD_OUT, 2**60)


@dataclass(frozen=True)
class Idea:
    """One section of the page."""

    title: str
    what: str
    measure: Callable[[Bench], tuple[list[Row], int]]


def _draw(stream: int, count: int, offset: int) -> list[int]:
    generator = torch.Generator().manual_seed(stream_seed(0, stream))
    return [offset + int(s) for s in torch.randint(2**59, (count,), generator=generator)]


def _rollback(bench: Bench) -> tuple[list[Row], int]:
    return idea_students.study_rollback(bench.worlds[0], ACCURACY_WEIGHTS, bench.held_out)


def _rates(bench: Bench) -> tuple[list[Row], int]:
    candidates = idea_students.rate_candidates()
    return idea_students.study_scales(bench.worlds[0], candidates, ACCURACY_WEIGHTS, bench.choice, bench.held_out)


def _units(bench: Bench, num_blocks: int) -> tuple[list[Row], int]:
    """On the run's digits student of so many blocks."""
    world = next(
        w for w in bench.worlds if len(w.template.layers) == num_blocks and w.data.name == bench.worlds[0].data.name
    )
    candidates = idea_students.unit_candidates(num_blocks)
    return idea_students.study_scales(world, candidates, ACCURACY_WEIGHTS, bench.choice, bench.held_out)


def _agent(name: str) -> Callable[[Bench], tuple[list[Row], int]]:
    def measure(bench: Bench) -> tuple[list[Row], int]:
        return idea_agents.study_agent(
            idea_agents.VARIANTS[name], bench.worlds, bench.policy, bench.config.ppo, bench.seeds, bench.held_out
        )

    return measure


IDEAS = {
    "rollback": Idea(
        "Rollback as an action",
        "Bounds: training goes as the plan has it, and each student ends with the state of its best window. Rules: a window that lowers J on validation under unchanged "
        "controls is undone (parameters, moments and selection go back, batches go on).",
        _rollback,
    ),
    "rates": Idea(
        "Step sizes by parameter group",
        f"Factors on the plan's learning rate for {' / '.join(idea_students.GROUPS)}: each 0.5, 1 or 2, chosen for each accuracy weight.",
        _rates,
    ),
    "units_2": Idea(
        "Kept units by block: the 48-48 student",
        "Factors on the plan's unit keep, block by block: each 0.5, 0.7, 1, 1.4 or 2, chosen for each accuracy weight.",
        lambda bench: _units(bench, 2),
    ),
    "units_3": Idea(
        "Kept units by block: the 96-64-32 student with two exits",
        "As above with factors 0.6, 1 or 1.6.",
        lambda bench: _units(bench, 3),
    ),
    **{name: Idea(variant.title, variant.what, _agent(name)) for name, variant in idea_agents.VARIANTS.items()},
}


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether a way of `rows` is worth keeping: in all its rows the interval above 0, and in one at least WORTH."""
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["bound"]:
            ways.setdefault(row["what"], []).append(row)
    for what, group in ways.items():
        if all(row["ci95"][0] > 0 for row in group) and max(row["difference"] for row in group) >= WORTH:
            return f"worth keeping ({what})"
    best = max((row for group in ways.values() for row in group), key=lambda row: row["difference"])
    return f"not kept; the largest lead is {_interval(best)} ({best['what']})"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def section(idea: Idea, entry: Mapping[str, Any], plain: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of one idea; `plain` are the rows of PPO without any, which agents are compared with seed by seed."""
    lines = ["", f"## {idea.title}", "", idea.what, ""]
    agents = "scores" in entry["rows"][0]
    last = "lead over plain PPO (95 %)" if agents else "lead where chosen"
    lines += [
        f"| what | accuracy weight | {'passes' if agents else 'factors'} | J of the plan | lead over the plan (95 %) | {last} |",
        "|" + "---|" * 6,
    ]
    for row in entry["rows"]:
        weight, shown = row.get("accuracy_weight", "drawn"), ""
        if agents:
            same = [other for other in plain if other["seed"] == row["seed"] and other is not row]
            over = np.array(row["scores"]) - np.array(same[0]["scores"]) if same else None
            shown = "" if over is None else _interval(interval(over, "difference", np.random.default_rng(0)))
        elif "gain_when_chosen" in row:
            shown = f"{row['gain_when_chosen']:+.4f}"
        name = f"{row['what']}, seed {row['seed']}" if agents else row["what"]
        name += f"; {row['windows_undone']:.2f} windows a student" if "windows_undone" in row else ""
        lines.append(
            f"| {name} | {weight} | {row.get('choice', row.get('epochs', ''))} | {row['base']:.4f} | {_interval(row)} | {shown} |"
        )
    judge = "" if idea is IDEAS["plain"] else f" Verdict: **{verdict(entry['rows'])}**."
    return [*lines, "", f"Trainings spent: {entry['num_trainings']:,}; {entry['wall_s']:.0f} s.{judge}"]


def joined(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Mapping[str, Any]:
    """The new entry of an idea; rows of other agents' seeds stay."""
    measured = {row.get("seed") for row in new["rows"]}
    kept = [row for row in (old or {"rows": []})["rows"] if row.get("seed") not in measured]
    if not old or not kept:
        return new
    rows = sorted([*kept, *new["rows"]], key=lambda row: row["seed"])
    return {**new, "rows": rows, **{name: old[name] + new[name] for name in ("num_trainings", "wall_s")}}


def page(entries: Mapping[str, Any]) -> str:
    """The whole of ideas.md."""
    lines = [
        "# Ideas for the agent, tried around the learned plan",
        "",
        f"Command: `python experiments/ideas.py RUN`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}. digits.",
        f"RUN is a run of `rlkd train`, here the one with the policy of sha256 {', '.join(sorted({e['policy_sha256'][:12] for e in entries.values()}))}.",
        f"Every lead is paired: the same {NUM_HELD_OUT} fresh tasks, initial weights and batches; mean difference in J, 95 % bootstrap interval over tasks.",
        f"What changes students is chosen on {NUM_CHOICE} training tasks' validation data and judged on test data of held-out tasks, at two accuracy weights.",
        "What changes the agent learns changes to the plan on all of the run's worlds and is judged as the run's own gate judges PPO: by its gain over the plan on fresh tasks,",
        f"validation data, preferences drawn. Worth keeping: the interval above 0 in every row of one way, and a lead of at least {WORTH} in one. Costs: the run's cost profiles.",
    ]
    plain = entries.get("plain", {"rows": []})["rows"]
    for name, idea in IDEAS.items():
        if name in entries:
            lines += section(idea, entries[name], plain)
    return "\n".join(lines) + "\n"


def load(run: Path, seeds: tuple[int, ...]) -> Bench:
    """The run's worlds under its learned plan."""
    parser = new_parser("ideas", "", [])
    parser.add_argument("--seed", type=int, default=0)
    config = parse(parser, ["--config", str(run / "config.yaml")], ExperimentConfig)[0]
    assert config is not None
    bundle = load_bundle(run / "policy")
    names = [f"{PROFILE}{f'_{index}' if index else ''}" for index in range(1 + len(config.also))]
    parts = [with_own_profile(part, run, name) for part, name in zip(config.worlds(), names, strict=True)]
    worlds = [replace(build_world(part), plan=bundle.policy.plan) for part in parts]
    return Bench(config, worlds, bundle.policy, bundle.digest, seeds)


def measure(names: Sequence[str], bench: Bench, file: Path) -> None:
    """Measure the named ideas one after the other, and put each into `file` as soon as it is done."""
    for name in names:
        began = time.perf_counter()
        rows, num_trainings = IDEAS[name].measure(bench)
        wall_s = time.perf_counter() - began
        entry = {"rows": rows, "num_trainings": num_trainings, "wall_s": wall_s, "policy_sha256": bench.digest}
        entries = json.loads(file.read_text()) if file.exists() else {}
        entries[name] = joined(entries.get(name), entry)
        file.write_text(json.dumps(entries, separators=(",", ":")).replace("},", "},\n") + "\n")


def main() -> int:
    """Measure the ideas that are asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ideas", default=",".join(IDEAS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    use_one_thread()
    names = [name for name in options.ideas.split(",") if name]
    unknown = [name for name in names if name not in IDEAS]
    file = options.out / "ideas.json"
    try:
        if unknown:
            raise UserError(f"--ideas: got {', '.join(unknown)}; allowed: {', '.join(IDEAS)}")
        if names:
            measure(names, load(options.run, tuple(int(seed) for seed in options.seeds.split(","))), file)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    text = page(json.loads(file.read_text()))
    (options.out / "ideas.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
