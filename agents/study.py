"""`rlkd compare`: the same held-out tasks under several controllers, paired, into one run folder."""

import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from rlkd.agents.bundle import Bundle
from rlkd.agents.comparison import compare, csv_rows
from rlkd.agents.experiment import SEARCH_STREAM, TRAIN_STREAM, compare_preferences, held_out_seeds, stream_seed
from rlkd.agents.methods import NEED_POLICY, NUM_ABLATION_TASKS, build_methods
from rlkd.agents.runs import Progress, describe_run, plain, write_json
from rlkd.agents.search import search_static
from rlkd.configs.schema import CompareConfig
from rlkd.cost import save_profile
from rlkd.envs.world import build_world


def compare_methods(
    config: CompareConfig,
    bundle: Bundle | None,
    names: list[str],
    num_seeds: int,
    folder: Path,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Run the comparison and fill `folder` with `result.json` and `result.csv`; returns the content of the first.

    Args:
        config: tasks, preferences and, without a policy, the search.
        bundle: the policy; its control ranges, start and static settings replace the config's and the search's.
        names: methods, the first being what the others are paired with unless `policy` is among them.
        num_seeds: sets of `comparison.num_tasks` fresh tasks.
        folder: an empty run folder.
        seed: of the first set; the others follow.
        progress: told of every window.
    """
    began = time.perf_counter()
    if bundle is not None:
        config = dataclasses.replace(config, controls=bundle.policy.controls)
    config.check()
    describe_run(folder, config, seed)
    world = build_world(config, bundle.policy.start if bundle else None, progress.say)
    save_profile(world.profile, folder / "cost_profile.json")
    static = bundle.policy.static if bundle else None
    if static is None and "static" in names:
        progress.phase("static search", config.search.num_trainings, config.num_windows)
        generator = torch.Generator().manual_seed(stream_seed(seed, SEARCH_STREAM))
        static = search_static(world, config.search, generator, progress.advance)
    blind = [name for name in names if name in NEED_POLICY and name != "policy"]
    if blind:
        progress.phase("the policy's mean behaviour", len(blind) * NUM_ABLATION_TASKS, config.num_windows)
    policy = bundle.policy if bundle else None
    methods = build_methods(names, world, policy, static, stream_seed(seed, TRAIN_STREAM), progress.advance)

    weights = config.comparison.accuracy_weights
    seeds = [s for k in range(num_seeds) for s in held_out_seeds(seed + k, config.comparison.num_tasks)]
    progress.phase("comparison", len(methods) * len(weights) * len(seeds), config.num_windows)
    tables = compare_preferences(world, methods, seeds, weights, progress.advance)
    per_preference = {str(w): compare(table, dict.fromkeys(methods, 1.0), seed) for w, table in tables.items()}
    with (folder / "result.csv").open("w", newline="") as file:
        rows = csv_rows({str(w): table for w, table in tables.items()}, seeds)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    wall_s = time.perf_counter() - began
    updates = len(methods) * len(weights) * len(seeds) * config.num_windows * config.train.steps_per_window
    result = {
        "schema": 1,
        "task": plain(config.task),
        "split": "test",
        "num_tasks": config.comparison.num_tasks,
        "num_seeds": num_seeds,
        **per_preference[str(weights[0])],
        "preferences": per_preference,
        "policy_sha256": bundle.digest if bundle else None,
        "cost": {"agent_trainings": 0, "wall_s": wall_s, "updates_per_s": updates / wall_s},
    }
    write_json(folder / "result.json", result)
    return result
