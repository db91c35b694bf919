"""`rlkd train` from one end to the other: search static settings, learn a policy, compare, write the run folder."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from rlkd.agents.baselines.methods import Request
from rlkd.agents.baselines.search import Shortlist, search_plans
from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.comparison import compare, interval
from rlkd.agents.evaluation.held_out import (
    GATE_STREAM,
    METHOD_STREAM,
    PLAN_STREAM,
    SEARCH_STREAM,
    TRAIN_STREAM,
    held_out_seeds,
    run_methods,
    stream_seed,
)
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.planner.planning import Round, learn_plan
from rlkd.agents.policy.bundle import save_bundle
from rlkd.agents.policy.controllers import hold_start, run
from rlkd.agents.policy.policy import Policy, unchanged
from rlkd.agents.ppo.train import Rollout, train
from rlkd.configs.schema import ExperimentConfig, ReplayConfig
from rlkd.cost import save_profile
from rlkd.data import Preference
from rlkd.envs.scenario import Scenario, build_scenario
from rlkd.envs.schedule import ControlPlan
from rlkd.io.journal import Journal
from rlkd.io.records import JsonLines, plain, write_json
from rlkd.runs.distil import distil, write_student
from rlkd.runs.folder import Progress
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile

NUM_DRAWN = 32  # tasks in the figure of the controls
COMPARED = ("policy", "static", "plan", "published", "annealed")


def train_experiment(
    config: ExperimentConfig, folder: Path, seed: int, progress: Progress, journal: Journal | None = None
) -> dict[str, Any]:
    """Run the experiment and fill `folder`; returns the content of `result.json`.

    The policy is on disk as soon as it is learned; a KeyboardInterrupt during PPO saves it as far as it got,
    before it goes on to the caller. With the `journal` of a run of the same config and seed that was stopped it goes
    on from what that had finished, and ends as if it had not been stopped.
    """
    config.check()
    journal = journal or Journal(folder, False, config.keep_checkpoints, progress.say)
    versions = describe(journal, folder, config, seed, progress.say)
    names = [f"{PROFILE}{f'_{index}' if index else ''}" for index in range(1 + len(config.also))]
    parts = [with_own_profile(part, folder, name) for part, name in zip(config.scenarios(), names, strict=True)]
    scenarios = [build_scenario(part, say=progress.say) for part in parts]
    for scenario, name in zip(scenarios, names, strict=True):
        save_profile(scenario.profile, folder / f"{name}.json")
    found = {
        f"{name} {i}": tensor for i, scenario in enumerate(scenarios) for name, tensor in scenario.tensors().items()
    }
    # what the last phase needs is made now: a config that it cannot use fails here, and not after all trainings
    student_config = with_own_profile(replay_config(config).env(config.controls), folder)
    student_scenario = build_scenario(student_config, say=progress.say)
    remember(journal, "train", found, costs=[plain(scenario.profile) for scenario in scenarios])
    timing = JsonLines(folder / "timing.jsonl", journal)

    progress.phase("static search", config.search.num_trainings, config.num_windows)
    generator = torch.Generator().manual_seed(stream_seed(seed, SEARCH_STREAM))
    static = search_plans(scenarios[:1], config.search, generator, progress.advance, journal=journal)
    timing.write({"part": "search", "wall_s": journal.elapsed_s()})

    logger = tb.new_logger(folder / "tensorboard")
    if not journal.replaying:
        tb.write_config(logger, config)
    provenance = {"seed": seed, "config": plain(config), "versions": versions, "task": plain(config.task)}
    plan = plan_ahead(scenarios, static, config, seed, folder, logger, timing, journal, progress)
    scenarios = [dataclasses.replace(scenario, plan=plan) for scenario in scenarios]
    scenario = scenarios[0]
    policy = learn(scenarios, static, config, seed, folder, provenance, logger, timing, journal, progress)
    policy, gain = keep_what_gains(scenario, policy, config, seed, progress, journal)
    save_bundle(policy, folder / "policy", provenance)
    tables = compare_on_held_out_tasks(scenario, static, policy, config, seed, progress, journal)
    wall_s = journal.elapsed_s()
    result = result_of(config, tables, gain, wall_s)
    write_json(folder / "result.json", result)  # stays, should the last phase fail

    progress.phase("one clean student under the policy", 1, config.num_windows)
    student_scenario = dataclasses.replace(
        student_scenario,
        config=dataclasses.replace(student_config, controls=policy.controls),
        plan=policy.plan,
    )
    student = distil(student_scenario, policy.controller(), seed, lambda row, observation: progress.advance(1))
    scores = {f"{weight}: {name}": row for weight, t in tables.items() for name, row in t["paired"].items()}
    digest = save_bundle(policy, folder / "policy", {**provenance, "scores": scores})
    write_student(folder / "student", student, Preference(config.comparison.accuracy_weights[0]), digest)
    result |= {"policy_sha256": digest, "student": {**student.figures, "measured": student.measured}}
    write_json(folder / "result.json", result)

    seeds = held_out_seeds(seed, config.comparison.num_tasks)
    tb.write_controls(logger, scenario, policy.controller(), seeds[:NUM_DRAWN])
    tb.write_outcome(logger, config, seed, result)
    logger.close()
    write_report([read_run(folder)], folder)
    timing.write({"part": "total", "wall_s": wall_s})
    journal.finish()
    return result


def compare_on_held_out_tasks(
    scenario: Scenario,
    static: Shortlist,
    policy: Policy,
    config: ExperimentConfig,
    seed: int,
    progress: Progress,
    journal: Journal | None = None,
) -> dict[str, dict[str, Any]]:
    """`methods` and `paired` for each accuracy weight, on test data."""
    weights, num_tasks = config.comparison.accuracy_weights, config.comparison.num_tasks
    progress.phase("comparison on held-out tasks", len(COMPARED) * len(weights) * num_tasks, config.num_windows)
    seeds = tuple(held_out_seeds(seed, num_tasks))
    method_seed = stream_seed(seed, METHOD_STREAM)
    request = Request(
        scenario, config.task, seeds, static, policy, config.search, method_seed, progress.advance, journal=journal
    )
    tables = run_methods(COMPARED, request, weights)
    return {str(w): compare(table, dict.fromkeys(COMPARED, 1.0), seed) for w, table in tables.items()}


def plan_ahead(
    scenarios: Sequence[Scenario],
    static: Shortlist,
    config: ExperimentConfig,
    seed: int,
    folder: Path,
    logger: Logger,
    timing: JsonLines,
    journal: Journal,
    progress: Progress,
) -> ControlPlan:
    """Learn the plan that actions change, beginning with the best static setting; figures go where PPO's go."""
    lines = JsonLines(folder / "planning.jsonl", journal)

    def on_round(done: Round) -> None:
        lines.write(
            {"round": done.number, "num_trainings": done.num_trainings, "scenario": done.scenario, **done.figures}
        )
        if not journal.replaying:
            tb.record_round(logger, done)
        progress.figures(score=done.figures["score"], accuracy=done.figures["accuracy"])

    progress.phase("learning a plan", config.planning.num_trainings, config.num_windows)
    start = static.best(_first_preference(config))[0]  # [9]
    generator = torch.Generator().manual_seed(stream_seed(seed, PLAN_STREAM))
    plan = learn_plan(scenarios, config.planning, start, generator, progress.advance, on_round, journal)
    timing.write({"part": "planning", "wall_s": journal.elapsed_s()})
    return plan


