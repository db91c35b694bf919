"""`rlkd train` from one end to the other: find a start, learn a policy, compare it, write the run folder."""

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from rlkd.agents.baselines.methods import Request, total_trainings
from rlkd.agents.baselines.search import search_setting
from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.comparison import compare
from rlkd.agents.evaluation.held_out import (
    METHOD_STREAM,
    SEARCH_STREAM,
    TRAIN_STREAM,
    asked_goals,
    held_out_seeds,
    run_methods,
    stream_seed,
)
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.policy.bundle import save_bundle
from rlkd.agents.policy.controllers import DEFAULT_OPTIONS, RunOptions
from rlkd.agents.policy.policy import Policy
from rlkd.agents.ppo.evaluation import Evaluation
from rlkd.agents.ppo.train import Listeners, Rollout, train
from rlkd.configs.schema import DistilConfig, ExperimentConfig
from rlkd.cost import save_profile
from rlkd.data import Goal, Preference
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.io.files import write_whole
from rlkd.io.journal import Journal
from rlkd.io.records import JsonLines, plain, write_json
from rlkd.runs.distil import Distilled, distil, write_student
from rlkd.runs.folder import Progress
from rlkd.runs.goals import with_goal
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile
from rlkd.workers import IN_PROCESS, Workers

logger = logging.getLogger(__name__)

NUM_DRAWN = 32  # tasks in the figure of the controls
COMPARED = ("policy", "open_loop", "start", "dense", "constant", "nncf")


@dataclass(frozen=True)
class Run:
    """What the parts of an experiment share."""

    config: ExperimentConfig
    folder: Path
    seed: int
    provenance: dict[str, Any]  # of the policy's bundle
    logger: Logger
    timing: JsonLines
    journal: Journal
    progress: Progress
    workers: Workers = IN_PROCESS

    @property
    def options(self) -> RunOptions:
        """Return the options of every training."""
        return RunOptions(
            on_window=self.progress.advance,
            journal=self.journal,
            num_parallel=self.config.chunk_students,
            workers=self.workers,
        )

    def generator(self, stream: int) -> torch.Generator:
        """Return the random generator of one part."""
        return torch.Generator().manual_seed(stream_seed(self.seed, stream))


def train_experiment(
    config: ExperimentConfig,
    folder: Path,
    seed: int,
    progress: Progress,
    journal: Journal | None = None,
    workers: Workers = IN_PROCESS,
) -> dict[str, Any]:
    """Run the experiment and fill `folder`; returns the content of `result.json`.

    The policy is on disk as soon as it is learned; a KeyboardInterrupt during PPO saves it as far as it got,
    before it goes on to the caller. With the `journal` of a run of the same config and seed that was stopped it goes
    on from what that had finished, and ends as if it had not been stopped.
    """
    config.check()
    journal = journal or Journal(folder, False, config.keep_checkpoints)
    versions = describe(journal, folder, config, seed)
    scenarios = built(config.envs(config.scenarios), PROFILE, folder)
    validation = built(config.envs(config.validation), f"{PROFILE}_validation", folder)
    found = {
        f"{name} {i}": tensor
        for i, scenario in enumerate((*scenarios, *validation))
        for name, tensor in scenario.tensors().items()
    }
    # what the last phase needs is made now: a config that it cannot use fails here, and not after all trainings
    shipped = shipped_scenario(config, folder)
    remember(journal, "train", found, costs=[plain(scenario.profile) for scenario in (*scenarios, *validation)])
    run = Run(
        config=config,
        folder=folder,
        seed=seed,
        provenance={"seed": seed, "config": plain(config), "versions": versions, "task": plain(config.task)},
        logger=tb.new_logger(folder / "tensorboard"),
        timing=JsonLines(folder / "timing.jsonl", journal),
        journal=journal,
        progress=progress,
        workers=workers,
    )
    if not journal.replaying:
        tb.write_config(run.logger, config)

    start = find_start(run, scenarios)
    scenarios, validation = ([dataclasses.replace(s, start=start) for s in group] for group in (scenarios, validation))
    policies: list[Callable[[], Policy]] = []  # gives the policy as it is, once there is an agent
    progress.phase("PPO", agent_trainings(config), mean_windows(config))
    with saved_at_interrupt(run, policies):
        learned = train(
            scenarios,
            config.ppo,
            stream_seed(seed, TRAIN_STREAM),
            listeners=listeners_of(run, policies),
            validation=validation,
            logger=run.logger,
            options=run.options,
        )
    save_bundle(learned.policy, folder / "policy", run.provenance)
    if learned.evaluations:
        write_evaluations(learned.evaluations, config, folder / "evaluations.npz")
    entries = compare_on_held_out_tasks(scenarios[0], learned.policy, config, seed, progress, run.options)
    wall_s = journal.elapsed_s()
    result = result_of(config, entries, learned.evaluations, wall_s)
    write_json(folder / "result.json", result)  # stays, should the last phase fail

    progress.phase("one clean student under the policy", 1, config.scenarios[0].num_windows)
    student = distil_once(config, shipped, learned.policy, seed=seed, progress=progress, folder=folder)
    scores = {f"{e['name']}: {name}": row for e in entries for name, row in e["paired"].items()}
    digest = save_bundle(learned.policy, folder / "policy", {**run.provenance, "scores": scores})
    shipping = distil_config(config)
    write_student(folder / "student", student, shipping.goal.weights(shipping.preference), digest)
    result |= {"policy_sha256": digest, "student": {**student.figures, "measured": student.measured}}
    write_json(folder / "result.json", result)

    seeds = held_out_seeds(seed, config.comparison.num_tasks)
    tb.write_controls(run.logger, scenarios[0], learned.policy.controller(), seeds[:NUM_DRAWN])
    tb.write_outcome(run.logger, config, seed, result)
    run.logger.close()
    write_report([read_run(folder)], folder)
    run.timing.write({"part": "total", "wall_s": wall_s})
    journal.finish()
    return result


