"""Whether the loop is closed: what a frozen policy does when what it sees, or the student, is changed on purpose.

    RLKD_DATA=FOLDER python experiments/closed_loop.py --out docs/results/closed_loop

- response: all margins of an observation are falsified by -0.1 and +0.1; the policy should keep more, and fewer, units,
  and lean away from, and towards, the first exit.
- recovery: in the middle of the training a third of the weights of every student is drawn anew. Without guards, it
  should be above its floor (or at the dense student's accuracy) again at the end.
- first exits of four units: students whose first exit misses the floor must not leave there.
- groups: J lost where the policy reads a constant in place of a group of observations.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlkd.agents.evaluation.comparison import paired
from rlkd.agents.evaluation.held_out import held_out_seeds
from rlkd.agents.policy.bundled import find_policy
from rlkd.agents.policy.controllers import Controller, Results, RunOptions, follow, run
from rlkd.agents.policy.policy import HIDDEN, Policy
from rlkd.data import Range, TaskDistribution
from rlkd.envs import EnvConfig, build_scenario
from rlkd.envs.action import CONTROLS, published_setting
from rlkd.envs.episodes import Episodes
from rlkd.envs.guard import GuardConfig, meets_goal
from rlkd.envs.observation import OBSERVATIONS, TABLE
from rlkd.envs.scenario import Scenario
from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.models import StudentConfig
from rlkd.runs.folder import git_state, use_one_thread

KEEP, SEED = 0.98, 8000
MARGINS = [OBSERVATIONS.index(name) for name in ("margin", "first_exit_margin", "last_exit_margin")]
UNITS, INPUTS = CONTROLS.index("unit_keep"), CONTROLS.index("feature_keep")
FIRST, NEVER = CONTROLS.index("exit_first"), CONTROLS.index("exit_never")
WITHIN = 0.01
GENERATED = "generated:seed=1,classes=6,inputs=36,difficulty=0.1"
SETS: dict[str, tuple[str, StudentConfig]] = {
    "digits": ("digits", StudentConfig(widths=(48, 48), exits=(1,))),
    "generated": (GENERATED, StudentConfig(widths=(24, 24, 24), exits=(1, 2))),
    "letter": ("letter", StudentConfig(widths=(48, 48), exits=(1,))),
    "fashion_mnist_8x8": ("fashion_mnist_8x8", StudentConfig(widths=(48, 48), exits=(1,))),
    "satellite": ("satellite", StudentConfig(widths=(48, 48), exits=(1,))),
    "wide": ("digits", StudentConfig(widths=(96, 64, 32), exits=(1, 2))),
    "conv": ("digits", StudentConfig("conv", (8, 16), (1,))),
}
NARROW = {"digits": (5, 40), "letter": (4, 48), "fashion_mnist_8x8": (4, 48)}  # a first exit that misses most floors
GROUP_SETS = ("digits", "letter", "fashion_mnist_8x8", "conv")


def scenario_of(dataset: str, student: StudentConfig, policy: Policy) -> Scenario:
    """Tasks of `rlkd compare` under the floor KEEP."""
    task = TaskDistribution(dataset=dataset).with_keep(KEEP)
    return build_scenario(EnvConfig(task=task, student=student, controls=policy.controls), policy.start)


def responses(scenario: Scenario, policy: Policy, seeds: Sequence[int]) -> dict[str, float]:
    """Shares of states in which a falsified margin moves the controls rightly, over all windows of all tasks."""
    episodes, controller = Episodes(scenario, len(seeds)), policy.controller()
    observation = episodes.reset(seeds)
    moved: dict[str, list[torch.Tensor]] = {}
    for window in range(scenario.config.num_windows):
        low, high = observation.clone(), observation.clone()
        low[:, MARGINS] -= 0.1
        high[:, MARGINS] += 0.1
        now, below, above = (policy.act(o) for o in (observation, low, high))  # [N, 12]
        exits = [a[:, FIRST] - a[:, NEVER] for a in (now, below, above)]
        kept = [a[:, UNITS] + a[:, INPUTS] for a in (now, below, above)]
        rows = {
            "units_at_less": below[:, UNITS] >= now[:, UNITS],
            "units_at_more": above[:, UNITS] <= now[:, UNITS],
            "units_and_inputs_at_less": kept[1] >= kept[0],
            "units_and_inputs_at_more": kept[2] <= kept[0],
            "exit_at_less": exits[1] <= exits[0],
            "exit_at_more": exits[2] >= exits[0],
            "units_or_exit_at_less": (below[:, UNITS] >= now[:, UNITS]) | (exits[1] <= exits[0]),
            "units_or_exit_at_more": (above[:, UNITS] <= now[:, UNITS]) | (exits[2] >= exits[0]),
        }
        for name, row in rows.items():
            moved.setdefault(name, []).append(row)
        observation = episodes.step(controller(observation, episodes, window)).observation
    return {name: float(torch.stack(some).float().mean()) for name, some in moved.items()}


def damage(episodes: Episodes) -> None:
    """Draw a third of every student's weights anew, as they were drawn before its training; Adam's moments go to 0."""
    state = episodes.training_state()
    for i, task in enumerate(episodes.tasks):
        generator = torch.Generator().manual_seed(task.seed)
        for name, tensor in state.items():
            if not name.startswith("students.parameters.") or tensor[i].ndim < 2:
                continue
            drawn = torch.rand(tensor[i].shape, generator=generator) < 1 / 3
            bound = 1.0 / math.sqrt(tensor[i][0].numel())
            fresh = (2 * torch.rand(tensor[i].shape, generator=generator) - 1) * bound
            tensor[i] = torch.where(drawn, fresh, tensor[i])
            for moment in ("first", "second"):
                key = name.replace("students.parameters.", f"students.{moment}.")
                state[key][i] = torch.where(drawn, 0.0, state[key][i])
    episodes.students.load_training_state(
        {name.removeprefix("students."): tensor for name, tensor in state.items() if name.startswith("students.")}
    )


def after_damage(
    scenario: Scenario, controller: Controller, seeds: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Test accuracies [N] just after the damage and at the end, and floors [N]."""
    episodes = Episodes(scenario, len(seeds))
    observation = episodes.reset(seeds)
    for window in range(scenario.config.num_windows):
        if window == scenario.config.num_windows // 2:
            damage(episodes)
            hurt = episodes.evaluate("test")[0].accuracy
            observation = episodes.observe_now()
        observation = episodes.step(controller(observation, episodes, window)).observation
    return hurt, episodes.evaluate("test")[0].accuracy, episodes.floors[:, 1]


