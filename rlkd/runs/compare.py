"""`rlkd compare`: the same held-out tasks under several controllers, paired, into one run folder."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from rlkd.agents.baselines.methods import Request, num_trainings, total_trainings
from rlkd.agents.baselines.search import search_plans
from rlkd.agents.evaluation.comparison import compare, csv_rows
from rlkd.agents.evaluation.front import compare_fronts
from rlkd.agents.evaluation.held_out import METHOD_STREAM, SEARCH_STREAM, held_out_seeds, run_methods, stream_seed
from rlkd.agents.policy.bundle import Bundle
from rlkd.configs.schema import CompareConfig
from rlkd.cost import save_profile
from rlkd.envs.scenario import build_scenario
from rlkd.io.files import write_whole
from rlkd.io.journal import Journal
from rlkd.io.records import plain, write_json
from rlkd.runs.folder import Progress
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile


def compare_methods(
    config: CompareConfig,
    bundle: Bundle | None,
    folder: Path,
    seed: int,
    progress: Progress,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Run the comparison and fill `folder` with `result.json` and `result.csv`; returns the content of the first.

    Args:
        config: tasks, methods, preferences and, without a policy, the search.
        bundle: the policy; its control ranges, start and static settings replace the config's and the search's.
        folder: an empty run folder.
        seed: of the first set of tasks; the others follow.
        progress: told of every window.
        journal: of a run of the same config and seed that was stopped; this one goes on from what that had finished,
            and ends as if it had not been stopped.
    """
    journal = journal or Journal(folder, say=progress.say)
    if bundle is not None:
        config = dataclasses.replace(config, controls=bundle.policy.controls)
    config.check()
    names, weights, num_tasks = config.method_names(), config.comparison.accuracy_weights, config.comparison.num_tasks
    describe(journal, folder, config, seed, progress.say)
    plan = bundle.policy.plan if bundle else None
    scenario = build_scenario(with_own_profile(config, folder), plan, progress.say)
    save_profile(scenario.profile, folder / f"{PROFILE}.json")
    digest = bundle.digest if bundle else None
    remember(journal, "compare", scenario.tensors(), costs=plain(scenario.profile), policy=digest)
    if bundle is None:
        progress.phase("static search", config.search.num_trainings, config.num_windows)
        generator = torch.Generator().manual_seed(stream_seed(seed, SEARCH_STREAM))
        static = search_plans([scenario], config.search, generator, progress.advance, journal=journal)
    else:
        static = bundle.policy.static

    seeds = [s for k in range(config.num_seeds) for s in held_out_seeds(seed + k, num_tasks)]
    policy, method_seed = bundle.policy if bundle else None, stream_seed(seed, METHOD_STREAM)
    request = Request(
        scenario,
        config.task,
        tuple(seeds),
        static,
        policy,
        config.search,
        method_seed,
        progress.advance,
        journal=journal,
    )
    trained = len(weights) * total_trainings(names, len(seeds))
    trained += config.search.num_trainings * len({"linear", "cosine"} & set(names))
    progress.phase("comparison", trained, config.num_windows)
    tables = run_methods(names, request, weights, config.tune_exit)
    spent = {name: float(num_trainings(name)) for name in names}
    per_preference = {str(w): compare(table, spent, seed) for w, table in tables.items()}
    rows = csv_rows({str(w): table for w, table in tables.items()}, seeds)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "result.csv", file.getvalue())
    front = None
    if config.front_trials:
        progress.phase("fronts", (2 * len(config.front_weights) + config.front_trials) * len(seeds), config.num_windows)
        front = compare_fronts(request, config.front_weights, config.front_trials)
    wall_s = journal.elapsed_s()
    result = {
        "schema": 1,
        "task": plain(config.task),
        "student": plain(config.student),
        "split": "test",
        "num_tasks": num_tasks,
        "num_seeds": config.num_seeds,
        **per_preference[str(weights[0])],
        "preferences": per_preference,
        "front": front,
        "policy_sha256": digest,
        "cost": {
            "agent_trainings": 0,
            "wall_s": wall_s,
            "updates_per_s": trained * config.num_windows * config.train.steps_per_window / wall_s,
        },
    }
    write_json(folder / "result.json", result)
    journal.finish()
    return result
