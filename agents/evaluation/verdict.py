"""Say in words and tables what a run asked for, what it reached, what the policy did, and where the student is weak.

Everything is read from `result.json` and the rows of the windows; a run that lacks an entry gets one sentence less.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlkd.envs.guard import NO_WINDOW, UNTOUCHED
from rlkd.io.files import number

Rows = Sequence[Mapping[str, Any]]
WEIGHTS = ("weight_hard_label", "weight_response", "weight_feature", "weight_attention")
TEACHING = WEIGHTS[1:]  # losses that need the teacher
MOVED = 0.05  # a control that moves less than this share of its largest value is called constant
WORST = 3  # classes that are named
APART = 2.0  # measured and predicted latency ratios that differ by more contradict each other
BEHIND = 0.05  # accuracy below the mean that makes a class weak


def wilson(accuracy: float, num_samples: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson 1927 for an accuracy over `num_samples` samples."""
    z, n = 1.959964, num_samples
    middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), 1.0 if accuracy == 1.0 else middle + half


def student_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the one student that a run shipped; empty where it shipped none."""
    if "student" in result:
        found: Mapping[str, Any] = result["student"]
    else:
        found = {**result["methods"].get("policy", {}), "measured": result.get("measured", {})}
    return found if "validation_accuracy" in found and found.get("measured") else {}


def timed(student: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the measured row at the batch size that the reward read."""
    measured = student["measured"]
    row: Mapping[str, Any] = measured[f"batch_{measured['profile_batch']}"]
    return row


def verdict(result: Mapping[str, Any]) -> str:
    """Return one paragraph: what was learned, by how much it leads, and which student came out."""
    sentences = []
    if "goals" in result and "evaluations" in result:
        sentences += _of_learning(result)
    elif "goals" in result:
        sentences.append(f"{len(result['goals'])} goals were compared on {result['num_tasks']} tasks each.")
    student = student_of(result)
    if student:
        sentences += _of_student(student)
    return " ".join(sentences)


def _of_learning(result: Mapping[str, Any]) -> list[str]:
    name = str(result.get("algorithm", "ppo")).upper().replace("_", " ")
    told = [f"{name} learned a policy from {result['cost'].get('agent_trainings', 0):,} student trainings."]
    scores = [number(e["score"], "score", -1e9, 1e9) for e in result["evaluations"]]
    if len(scores) > 1:
        best = max(scores)
        told.append(
            f"On the validation scenarios J rose from {scores[0]:.3f} before learning to {best:.3f}; iteration "
            f"{result['shipped_iteration']} ships."
            if best > scores[0]
            else f"On the validation scenarios J did not rise above the {scores[0]:.3f} of the start."
        )
    entry = result["goals"][0]
    leads = {k.split("-", 1)[1]: row for k, row in entry["paired"].items() if k.startswith("policy-")}
    chosen = next((k for k in ("nncf", "constant", "dense") if k in leads), next(iter(leads), None))
    if chosen:
        row = leads[chosen]
        low, high = row["ci95"]
        sure = "leads" if low > 0 else "trails" if high < 0 else ""
        relation = f"it {sure} {chosen}" if sure else f"it and {chosen} cannot be told apart"
        told.append(
            f"Under the goal {entry['name']!r}, {relation} on {result['num_tasks']} held-out tasks: the difference is "
            f"{row['difference']:+.4f} J (95 % interval {low:+.4f} to {high:+.4f})."
        )
    met = entry["methods"].get("policy", {}).get("goal_met_within_1_point")
    if met is not None:
        told.append(f"It meets {met:.0%} of these goals within one point of accuracy.")
    return told


def _of_student(student: Mapping[str, Any]) -> list[str]:
    row = timed(student)
    accuracy = number(student["accuracy"], "accuracy", 0.0, 1.0)
    met = student.get("goal_met")
    words = "has no floor to meet" if met is None else "meets its goal" if met else "misses its goal"
    if "floor" in student:
        words += f" (accuracy {accuracy:.4f} on test data, floor {student['floor']:.4f})"
    else:
        words += f" (accuracy {accuracy:.4f} on test data)"
    told = [f"The student that came out {words}, with {student['macs_ratio']:.0%} of the dense student's MACs."]
    told.append(f"Measured at batch {row['batch_size']}, it is {_times(row['speedup'])} the dense student")
    if "speedup_over_teacher" in row:
        told[-1] += f" and {_times(row['speedup_over_teacher'])} the teacher"
    told[-1] += "."
    return told


