"""`rlkd compare`: the same held-out tasks under several controllers, paired, into one run folder."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from rlkd.agents.baselines.methods import METHODS, Request, total_trainings
from rlkd.agents.evaluation.comparison import compare, csv_rows
from rlkd.agents.evaluation.front import compare_fronts
from rlkd.agents.evaluation.held_out import METHOD_STREAM, asked_goals, held_out_seeds, run_methods, stream_seed
from rlkd.agents.policy.bundle import Bundle
from rlkd.configs.schema import CompareConfig
from rlkd.cost import save_profile
from rlkd.envs.scenario import build_scenario
from rlkd.errors import UserError
from rlkd.io.files import write_whole
from rlkd.io.journal import Journal
from rlkd.io.records import plain, write_json
from rlkd.runs.folder import Progress
from rlkd.runs.resume import PROFILE, describe, remember, with_own_profile
from rlkd.workers import IN_PROCESS, Workers


def compare_methods(
    config: CompareConfig,
    bundle: Bundle | None,
    folder: Path,
    *,
    seed: int,
    progress: Progress,
    journal: Journal | None = None,
    blind: Bundle | None = None,
    workers: Workers = IN_PROCESS,
) -> dict[str, Any]:
    """Run the comparison and fill `folder` with `result.json` and `result.csv`; returns the content of the first.

    Args:
        config: tasks, methods, goals and the search.
        bundle: the policy; its control ranges and start replace the config's.
        folder: an empty run folder.
        seed: of the first set of tasks; the others follow.
        progress: called after every window.
        journal: of a run of the same config and seed that was stopped; this one goes on from what that had finished,
            and ends as if it had not been stopped.
        blind: the policy of method `blind`.
        workers: do the trainings that are independent of each other.

    Raises:
        UserError: the two policies have other ranges of controls.
    """
    journal = journal or Journal(folder)
    given = [b for b in (bundle, blind) if b]
    if given:
        config = dataclasses.replace(config, controls=given[0].policy.controls)
        if any(b.policy.controls != config.controls for b in given):
            raise UserError("--blind: got a policy with other ranges of controls than that of --policy; give one alike")
    config.check()
    names, num_tasks = config.method_names(), config.comparison.num_tasks
    describe(journal, folder, config, seed)
    start = bundle.policy.start if bundle else None
    scenario = build_scenario(with_own_profile(config, folder), start)
    save_profile(scenario.profile, folder / f"{PROFILE}.json")
    digest, blind_digest = (b.digest if b else None for b in (bundle, blind))
    remember(journal, "compare", scenario.tensors(), costs=plain(scenario.profile), policy=digest, blind=blind_digest)

    goals = asked_goals(config.task, config.comparison.keeps, config.comparison.accuracy_weights)
    seeds = [s for k in range(config.num_seeds) for s in held_out_seeds(seed + k, num_tasks)]
    request = Request(
        scenario,
        config.task,
        tuple(seeds),
        config.search,
        stream_seed(seed, METHOD_STREAM),
        progress.advance,
        policy=bundle.policy if bundle else None,
        blind=blind.policy if blind else None,
        guard=config.guard,
        journal=journal,
        num_parallel=config.chunk_students,
        workers=workers,
    )
    trained = len(goals) * total_trainings(names, len(seeds), config.search)
    progress.phase("comparison", trained, config.num_windows)
    tables = run_methods(names, request, goals, config.tune_exit)
    spent = {name: float(METHODS[name].trainings_per_task) for name in names}
    entries = [
        {"name": goal.name, "goal": goal.description, **compare(tables[goal.name], spent, seed)} for goal in goals
    ]
    _write_csv(folder / "result.csv", csv_rows(tables, seeds))
    front = None
    if config.front_trials:
        progress.phase("fronts", (len(config.front_weights) + config.front_trials) * len(seeds), config.num_windows)
        front = compare_fronts(request, config.front_weights, config.front_trials)
    wall_s = journal.elapsed_s()
    result = {
        "schema": 2,
        "task": plain(config.task),
        "student": plain(config.student),
        "split": "test",
        "num_tasks": num_tasks,
        "num_seeds": config.num_seeds,
        **{key: value for key, value in entries[0].items() if key != "name"},
        "goals": entries,
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


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue())
