"""Write docs/results/online.md: PPO that learns within one run against its own base held, and the published setting.

    python experiments/online.py [RUN/policy]

Every way trains the same student of the same tasks (clean to noisy labels, poor to good teachers) for equally many
updates from the same weights and batches, and ships its best student on validation; test data is read once for each.
Bases are the published setting (the agent starts from nothing), the best held setting of a short search over the task
distribution, and, where one is given, a learned policy.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlkd.agents.baselines.search import SearchConfig, search_setting
from rlkd.agents.evaluation.comparison import compare
from rlkd.agents.evaluation.held_out import held_out_seeds
from rlkd.agents.policy.bundle import load_bundle
from rlkd.agents.policy.controllers import Controller, Results, follow, hold_start
from rlkd.agents.ppo.online import OneRun, OnlineAgentConfig, learn_online
from rlkd.configs import OnlineConfig
from rlkd.data import Preference
from rlkd.envs.action import NUM_CONTROLS, published_setting
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.runs.folder import use_one_thread

DOCS = Path(__file__).parent.parent / "docs" / "results"
NUM_TASKS, NUM_WINDOWS, ACCURACY_WEIGHT = 16, 96, 0.6
SEARCH = SearchConfig(num_settings=40, tasks_per_setting=16, num_finalists=4, tasks_per_finalist=64)


def hold_base(run: OneRun, num_windows: int) -> None:
    """Train `run`'s student for as many windows under its base alone: the agent's baseline."""
    for _ in range(num_windows):
        run.step(np.zeros(NUM_CONTROLS, dtype=np.float32))
        if run.diverged:
            break


def one(scenario: Scenario, base: Controller, seed: int, agent: OnlineAgentConfig | None) -> dict[str, float]:
    """Test figures of the best validated student, and of the last one; without an agent the base is held."""
    run = OneRun(scenario, base, seed, lambda row, observation, episodes: None)
    if agent is None:
        hold_base(run, NUM_WINDOWS)
    else:
        learn_online(run, NUM_WINDOWS, agent, seed=seed % 2**31, logger=None)
    run.bring_back_best()
    metrics, cost, score = run.episodes.evaluate("test")
    return {
        "score": float(score[0]),
        "accuracy": float(metrics.accuracy[0]),
        "latency_ratio": float(cost.latency_ratio[0]),
        "energy_ratio": float(cost.energy_ratio[0]),
        "macs_ratio": float(cost.macs_ratio[0]),
        "diverged": run.diverged,
        "num_rollbacks": run.last["num_rollbacks"],
        "best_window": run.best_window,
    }


def many(
    scenario: Scenario, base: Controller, seeds: list[int], agent: OnlineAgentConfig | None
) -> tuple[Results, float]:
    """Results over tasks, and the mean window of the student that ships."""
    rows = [one(scenario, base, seed, agent) for seed in seeds]
    columns = {f.name: np.array([row[f.name] for row in rows]) for f in dataclasses.fields(Results)}
    return Results(**columns), float(np.mean([row["best_window"] for row in rows]))


def page(result: dict[str, Any], wall_s: float, policy: bool) -> str:
    """The whole of online.md."""
    command = "python experiments/online.py" + (" RUN/policy" if policy else "")
    lines = [
        "# Learning within a single run",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, {wall_s:.0f} s.",
        f"{NUM_TASKS} held-out tasks of the default distribution (digits), accuracy weight {ACCURACY_WEIGHT}, one training of {NUM_WINDOWS} windows of 15 steps each.",
        "*online* changes its base and learns by PPO every 8 windows; *held* is the same base unchanged for the same steps. Both ship their best student on",
        "validation; figures are its test data. *untrained* explores as online does and never learns: what exploration and choosing the best window give alone.",
        "",
        "| method | J mean | J IQM (95 %) | accuracy | MACs | latency | window that ships |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in result["methods"].items():
        low, high = m["score"]["ci95"]
        lines.append(
            f"| {name} | {m['score']['mean']:.3f} | {m['score']['iqm']:.3f} ({low:.3f} to {high:.3f}) | {m['accuracy']['mean']:.3f} "
            f"| {m['macs_ratio']['mean']:.3f} | {m['latency_ratio']['mean']:.3f} | {m['best_window']:.0f} |"
        )
    lines += ["", "| pair | difference in J (95 %) | wins |", "|---|---|---|"]
    for name, row in result["paired"].items():
        low, high = row["ci95"]
        lines.append(
            f"| {name} | {row['difference']:+.3f} ({low:+.3f} to {high:+.3f}) | {row['probability_of_improvement']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Search, train, write."""
    if len(sys.argv) > 2:
        print("usage: python experiments/online.py [RUN/policy]", file=sys.stderr)
        return 2
    use_one_thread()
    began = time.perf_counter()
    bundle = load_bundle(Path(sys.argv[1])) if len(sys.argv) == 2 else None
    controls = bundle.policy.controls if bundle else EnvConfig().controls
    short = build_scenario(EnvConfig(controls=controls), bundle.policy.start if bundle else None)
    tasks = short.config.task.with_preference(Preference(ACCURACY_WEIGHT))
    setting = search_setting([short], SEARCH, torch.Generator().manual_seed(0), tasks=[tasks])  # [12]
    scenario = dataclasses.replace(short, config=dataclasses.replace(short.config, task=tasks, num_windows=NUM_WINDOWS))
    bases: dict[str, Controller] = {
        "published": follow(published_setting(controls)[None]),
        "searched": follow(setting[None]),
    }
    if bundle:
        bases |= {"policy": bundle.policy.controller(), "start": hold_start}
    agents = {"online": OnlineConfig().agent, "untrained": OnlineAgentConfig(learning_rate=1e-12), "held": None}
    seeds = held_out_seeds(0, NUM_TASKS)
    found = {
        f"{way} from {name}": many(scenario, base, seeds, agent)
        for name, base in bases.items()
        for way, agent in agents.items()
    }
    results = {name: r for name, (r, _) in found.items()}
    spent = dict.fromkeys(results, 1.0)
    table = compare(results, spent, 0, f"online from {next(iter(bases))}")
    for name, (_, window) in found.items():
        table["methods"][name]["best_window"] = window
    table["paired"] = {
        f"{first} - {second}": compare({first: results[first], second: results[second]}, spent, 0, first)["paired"][
            f"{first}-{second}"
        ]
        for name in bases
        for first, second in (
            (f"online from {name}", f"held from {name}"),
            (f"online from {name}", f"untrained from {name}"),
            (f"online from {name}", "held from published"),
        )
    }
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "online.json").write_text(json.dumps(table, indent=1) + "\n")
    text = page(table, time.perf_counter() - began, bundle is not None)
    (DOCS / "online.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
