"""`rlkd verify`: compute a run's final table again from what the run saved, and say row by row what holds.

A `train` run's table comes again from its policy, config, seed and cost profile, by training the compared students
anew; a `compare` run is done once more; a student is read from its folder and answers the test
samples again. What a clock measured and what only the training itself could tell (rollbacks) is taken as recorded.
"""

import csv
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.agents.policy.bundle import Bundle, load_bundle
from rlkd.agents.policy.bundled import bundled_policies, find_policy
from rlkd.compression import CompactStudent, load_student
from rlkd.configs.schema import CompareConfig, DistilConfig, ExperimentConfig
from rlkd.data import draw_task
from rlkd.envs.action import ControlConfig
from rlkd.envs.reward import score, weighed, worst_score
from rlkd.envs.scenario import Scenario, build_scenario
from rlkd.errors import UserError
from rlkd.io.files import MAX_TENSOR_BYTES, inside, read_bytes, read_json
from rlkd.io.records import plain
from rlkd.runs.compare import compare_methods
from rlkd.runs.folder import Progress
from rlkd.runs.goals import with_goal
from rlkd.runs.resume import with_own_profile
from rlkd.runs.shipped import examples_of
from rlkd.runs.train import compare_on_held_out_tasks, result_of, shipped_scenario

RELATIVE, ABSOLUTE = 1e-5, 1e-8  # what float32 sums in another order may differ by; a changed answer is far above it
CLOCK = ("wall_s", "updates_per_s", "trainings_per_s")
OF_LEARNING = ("evaluations", "shipped_iteration")  # only another training of the policy could tell them
SCORED = ("accuracy", "latency_ratio", "energy_ratio")  # what J is made of


@dataclass(frozen=True)
class Row:
    """One row of a final table, or another figure of a run, beside the same computed again."""

    name: str
    differences: tuple[str, ...]  # each says what was recorded and what came out; none: the row holds


def verify_train(folder: Path, config: ExperimentConfig, seed: int, progress: Progress) -> list[Row]:
    """Compare a `train` run, row by row.

    Args:
        folder: of the run.
        config, seed: as its config.yaml has them.
        progress: called after every window.

    Raises:
        UserError: there is no result, or the config cannot be used.
    """
    recorded = read_result(folder)
    bundle, failed = _load_policy(folder / "policy")
    if bundle is None:
        return failed
    main = with_own_profile(config.envs(config.scenarios)[0], folder)
    scenario = build_scenario(main, bundle.policy.start)
    entries = compare_on_held_out_tasks(scenario, bundle.policy, config, seed, progress)
    computed = plain({**result_of(config, entries, [], 1.0), "policy_sha256": bundle.digest})
    given = {name: value for name, value in recorded.items() if name not in ("student", *OF_LEARNING)}
    for name in OF_LEARNING:
        computed.pop(name)
    student_scenario = replace(shipped_scenario(config, folder), start=bundle.policy.start)
    student_rows = _student_rows(
        folder, student_scenario, seed, recorded=recorded.get("student"), policy_sha256=bundle.digest
    )
    return [*compare_results(given, computed), *student_rows]