def recovery(scenario: Scenario, policy: Policy, seeds: Sequence[int]) -> dict[str, float]:
    """Share of the feasible tasks that are back within a point of the floor at the end, without guards."""
    hurt, end, floor = after_damage(scenario, policy.controller(), seeds)
    dense = published_setting(scenario.config.controls)[None]
    _, dense_end, _ = after_damage(scenario, follow(dense), seeds)
    back, possible = meets_goal(end, floor, WITHIN), meets_goal(dense_end, floor, WITHIN)
    feasible = back | possible
    return {
        "num_feasible": int(feasible.sum()),
        "below_floor_after_damage": float((~meets_goal(hurt, floor, WITHIN)).float().mean()),
        "back": float((back | (end >= dense_end))[feasible].float().mean()),
        "dense_back": float(possible[feasible].float().mean()),
        "mean_margin_after_damage": float((hurt - floor).mean()),
        "mean_margin_at_end": float((end - floor).mean()),
    }


def narrow_exit(scenario: Scenario, policy: Policy, seeds: Sequence[int]) -> dict[str, float]:
    """Where samples leave, of students whose first exit misses the floor on validation at the end."""
    episodes, controller = Episodes(scenario, len(seeds)), policy.controller()
    observation = episodes.reset(seeds)
    for window in range(scenario.config.num_windows):
        observation = episodes.step(controller(observation, episodes, window)).observation
    metrics = episodes.evaluate("validation")[0]
    cannot = metrics.exit_accuracy[:, 0] < episodes.floors[:, 0]
    elsewhere = metrics.exit_rates[:, 0] < 1.0
    test, floors = episodes.evaluate("test")[0].accuracy, episodes.floors[:, 1]
    return {
        "num_first_exit_below_floor": int(cannot.sum()),
        "left_at_end_or_by_threshold": float(elsewhere[cannot].float().mean()) if cannot.any() else 1.0,
        "goal_met_within_1_point_without_guards": float(meets_goal(test, floors, WITHIN).float().mean()),
    }


def without_group(policy: Policy, group: str) -> Policy:
    """The policy that reads the training mean of every observation of a group."""
    deviation = policy.deviation.clone()
    deviation[[OBSERVATIONS.index(name) for name in TABLE[group]]] = HIDDEN
    return replace(policy, deviation=deviation)


