from typing import Any

import pytest

from rlkd.agents.evaluation.verdict import (
    asked_and_reached,
    verdict,
    weak_spots,
    what_the_policy_did,
    wilson,
)
from rlkd.envs.guard import UNTOUCHED


def one_student(**changes: Any) -> dict[str, Any]:
    row = {
        "batch_size": 64,
        "latency_s": 2e-4,
        "dense_latency_s": 5e-4,
        "teacher_latency_s": 1e-4,
        "speedup": 2.5,
        "speedup_over_teacher": 0.5,
    }
    figures = {
        "validation_accuracy": 0.95,
        "accuracy": 0.9,
        "teacher_accuracy": 0.97,
        "floor": 0.92,
        "goal_met": 0.0,
        "shortfall": 0.02,
        "num_test_samples": 100,
        "macs": 1000.0,
        "macs_ratio": 0.25,
        "parameters": 50.0,
        "size_ratio": 0.5,
        "energy_j": 2e-6,
        "energy_ratio": 0.4,
        "limits": {"macs": 0.5},
        "macs_of_teacher": 9000.0,
        "parameters_of_teacher": 800.0,
        "energy_of_teacher_j": 8e-6,
        "by_class": {"0": {"num_samples": 60, "accuracy": 1.0}, "1": {"num_samples": 40, "accuracy": 0.75}},
        **changes,
    }
    return {"methods": {"policy": figures}, "measured": {"batch_64": row, "profile_batch": 64}}


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    low, high = wilson(0.9, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)  # Wilson 1927, 90 of 100
    assert wilson(1.0, 10)[1] == 1.0


def test_the_verdict_says_which_student_came_out() -> None:
    text = verdict(one_student())
    assert "misses its goal (accuracy 0.9000 on test data, floor 0.9200), with 25% of the dense student's MACs" in text
    assert "2.50 times as fast as the dense student and 2.00 times slower than the teacher" in text


def test_asked_and_reached_stand_side_by_side() -> None:
    rows = {row[0]: row[1:] for row in asked_and_reached(one_student())}
    assert rows["accuracy [95 %]"][0] == "at least 0.9200"
    assert rows["accuracy [95 %]"][1].startswith("0.9000 [0.82")
    assert rows["latency of a batch of 64"] == ["", "200.0 us", "500.0 us", "100.0 us"]
    assert rows["MACs of a sample"] == ["at most 0.5 of dense", "1,000 (25.0% of dense)", "4,000", "9,000"]
    assert rows["parameters"][2:] == ["100", "800"]
    assert rows["energy of a sample (modelled)"][1:] == ["2 uJ (40.0% of dense)", "5 uJ", "8 uJ"]
    assert rows["accuracy [95 %]"][2] == "not trained"
    result = one_student()
    result["methods"]["dense"] = {"accuracy": 0.91}
    assert asked_and_reached(result)[0][3].startswith("0.9100 [0.83")


def test_weak_classes_slowness_and_misses_are_named() -> None:
    told = " ".join(weak_spots(one_student()))
    assert "missed on test data, by 0.0200" in told
    assert "1 (0.750 of 40)" in told
    assert "0 (" not in told.split("mean:")[1].split(".")[0]
    assert "slower than the teacher" in told
    assert "slower than the dense student" not in told
    assert "Energy is an estimate" in told
    assert "cost profile says" not in told


def test_a_test_split_that_the_teacher_may_have_seen_is_named() -> None:
    words = "rlkd cut the test split itself: if the teacher was trained on these data"
    for splits, is_named in (("cut by rlkd", True), ("given", False)):
        told = weak_spots({**one_student(), "task": {"splits": splits}})
        assert any(line.startswith(words) for line in told) is is_named


def test_a_measurement_that_contradicts_the_cost_profile_is_named() -> None:
    told = " ".join(weak_spots(one_student(latency_ratio=0.9)))  # measured: 0.4
    assert "takes 40% of the dense student's latency; the cost profile says 90%" in told
    assert "cost profile says" not in " ".join(weak_spots(one_student(latency_ratio=0.5)))


def test_windows_in_which_the_guard_acted_are_counted() -> None:
    told = " ".join(weak_spots(one_student(num_undone=1, num_held=3)))
    assert "The guard undid 1 window, which fell below the floor." in told
    assert "In 3 windows the guard kept more units and inputs than the policy chose" in told
    assert "guard" not in " ".join(weak_spots(one_student(num_undone=0, num_held=0)))


def test_what_the_policy_did_is_said_in_words() -> None:
    weights = {"weight_hard_label": 0.5, "weight_response": 0.25, "weight_feature": 0.15, "weight_attention": 0.1}
    base = {**weights, "temperature": 4.0, "unit_keep": 1.0, "feature_keep": 1.0, "step_size": 0.003}
    rows = [
        {**base, "window": 1, "accuracy": 0.5, "floor": 0.9, "first_exit_rate": 0.0},
        {**base, "window": 2, "accuracy": 0.95, "floor": 0.9, "unit_keep": 0.3, "first_exit_rate": 0.0},
        {**base, "window": 3, "accuracy": 0.95, "floor": 0.9, "unit_keep": 0.5, "first_exit_rate": 1.0},
    ]
    told = what_the_policy_did(rows)
    assert told[0] == "Weight on what the teacher says: 0.5 throughout (1 - this is the weight on the labels)."
    assert "Share of the units kept: from 100% to 50%, with 30% on the way." in told
    assert "Temperature of the teacher's answers: 4 throughout." in told
    assert "After the last window all samples leave at the first exit." in told
    assert "Validation accuracy was below the floor after 1 of 3 windows, last 1." in told
    assert what_the_policy_did([]) == []
    assert what_the_policy_did(rows, best_window=2)[0] == (
        "Window 2 of 3 ships, because the later ones did worse on validation: 30% of the units, 100% of the inputs; "
        "0% of the samples leave at the first exit."
    )
    assert what_the_policy_did(rows, best_window=3) == told  # the last window ships
    untouched = "The student ships as it was before the first window, because every window did worse on validation."
    assert what_the_policy_did(rows, best_window=UNTOUCHED) == [untouched, *told]


def test_a_lead_is_claimed_only_where_its_interval_says_so() -> None:
    def result(low: float, high: float) -> dict[str, Any]:
        row = {"difference": (low + high) / 2, "ci95": [low, high]}
        entry = {"name": "keep 0.98", "methods": {"policy": {}}, "paired": {"policy-nncf": row}}
        evaluations = [{"score": -0.5}, {"score": 0.3}]
        return {
            "goals": [entry],
            "evaluations": evaluations,
            "shipped_iteration": 2,
            "num_tasks": 64,
            "cost": {"agent_trainings": 1234},
            "methods": {},
        }

    assert "it leads nncf on 64 held-out tasks: the difference is +0.0200 J" in verdict(result(0.01, 0.03))
    assert "it and nncf cannot be told apart" in verdict(result(-0.01, 0.03))
    assert "it trails nncf" in verdict(result(-0.03, -0.01))
    assert "J rose from -0.500 before learning to 0.300; iteration 2 ships" in verdict(result(0.01, 0.03))
    assert weak_spots(result(-0.03, -0.01)) == ["The policy is worse than nncf under 'keep 0.98' (-0.0200)."]
