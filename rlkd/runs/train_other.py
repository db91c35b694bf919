"""`rlkd train --agent.algorithm NAME` for another algorithm than PPO: learn, and compare on the same held-out tasks."""

import dataclasses
from pathlib import Path
from typing import Any, cast

from rlkd.agents.algorithms import train_other
from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.held_out import TRAIN_STREAM, stream_seed
from rlkd.agents.evaluation.report import read_run, write_report
from rlkd.agents.policy.bundle import save_bundle
from rlkd.agents.policy.policy import Policy
from rlkd.agents.policy.sb3 import policy_from_sb3
from rlkd.configs.schema import ExperimentConfig
from rlkd.io.journal import Journal
from rlkd.io.records import JsonLines, plain, write_json
from rlkd.runs.folder import Progress
from rlkd.runs.resume import PROFILE, describe, remember
from rlkd.runs.train import (
    Run,
    agent_trainings,
    built,
    compare_on_held_out_tasks,
    find_start,
    listeners_of,
    mean_windows,
    result_of,
    write_evaluations,
)


def train_other_experiment(config: ExperimentConfig, folder: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """Run the experiment and fill `folder`; returns the content of `result.json`.

    No student is distilled at the end. A policy bundle is written for A2C alone, whose actor has a bundle's form.
    """
    config.check()
    journal = Journal(folder, False, config.keep_checkpoints)
    versions = describe(journal, folder, config, seed, ("sb3-contrib",) if config.agent.needs_contrib else ())
    scenarios = built(config.envs(config.scenarios), PROFILE, folder)
    validation = built(config.envs(config.validation), f"{PROFILE}_validation", folder)
    remember(journal, "train", {})
    provenance = {"seed": seed, "config": plain(config), "versions": versions, "task": plain(config.task)}
    logger, timing = tb.new_logger(folder / "tensorboard"), JsonLines(folder / "timing.jsonl", journal)
    run = Run(config, folder, seed, provenance, logger, timing, journal, progress)
    tb.write_config(logger, config)
    start = find_start(run, scenarios)
    scenarios, validation = ([dataclasses.replace(s, start=start) for s in group] for group in (scenarios, validation))
    progress.phase(config.agent.algorithm, agent_trainings(config), mean_windows(config))
    policy, evaluations = train_other(
        scenarios,
        config.ppo,
        config.agent,
        stream_seed(seed, TRAIN_STREAM),
        listeners=listeners_of(run, []),
        validation=validation,
        logger=logger,
    )
    if evaluations:
        write_evaluations(evaluations, config, folder / "evaluations.npz")
    # comparisons read what `AgentPolicy` has: a controller, the start, the ranges of the controls
    entries = compare_on_held_out_tasks(scenarios[0], cast(Policy, policy), config, seed, progress, run.options)
    result = result_of(config, entries, evaluations, journal.elapsed_s()) | {"algorithm": config.agent.algorithm}
    result["shipped_iteration"] = config.ppo.num_iterations
    if config.agent.ships:
        result["policy_sha256"] = save_bundle(policy_from_sb3(policy.agent), folder / "policy", provenance)  # type: ignore[arg-type]
    write_json(folder / "result.json", result)
    tb.write_outcome(logger, config, seed, result)
    logger.close()
    write_report([read_run(folder)], folder)
    journal.finish()
    return result