def _times(speedup: float) -> str:
    return f"{speedup:.2f} times as fast as" if speedup >= 1 else f"{1 / speedup:.2f} times slower than"


def asked_and_reached(result: Mapping[str, Any]) -> list[list[str]]:
    """Return rows (figure, asked, student, dense student, teacher) on test data; empty where no student shipped."""
    student = student_of(result)
    if not student:
        return []
    row = timed(student)
    dense = result["methods"].get("dense", {}) if "student" not in result else {}
    count = student.get("num_test_samples")

    def accuracy(value: Any) -> str:
        if value is None:
            return ""
        interval = "" if not count else " [{:.4f}, {:.4f}]".format(*wilson(float(value), int(count)))
        return f"{float(value):.4f}{interval}"

    limits = student.get("limits", {})

    def limit(name: str) -> str:
        return f"at most {limits[name]:.3g} of dense" if name in limits else ""

    def cost(name: str, ratio: str, unit: str, scale: float = 1.0) -> list[str]:
        own, share = float(student[name]) * scale, float(student[ratio])
        return [f"{_short(own)}{unit} ({share:.1%} of dense)", f"{_short(own / share)}{unit}" if share > 0 else ""]

    joules, per_joule = ("nJ", 1e9) if float(student["energy_j"]) < 1e-7 else ("uJ", 1e6)
    floor = f"at least {student['floor']:.4f}" if "floor" in student else ""
    batch = f"latency of a batch of {row['batch_size']}"
    dense_accuracy = accuracy(dense["accuracy"]) if "accuracy" in dense else "not trained"
    rows = [
        ["accuracy [95 %]", floor, accuracy(student["accuracy"]), dense_accuracy],
        [batch, limit("latency"), _time(row["latency_s"]), _time(row["dense_latency_s"])],
        ["parameters", limit("size"), *cost("parameters", "size_ratio", "")],
        ["MACs of a sample", limit("macs"), *cost("macs", "macs_ratio", "")],
        [
            f"energy of a sample ({student.get('energy_kind', 'modelled')})",
            limit("energy"),
            *cost("energy_j", "energy_ratio", f" {joules}", per_joule),
        ],
    ]
    teacher = [accuracy(student.get("teacher_accuracy")), "", "", "", ""]
    if "teacher_latency_s" in row:
        teacher[1] = _time(row["teacher_latency_s"])
    for place, name, unit, scale in (
        (2, "parameters_of_teacher", "", 1.0),
        (3, "macs_of_teacher", "", 1.0),
        (4, "energy_of_teacher_j", f" {joules}", per_joule),
    ):
        if name in student:
            teacher[place] = f"{_short(number(student[name], name, 0.0, 1e18) * scale)}{unit}"
    return [[*cells, last] for cells, last in zip(rows, teacher, strict=True)]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def what_the_policy_did(windows: Rows, best_window: int = NO_WINDOW) -> list[str]:
    """Return sentences about the controls over the windows of one student's training.

    Args:
        windows: one row each.
        best_window: the one that ships, counted from 1; UNTOUCHED: the student before the first; otherwise not said.
    """
    if not windows:
        return []
    first, last = windows[0], windows[-1]
    told = []
    if 0 < best_window < len(windows) and "unit_keep" in first:
        row = windows[best_window - 1]
        told.append(
            f"Window {best_window} of {len(windows)} ships, because the later ones did worse on validation: "
            f"{float(row['unit_keep']):.0%} of the units, {float(row['feature_keep']):.0%} of the inputs; "
            f"{float(row.get('first_exit_rate', 0)):.0%} of the samples leave at the first exit."
        )
    if best_window == UNTOUCHED:
        text = "The student ships as it was before the first window, because every window did worse on validation."
        told.append(text)
    weights = [sum(float(row[name]) for name in TEACHING) for row in windows if WEIGHTS[1] in row]
    if weights:
        told.append(
            f"Weight on what the teacher says: {_course(weights, '{:.3g}')} (1 - this is the weight on the labels)."
        )
    for name, what, form in (
        ("feature_keep", "Share of the inputs kept", "{:.0%}"),
        ("unit_keep", "Share of the units kept", "{:.0%}"),
        ("temperature", "Temperature of the teacher's answers", "{:.3g}"),
        ("step_size", "Learning rate", "{:.2g}"),
    ):
        if name in first:
            told.append(f"{what}: {_course([float(row[name]) for row in windows], form)}.")
    if "first_exit_rate" in last:
        rate = float(last["first_exit_rate"])
        told.append(
            "After the last window no sample leaves early."
            if rate == 0
            else "After the last window all samples leave at the first exit."
            if rate == 1
            else f"After the last window {rate:.0%} of the validation samples leave at the first exit."
        )
    below = [int(row["window"]) for row in windows if float(row.get("floor", 0)) > float(row.get("accuracy", 1))]
    if below:
        told.append(
            f"Validation accuracy was below the floor after {len(below)} of {len(windows)} windows, last {below[-1]}."
        )
    return told