def keep_what_gains(
    scenario: Scenario, policy: Policy, config: ExperimentConfig, seed: int, progress: Progress, journal: Journal | None
) -> tuple[Policy, dict[str, Any]]:
    """The policy if its changes to the plan pay on fresh tasks, else the plan alone; and what was measured.

    The tasks are neither those of learning nor those of the comparison, and are scored on validation data. The
    changes stay if the interval of their gain lies above 0.
    """
    num_tasks = config.ppo.num_gate_tasks
    progress.phase("what PPO's changes bring", 2 * num_tasks, config.num_windows)
    generator = torch.Generator().manual_seed(stream_seed(seed, GATE_STREAM))
    seeds = torch.randint(2**59, (num_tasks,), generator=generator).tolist()
    scores = [
        run(
            scenario,
            controller,
            seeds,
            config.task,
            final_split="validation",
            on_window=progress.advance,
            journal=journal,
            label=f"gate: {name}",
        ).score
        for name, controller in (("plan", hold_start), ("policy", policy.controller()))
    ]
    gain: dict[str, Any] = interval(scores[1] - scores[0], "difference", np.random.default_rng(seed))
    kept = gain["ci95"][0] > 0
    return (policy if kept else unchanged(policy)), {**gain, "num_tasks": num_tasks, "kept": kept}