def built(configs: Sequence[EnvConfig], name: str, folder: Path) -> list[Scenario]:
    """Build scenarios with the cost profiles that the run has written; write missing profiles now."""
    scenarios = []
    for index, config in enumerate(configs):
        own = f"{name}{f'_{index}' if index else ''}"
        scenario = build_scenario(with_own_profile(config, folder, own))
        save_profile(scenario.profile, folder / f"{own}.json")
        scenarios.append(scenario)
    return scenarios


def find_start(run: Run, scenarios: Sequence[Scenario]) -> torch.Tensor:
    """[12], the best constant setting over the tasks that the policy will be trained on."""
    search = run.config.search
    run.progress.phase("best constant setting", search.num_trainings, mean_windows(run.config))
    start = search_setting(scenarios, search, run.generator(SEARCH_STREAM), options=run.options)
    run.timing.write({"part": "search", "wall_s": run.journal.elapsed_s()})
    return start


def listeners_of(run: Run, policies: list[Callable[[], Policy]]) -> Listeners:
    """Return functions that write metrics of PPO into files and TensorBoard; the agent's policy joins `policies`."""
    config, journal, progress = run.config, run.journal, run.progress
    metrics, evaluations = (JsonLines(run.folder / f"{name}.jsonl", journal) for name in ("metrics", "evaluations"))
    steps = sum(s.num_windows * s.train.steps_per_window for s in config.scenarios) * config.ppo.num_students
    num_steps = sum(s.num_windows for s in config.scenarios) * config.ppo.num_students  # of a rollout
    began = journal.last_entry_s

    def on_rollout(rollout: Rollout, log: Logger) -> None:
        wall_s = journal.elapsed_s() - began
        updates_per_s = rollout.iteration * steps / max(wall_s, 1e-9)
        metrics.write({"iteration": rollout.iteration, "num_trainings": rollout.num_trainings, **rollout.figures})
        run.timing.write(
            {"part": "ppo", "iteration": rollout.iteration, "wall_s": wall_s, "updates_per_s": updates_per_s}
        )
        tb.record_rollout(log, rollout, updates_per_s)
        shown = {
            name: rollout.figures[name] for name in ("score", "goal_met", "latency_ratio") if name in rollout.figures
        }
        progress.figures(**shown, updates_per_s=updates_per_s)

    def on_evaluation(evaluation: Evaluation) -> None:
        evaluations.write(asdict(evaluation))
        tb.record_evaluation(run.logger, evaluation, evaluation.iteration * num_steps)

    def on_best(policy: Policy) -> None:
        save_bundle(policy, run.folder / "best_model", run.provenance)

    return Listeners(progress.advance, on_rollout, on_evaluation, policies.append, on_best)


def write_evaluations(evaluations: Sequence[Evaluation], config: ExperimentConfig, path: Path) -> None:
    """Write `evaluations.npz` with the arrays of stable-baselines3's `EvalCallback`; `results` are mean returns."""
    num_windows = sum(s.num_windows for s in config.scenarios)
    timesteps = np.array([e.iteration * num_windows * config.ppo.num_students for e in evaluations], dtype=np.int64)
    returns = np.array([[e.mean_reward] for e in evaluations])  # [evaluations, 1]
    lengths = np.full(returns.shape, round(np.mean([s.num_windows for s in config.validation])), dtype=np.int64)
    content = io.BytesIO()
    np.savez(content, timesteps=timesteps, results=returns, ep_lengths=lengths)
    write_whole(path, content.getvalue())