def _course(values: Sequence[float], form: str) -> str:
    """Say how a control moved over the windows."""
    first, last, low, high = values[0], values[-1], min(values), max(values)
    if high - low <= MOVED * max(abs(high), 1e-12):
        return f"{form.format(last)} throughout"
    text = f"from {form.format(first)} to {form.format(last)}"
    inside = [v for v in (low, high) if form.format(v) not in (form.format(first), form.format(last))]
    return text + (f", with {' and '.join(form.format(v) for v in inside)} on the way" if inside else "")


def classes_of(student: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Return (class, test samples, accuracy), the worst first; empty where a run does not tell."""
    found: Mapping[str, Any] = student.get("exits_by_class") or student.get("by_class") or {}
    rows = [(str(name), int(row["num_samples"]), _accuracy(row)) for name, row in found.items()]
    return sorted((row for row in rows if row[1]), key=lambda row: row[2])


def _accuracy(row: Mapping[str, Any]) -> float:
    value = row["accuracy"]
    return float(value[-1] if isinstance(value, list) else value)


def _windows(count: int) -> str:
    return f"{count} window{'s' if count != 1 else ''}"


def weak_spots(result: Mapping[str, Any]) -> list[str]:
    """Return sentences about what a reader should not overlook."""
    student = student_of(result)
    told = []
    if student:
        row, classes = timed(student), classes_of(student)
        if student.get("goal_met") is not None and not student["goal_met"]:
            short = number(student.get("shortfall", 0.0), "shortfall", 0.0, 1.0)
            told.append(f"The goal is missed on test data{f', by {short:.4f} of accuracy' if short else ''}.")
        weak = [c for c in classes if c[2] < float(student["accuracy"]) - BEHIND][:WORST]
        if weak:
            named = ", ".join(f"{name} ({accuracy:.3f} of {count})" for name, count, accuracy in weak)
            told.append(f"Classes with an accuracy of more than {BEHIND:.2f} below the mean: {named}.")
        for name, other in (("speedup", "dense student"), ("speedup_over_teacher", "teacher")):
            if row.get(name, 1.0) < 1.0:
                told.append(f"Measured at batch {row['batch_size']}, the student is slower than the {other}.")
        measured, predicted = 1 / float(row["speedup"]), float(student.get("latency_ratio", 0.0))
        if predicted and not 1 / APART < measured / predicted < APART:
            told.append(
                f"Measured, the student takes {measured:.0%} of the dense student's latency; the cost profile says "
                f"{predicted:.0%}. Measure again on an idle machine: rlkd measure."
            )
        if student.get("num_rollbacks"):
            told.append(f"{_windows(student['num_rollbacks'])} had numbers that were not finite and had to be undone.")
        if student.get("num_undone"):
            told.append(f"The guard undid {_windows(student['num_undone'])}, which fell below the floor.")
        if student.get("num_held"):
            told.append(
                f"In {_windows(student['num_held'])} the guard kept more units and inputs than the policy chose, "
                "because the student began trained (guard.hold)."
            )
        if student.get("energy_kind", "modelled") == "modelled":
            told.append("Energy is an estimate from operations and bytes moved, not a measurement.")
    if result.get("task", {}).get("splits") == "cut by rlkd":
        told.append(
            "rlkd cut the test split itself: if the teacher was trained on these data, its accuracy and the floor are "
            "too high."
        )
    far = result.get("far_from_training") or {}
    if far:
        told.append(
            f"In {_windows(len(far))} the policy saw something far from what it was trained on; its choices there are "
            "guesses."
        )
    if "goals" in result:
        lost = [
            f"{k.split('-', 1)[1]} under {entry['name']!r} ({row['difference']:+.4f})"
            for entry in result["goals"]
            for k, row in entry["paired"].items()
            if k.startswith("policy-") and row["ci95"][1] < 0
        ]
        if lost:
            told.append(f"The policy is worse than {', '.join(lost)}.")
    return told