def policy_at(place: Path) -> Bundle:
    """Load the policy that a run recorded: the name of one that comes with rlkd, a run folder, or a policy's folder.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    return find_policy(bundled_policies().get(str(place), place))


def verify_compare(
    folder: Path, config: CompareConfig, seed: int, *, progress: Progress, policy: Path | None = None
) -> list[Row]:
    """Compare a `compare` run and its result.csv, row by row; takes as long as the run did.

    Args:
        folder: of the run.
        config, seed: as its config.yaml has them.
        progress: called after every window.
        policy: where its policy is now; by default where the config says.

    Raises:
        UserError: there is no result, or the config or the policy cannot be used.
    """
    recorded = read_result(folder)
    place = policy or (Path(config.policy) if config.policy else None)
    bundle = policy_at(place) if place else None
    blind = policy_at(Path(config.blind)) if config.blind else None
    config = with_own_profile(config, folder)
    with tempfile.TemporaryDirectory() as again:
        computed = compare_methods(config, bundle, Path(again), seed=seed, progress=progress, blind=blind)
        table = read_csv(Path(again))
    return [*compare_results(recorded, plain(computed)), *_csv_rows(read_csv(folder), table)]


def verify_distil(folder: Path, config: DistilConfig, seed: int) -> list[Row]:
    """Compare a `distil` run on a chain: the student answers the test samples again, nothing is trained.

    Raises:
        UserError: there is no result, or the config cannot be used.
    """
    recorded = _replayed(read_result(folder))
    config = with_own_profile(config, folder)
    scenario = build_scenario(config.env(ControlConfig()))
    return _student_rows(folder, with_goal(scenario, config.goal, config.preference), seed, recorded=recorded)


def verify_real_distil(folder: Path, config: Any) -> list[Row]:
    """Compare a `distil` run on a real model: answers of the shipped student on the test samples, and the score.

    Args:
        folder: of the run.
        config: its `rlkd.envs.real_config.RealConfig`; the data must still be where it says.

    Raises:
        UserError: there is no result, or the data cannot be read.
    """
    from rlkd.compression.real.student_folder import load_module_student
    from rlkd.data.examples import TokenExamples
    from rlkd.runs.distil_real import shipped_accuracy, shipped_perplexity  # the extra hf

    recorded = _replayed(read_result(folder))
    try:
        student = load_module_student(folder / "student")
        card = read_json(folder / "student" / "student.json", "a real student's card")
        data = examples_of(student, folder / "student" / "model", config.columns, Path(config.data), card)
    except (UserError, ValueError, AttributeError) as error:
        return [Row("student", (str(error),))]
    if isinstance(data, TokenExamples):
        anchors = config.tokens.anchors(data.num_classes)
        figures = shipped_perplexity(student, data, data.splits["test"], anchors)
    else:
        figures = {"compacted_accuracy": shipped_accuracy(student, data, data.splits["test"])}
    if all(isinstance(recorded.get(name), float) for name in SCORED):
        figures["score"] = _score_again(recorded, config.goal.weights(config.preference))
    return _figure_rows(recorded, figures)


def _score_again(recorded: Mapping[str, Any], weights: Sequence[float]) -> float:
    """J on test from the recorded accuracy, costs and floor."""
    floor = float(recorded.get("floor", 0.0))
    if recorded.get("num_diverged"):
        return float(worst_score(torch.tensor(floor)))
    accuracy, latency, energy = (torch.tensor([float(recorded[name])]) for name in SCORED)
    return float(weighed(accuracy, latency, energy, torch.tensor([list(weights)]), floor=torch.tensor([floor])))


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a finished run.

    Raises:
        UserError: there is none, or a damaged one.
    """
    if not (folder / "result.json").exists():
        raise UserError(f"{folder}: holds no result.json; give the folder of a finished train, compare or distil run")
    return read_json(inside(folder, "result.json"), "a run's result")


def compare_results(recorded: Mapping[str, Any], computed: Mapping[str, Any]) -> list[Row]:
    """Compare two results of the same kind row by row, without measured times; a row may be in one of them only."""
    now, before = (_named_rows(result) for result in (computed, recorded))
    nothing = object()
    rows = []
    for name in [*now, *(name for name in before if name not in now)]:
        a, b = before.get(name, nothing), now.get(name, nothing)
        if a is nothing or b is nothing:
            rows.append(Row(name, ("is not in result.json" if a is nothing else "does not come out again",)))
        else:
            rows.append(Row(name, tuple(differences(a, b))))
    return rows