def _first_preference(config: ExperimentConfig) -> torch.Tensor:
    """[1, 3]"""
    return torch.tensor([Preference(config.comparison.accuracy_weights[0]).weights()])


def result_of(
    config: ExperimentConfig, tables: dict[str, dict[str, Any]], ppo_gain: dict[str, Any], wall_s: float
) -> dict[str, Any]:
    """`result.json` less the student; its main figures are those of the first accuracy weight."""
    agent_trainings = (config.ppo.num_iterations + 1) * config.ppo.num_students
    first = config.comparison.accuracy_weights[0]
    compared = sum(len(table["methods"]) for table in tables.values()) * config.comparison.num_tasks
    found = config.search.num_trainings + config.planning.num_trainings
    num_trainings = agent_trainings + found + 2 * config.ppo.num_gate_tasks + compared
    return {
        "schema": 1,
        "task": plain(config.task),
        "split": "test",
        "num_tasks": config.comparison.num_tasks,
        "num_seeds": 1,
        "preference": list(Preference(first).weights()),
        **tables[str(first)],
        "preferences": tables,
        "ppo_gain": ppo_gain,
        "cost": {
            "agent_trainings": agent_trainings,
            "search_trainings": config.search.num_trainings,
            "planning_trainings": config.planning.num_trainings,
            "gate_trainings": 2 * config.ppo.num_gate_tasks,
            "wall_s": wall_s,
            "updates_per_s": num_trainings * config.num_windows * config.train.steps_per_window / wall_s,
        },
    }


def replay_config(config: ExperimentConfig) -> ReplayConfig:
    """Of the one student that a `train` run ships."""
    return ReplayConfig(
        task=dataclasses.replace(ReplayConfig().task, dataset=config.task.dataset),
        num_windows=config.num_windows,
        student=config.student,
        train=config.train,
        cost=config.cost,
        preference=Preference(config.comparison.accuracy_weights[0]),
    )


def learn(
    scenarios: Sequence[Scenario],
    static: Shortlist,
    config: ExperimentConfig,
    seed: int,
    folder: Path,
    provenance: dict[str, Any],
    logger: Logger,
    timing: JsonLines,
    journal: Journal,
    progress: Progress,
) -> Policy:
    """PPO with its figures in files and TensorBoard; saves the policy at its end, or as it is on Ctrl-C."""
    metrics = JsonLines(folder / "metrics.jsonl", journal)
    updates_a_training = config.num_windows * config.train.steps_per_window

    def on_rollout(rollout: Rollout, log: Logger) -> None:
        wall_s = journal.elapsed_s() - journal.last_entry_s
        updates_per_s = rollout.num_trainings * updates_a_training / wall_s
        metrics.write({"iteration": rollout.iteration, "num_trainings": rollout.num_trainings, **rollout.figures})
        timing.write({"part": "ppo", "iteration": rollout.iteration, "wall_s": wall_s, "updates_per_s": updates_per_s})
        tb.record_rollout(log, rollout, updates_per_s)
        shown = {
            name: rollout.figures[name] for name in ("score", "accuracy", "latency_ratio") if name in rollout.figures
        }
        progress.figures(**shown, updates_per_s=updates_per_s)

    now: list[Callable[[], Policy]] = []
    progress.phase("PPO", (config.ppo.num_iterations + 1) * config.ppo.num_students, config.num_windows)
    try:
        policy = train(
            scenarios,
            static,
            config.ppo,
            stream_seed(seed, TRAIN_STREAM),
            progress.advance,
            on_rollout,
            logger,
            now.append,
            journal,
        )
    except KeyboardInterrupt:
        if now:
            save_bundle(now[0](), folder / "policy", {**provenance, "interrupted": True})
            progress.say(
                f"stopped; the policy so far is in {folder / 'policy'}: rlkd replay --policy {folder / 'policy'}"
            )
        raise
    save_bundle(policy, folder / "policy", provenance)
    return policy