@contextmanager
def saved_at_interrupt(run: Run, policies: Sequence[Callable[[], Policy]]) -> Iterator[None]:
    """Save the last of `policies` as it is when Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        folder = run.folder / "policy"
        if policies:
            save_bundle(policies[-1](), folder, {**run.provenance, "interrupted": True})
            logger.warning(f"stopped; the policy so far is in {folder}: rlkd distil --policy {folder}")
        raise


def compare_on_held_out_tasks(
    scenario: Scenario,
    policy: Policy,
    config: ExperimentConfig,
    seed: int,
    progress: Progress,
    options: RunOptions = DEFAULT_OPTIONS,
) -> list[dict[str, Any]]:
    """One entry a goal, with `goal`, `methods` and `paired`, on test data of the first scenario.

    The journal and the workers are those of `options`.
    """
    num_tasks = config.comparison.num_tasks
    goals = asked_goals(scenario.config.task, config.comparison.keeps, config.comparison.accuracy_weights)
    seeds = tuple(held_out_seeds(seed, num_tasks))
    request = Request(
        scenario,
        scenario.config.task,
        seeds,
        config.search,
        stream_seed(seed, METHOD_STREAM),
        progress.advance,
        policy=policy,
        journal=options.journal,
        num_parallel=config.chunk_students,
        workers=options.workers,
    )
    trained = len(goals) * total_trainings(COMPARED, num_tasks, config.search)
    progress.phase("comparison on held-out tasks", trained, scenario.config.num_windows)
    tables = run_methods(COMPARED, request, goals)
    spent = dict.fromkeys(COMPARED, 1.0)
    return [{"name": goal.name, "goal": goal.description, **compare(tables[goal.name], spent, seed)} for goal in goals]


def result_of(
    config: ExperimentConfig, entries: Sequence[dict[str, Any]], evaluations: Sequence[Evaluation], wall_s: float
) -> dict[str, Any]:
    """`result.json` less the student; its main entry is that of the first goal."""
    best = max(evaluations, key=lambda evaluation: evaluation.score, default=None)
    found = config.search.num_trainings
    num_goals, num_tasks = len(entries), config.comparison.num_tasks
    compared = num_goals * total_trainings(COMPARED, num_tasks, config.search)
    agent = agent_trainings(config)
    return {
        "schema": 2,
        "task": plain(config.task),
        "split": "test",
        "num_tasks": num_tasks,
        "num_seeds": 1,
        **entries[0],
        "goals": list(entries),
        "evaluations": [asdict(evaluation) for evaluation in evaluations],
        "shipped_iteration": best.iteration if best else config.ppo.num_iterations,
        "cost": {
            "agent_trainings": agent,
            "search_trainings": found,
            "comparison_trainings": compared,
            "wall_s": wall_s,
            "trainings_per_s": (agent + found + compared) / wall_s,
        },
    }


def agent_trainings(config: ExperimentConfig) -> int:
    """Student trainings of PPO: observations to standardise by, rollouts, and evaluations."""
    ppo, num_scenarios = config.ppo, len(config.scenarios)
    rollouts = ppo.num_iterations * ppo.num_students * num_scenarios
    evaluations = len(ppo.evaluated()) * ppo.num_evaluation_tasks * len(config.validation)
    return ppo.num_observed * num_scenarios + rollouts + evaluations


def mean_windows(config: ExperimentConfig) -> int:
    """Windows of an episode, in the mean over the scenarios of training."""
    return round(sum(scenario.num_windows for scenario in config.scenarios) / len(config.scenarios))


def shipped_goal(config: ExperimentConfig) -> Goal:
    """Return the goal of the student that a `train` run ships: the first one that is compared."""
    if not config.comparison.keeps:
        return Goal()
    return Goal(keep=config.comparison.keeps[0], reference=config.task.reference)


def distil_config(config: ExperimentConfig) -> DistilConfig:
    """Of the one student that a `train` run ships: the first scenario, clean labels, the best teacher."""
    main, default = config.scenarios[0], DistilConfig()
    weights = config.comparison.accuracy_weights
    return dataclasses.replace(
        default,
        task=dataclasses.replace(default.task, dataset=main.dataset),
        num_windows=main.num_windows,
        student=main.student,
        train=main.train,
        cost=main.cost,
        goal=shipped_goal(config),
        preference=Preference(weights[0]) if weights and not config.comparison.keeps else default.preference,
    )


def shipped_scenario(config: ExperimentConfig, folder: Path) -> Scenario:
    """Build the scenario of the one student that a `train` run ships, under the run's own cost profile."""
    own = with_own_profile(distil_config(config), folder)
    return with_goal(build_scenario(own.env(config.controls)), own.goal, own.preference)


def distil_once(
    config: ExperimentConfig,
    scenario: Scenario,
    policy: Policy,
    *,
    seed: int,
    progress: Progress,
    folder: Path | None = None,
) -> Distilled:
    """Do what `rlkd distil` does; with a run's `folder`, write the windows to its `windows.jsonl`."""
    scenario, guard = dataclasses.replace(scenario, start=policy.start), distil_config(config).guard
    rows: list[dict[str, float]] = []

    def on_window(row: dict[str, float], observation: torch.Tensor) -> None:
        rows.append(row)
        progress.advance(1)

    done = distil(scenario, policy.controller(), seed, on_window, guard=guard)
    if folder is not None:
        write_whole(folder / "windows.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return done