def differences(recorded: Any, computed: Any, path: str = "") -> list[str]:
    """Return the differences between two JSON trees, each with its place; numbers may differ by rounding."""
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        found = [
            f"{path}{key}: is {'missing' if key in computed else 'unknown'}" for key in set(recorded) ^ set(computed)
        ]
        for key in computed:
            if key in recorded:
                found += differences(recorded[key], computed[key], f"{path}{key}.")
        return sorted(found)
    if isinstance(recorded, list) and isinstance(computed, list) and len(recorded) == len(computed):
        pairs = enumerate(zip(recorded, computed, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{path}{i}.")]
    if _is_number(recorded) and _is_number(computed):
        same = math.isclose(recorded, computed, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    else:
        same = type(recorded) is type(computed) and recorded == computed
    where = f"{path.removesuffix('.')}: " if path else ""
    return [] if same else [f"{where}recorded {recorded!r:.70}, computed again {computed!r:.70}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _named_rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the compared parts of a result by the names that they are reported under."""
    rows: dict[str, Any] = {}
    tables = result.get("goals")
    groups = {f"{t.get('name')}, ": t for t in tables} if isinstance(tables, list) and _are_tables(tables) else {}
    for prefix, table in {"": result, **groups}.items():
        for kind in ("methods", "paired"):
            part = table.get(kind)
            rows |= {f"{prefix}{kind} {name}": row for name, row in part.items()} if isinstance(part, Mapping) else {}
    taken = ("methods", "paired", *(["goals"] if groups else []))
    others = {key: value for key, value in result.items() if key not in taken}
    if isinstance(others.get("cost"), Mapping):
        others["cost"] = {key: value for key, value in others["cost"].items() if key not in CLOCK}
    return rows | others


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(table, Mapping) for table in value)


def _load_policy(folder: Path) -> tuple[Bundle | None, list[Row]]:
    try:
        return load_bundle(folder), []
    except UserError as error:
        return None, [Row("policy", (str(error),))]


def _replayed(result: Mapping[str, Any]) -> dict[str, Any]:
    methods = result.get("methods")
    figures = methods.get("policy") if isinstance(methods, Mapping) else None
    if not isinstance(figures, dict):
        raise UserError("result.json: not the result of a distil run, or a damaged one (methods.policy is missing)")
    return figures


def _student_rows(
    folder: Path, scenario: Scenario, seed: int, *, recorded: Any, policy_sha256: str | None = None
) -> list[Row]:
    """Compare the shipped student's present answers with the run's record and the student's card."""
    if not isinstance(recorded, dict):
        return [Row("student", ("is not in result.json",))]
    try:
        student = load_student(folder / "student")
        card = read_json(inside(folder / "student", "student.json"), "a student's card")
        figures = _student_figures(student, scenario, seed, bool(recorded.get("num_diverged")))
    except UserError as error:
        return [Row("student", (str(error),))]
    named = card.get("figures")
    shown = {key: recorded.get(key) for key in named} if isinstance(named, dict) else None
    rows = [
        *_figure_rows(recorded, figures),
        Row("student's card", tuple(differences(_as_shares(named), _as_shares(shown)))),
    ]
    if policy_sha256 is not None:
        rows.append(Row("student's policy", tuple(differences(card.get("policy_sha256"), policy_sha256))))
    return rows


def _as_shares(figures: Any) -> Any:
    """Figures with true and false as 1 and 0: the share of goals met of one student."""
    if not isinstance(figures, dict):
        return figures
    return {key: float(value) if isinstance(value, bool) else value for key, value in figures.items()}


def _figure_rows(recorded: Mapping[str, Any], figures: Mapping[str, Any]) -> list[Row]:
    return [Row(f"student {name}", tuple(differences(recorded.get(name), v))) for name, v in figures.items()]


@torch.inference_mode()
def _student_figures(student: CompactStudent, scenario: Scenario, seed: int, diverged: bool) -> dict[str, Any]:
    """Compute what `rlkd.runs.distil.distil` reports of a student from its file alone.

    Raises:
        UserError: it is no student of this scenario.
    """
    template, test, data = scenario.template, scenario.data.splits["test"], scenario.data
    if not set(student.exits) <= set(template.exits) or len(student.layers) > len(template.group_sizes) - 1:
        raise UserError(f"student: exits after blocks {list(student.exits)}; the run's config has {template.exits}")
    answers, shares = _answer(student, data.inputs[test])
    rates = torch.zeros(1, len(template.exits))
    for block, share in zip(student.exits, shares, strict=True):
        rates[0, template.exits.index(block)] = share
    kept = list(template.group_sizes)  # blocks behind the last exit in use cost nothing, whatever they keep
    if student.kept_inputs is not None:
        kept[0] = len(student.kept_inputs)
    widths = student.architecture()["widths"]
    kept[1 : len(widths) + 1] = widths
    cost = scenario.profile.cost(template, torch.tensor([kept]), rates, torch.tensor([student.threshold]))
    right = (answers == data.labels[test]).float().mean()
    validation = data.splits["validation"]
    right_before = (_answer(student, data.inputs[validation])[0] == data.labels[validation]).float().mean()
    task = draw_task(seed, scenario.config.task, data, len(scenario.signals.accuracy))
    teacher = scenario.signals.mean_logits(task.teachers, test).argmax(-1)
    floor = scenario.references([task])[:, 1] * task.keep  # [1]
    now = worst_score(floor) if diverged else score(right[None], cost, torch.tensor([task.preference]), floor)
    goal = {"floor": float(floor), "shortfall": max(0.0, float(floor - right))} if task.keep else {}
    return {
        "score": float(now[0]),
        **goal,
        "accuracy": float(right),
        "validation_accuracy": float(right_before),
        "compacted_accuracy": float(right),
        "teacher_agreement": float((answers == teacher).float().mean()),
        "teacher_accuracy": float((teacher == data.labels[test]).float().mean()),
        "exit_rates": [float(rate) for rate in rates[0]],
        "macs": float(cost.macs[0]),
        "macs_ratio": float(cost.macs_ratio[0]),
        "latency_ratio": float(cost.latency_ratio[0]),
        "energy_ratio": float(cost.energy_ratio[0]),
        "energy_j": float(cost.energy_j[0]),
        "energy_kind": scenario.profile.energy["kind"],
    }


def _answer(student: CompactStudent, inputs: Tensor) -> tuple[Tensor, list[float]]:
    """Answers [B] to inputs [B, ...], and the share of samples that left at each of the student's exits."""
    reached = dict.fromkeys(range(len(student.heads)), 0)

    def count(index: int) -> Any:
        return lambda module, given, output: reached.__setitem__(index, len(output))

    hooks = [head.register_forward_hook(count(i)) for i, head in enumerate(student.heads)]
    try:
        answers = student(inputs).argmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    beyond = [*list(reached.values())[1:], 0]
    return answers, [(now - later) / len(inputs) for now, later in zip(reached.values(), beyond, strict=True)]


def read_csv(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Rows of result.csv by goal and method, then by task: texts in the order of the columns."""
    path = inside(folder, "result.csv")
    lines = read_bytes(path, MAX_TENSOR_BYTES).decode("utf-8", errors="replace").splitlines()
    groups: dict[str, dict[str, list[str]]] = {}
    try:
        for goal, method, task, *figures in csv.reader(lines[1:]):
            groups.setdefault(f"result.csv, {goal}, {method}", {})[task] = figures
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: not a table of a compare run, or a damaged one ({error!s:.80})") from error
    return groups


def _csv_rows(recorded: Mapping[str, Mapping[str, Sequence[str]]], computed: Mapping[str, Any]) -> list[Row]:
    numbers = [
        {name: {t: _numbers(f) for t, f in rows.items()} for name, rows in g.items()} for g in (recorded, computed)
    ]
    return compare_results(*numbers)


def _numbers(figures: Sequence[str]) -> list[Any]:
    """Texts of a row as numbers where they are some."""
    row: list[Any] = []
    for figure in figures:
        try:
            row.append(float(figure))
        except ValueError:
            row.append(figure)
    return row