def groups(scenario: Scenario, policy: Policy, seeds: Sequence[int]) -> dict[str, Any]:
    """J lost and goals missed on test without each group of observations, paired with the whole policy."""

    def results(some: Policy) -> Results:
        return run(scenario, some.controller(), seeds, scenario.config.task, options=RunOptions(GuardConfig()))

    whole, generator = results(policy), np.random.default_rng(SEED)
    rows = {}
    for group in TABLE:
        hidden = results(without_group(policy, group))
        met = float(hidden.goal_met_within_1_point.mean() - whole.goal_met_within_1_point.mean())
        rows[group] = {**paired(whole, hidden, generator), "goal_met_change": met}
    return rows


def page(result: dict[str, Any]) -> str:
    """All measurements as Markdown."""
    lines = [
        "# Is the loop closed?",
        "",
        f"Command: `{result['command']}`, {result['date']}. A frozen policy, keep {KEEP:g}, {result['num_tasks']} fresh tasks a set.",
        "",
        "## Falsified margins",
        "",
        "Share of all states (every window of every task) in which a margin that is falsified by -0.1 or +0.1 moves the",
        "control rightly: more or fewer kept units (or units and inputs together), away from or towards the first exit.",
        "",
    ]
    names = list(next(iter(result["response"].values())))
    lines += ["| set | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * (1 + len(names))]
    for name, row in result["response"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.1%}" for key in names) + " |")
    lines += [
        "",
        "## A third of the weights drawn anew",
        "",
        "In the middle of the training, without guards; a task is feasible if the policy's or the dense student is within a",
        "point of the floor at the end. `back`: within a point of the floor, or at least as accurate as the dense student.",
        "",
        "| set | feasible | below the floor after the damage | margin then | margin at the end | back | dense student back |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["recovery"].items():
        lines.append(
            f"| {name} | {row['num_feasible']} | {row['below_floor_after_damage']:.1%} | {row['mean_margin_after_damage']:+.3f} | "
            f"{row['mean_margin_at_end']:+.3f} | {row['back']:.1%} | {row['dense_back']:.1%} |"
        )
    lines += [
        "",
        "## First exits that cannot reach the floor",
        "",
        "| set | first exit below the floor | of these, left at the end or by threshold | goals met within a point, no guards |",
        "|---|---|---|---|",
    ]
    for name, row in result["narrow_exit"].items():
        lines.append(
            f"| {name} | {row['num_first_exit_below_floor']} | {row['left_at_end_or_by_threshold']:.1%} | "
            f"{row['goal_met_within_1_point_without_guards']:.1%} |"
        )
    lines += [
        "",
        "## What each group of observations is worth",
        "",
        "J lost on test (95 % interval) and change of the share of goals met where the policy reads the training mean of",
        "a group in place of it. The policy was not learned anew, so this is what the learned policy uses.",
        "",
        "| group | " + " | ".join(result["groups"]) + " |",
        "|" + "---|" * (1 + len(result["groups"])),
    ]
    for group in TABLE:
        cells = []
        for rows in result["groups"].values():
            row = rows[group]
            low, high = row["ci95"]
            cells.append(f"{row['difference']:+.3f} ({low:+.3f}, {high:+.3f}); {row['goal_met_change']:+.1%}")
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and write the page and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=None, help="by default the policy that comes with rlkd")
    parser.add_argument("--num_tasks", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, help="path without .md and .json")
    options = parser.parse_args()
    use_one_thread()
    policy, seeds = find_policy(options.policy).policy, held_out_seeds(SEED, options.num_tasks)
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "num_tasks": options.num_tasks,
        "keep": KEEP,
        **git_state(Path(__file__).resolve().parent.parent),
        "response": {},
        "recovery": {},
        "narrow_exit": {},
        "groups": {},
    }
    for name, (dataset, student) in SETS.items():
        scenario = scenario_of(dataset, student, policy)
        result["response"][name] = responses(scenario, policy, seeds)
        result["recovery"][name] = recovery(scenario, policy, seeds)
        if name in GROUP_SETS:
            result["groups"][name] = groups(scenario, policy, seeds)
        print(name, json.dumps({k: result[k][name] for k in ("response", "recovery")}), flush=True)
    for name, widths in NARROW.items():
        task = TaskDistribution(dataset=name, num_labels=Range(60.0, 2000.0)).with_keep(KEEP)
        config = EnvConfig(task=task, student=StudentConfig(widths=widths, exits=(1,)), controls=policy.controls)
        result["narrow_exit"][name] = narrow_exit(build_scenario(config, policy.start), policy, seeds)
        print(name, json.dumps(result["narrow_exit"][name]), flush=True)
    write_json(options.out.with_suffix(".json"), result)
    write_whole(options.out.with_suffix(".md"), page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
