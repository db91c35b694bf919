import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from silent import Silent
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlkd.agents.baselines.search import SearchConfig
from rlkd.agents.policy.bundle import load_bundle
from rlkd.agents.policy.controllers import hold_start
from rlkd.agents.policy.policy import TENSORS, Policy
from rlkd.agents.ppo.train import PPOConfig
from rlkd.configs import ComparisonConfig, ExperimentConfig
from rlkd.configs.schema import ScenarioConfig
from rlkd.cost import CostConfig
from rlkd.data import TaskDistribution
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig, EnvConfig, Scenario, build_scenario
from rlkd.envs.single import MAX_SEED
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.models import StudentConfig
from rlkd.runs.distil import distil
from rlkd.runs.train import COMPARED, held_out_seeds, train_experiment
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig


@pytest.fixture
def small(profile_file: Path) -> ExperimentConfig:
    main = ScenarioConfig(
        num_windows=3,
        teacher=TeacherConfig(num_samples=(40, 897), num_steps=60),
        train=TrainConfig(4, 16),
        cost=CostConfig(profile=str(profile_file)),
    )
    other = replace(main, dataset="generated:classes=4,inputs=6", num_windows=2, student=StudentConfig(widths=(8, 8)))
    return ExperimentConfig(
        scenarios=(main, other),
        validation=(replace(main, student=StudentConfig(widths=(12, 8))),),
        search=SearchConfig(3, 4, 2, 4),
        ppo=PPOConfig(
            num_students=6,
            num_tasks=4,
            num_iterations=2,
            batch_size=9,
            num_epochs=1,
            hidden=8,
            evaluate_every=1,
            num_evaluation_tasks=4,
        ),
        comparison=ComparisonConfig(6, (0.98, 0.95)),
    )


def test_held_out_tasks_come_from_a_range_of_their_own() -> None:
    seeds = held_out_seeds(0, 200)
    assert len(set(seeds)) == 200
    assert min(seeds) >= MAX_SEED  # training draws below it
    assert held_out_seeds(0, 200) == seeds != held_out_seeds(1, 200)


@pytest.mark.slow
def test_the_same_seed_and_profile_give_the_same_bytes(small: ExperimentConfig, tmp_path: Path) -> None:
    results = [train_experiment(small, made(tmp_path / name), 7, Silent()) for name in "ab"]
    names = ("metrics.jsonl", "evaluations.jsonl", "policy/policy.safetensors", "student/student.safetensors")
    for name in (*names, "cost_profile.json", "cost_profile_1.json", "cost_profile_validation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert results[0]["policy_sha256"] == results[1]["policy_sha256"]
    other = train_experiment(small, made(tmp_path / "c"), 8, Silent())
    assert other["policy_sha256"] != results[0]["policy_sha256"]

    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (result["schema"], result["split"], result["num_tasks"], result["num_seeds"]) == (2, "test", 6, 1)
    assert [entry["name"] for entry in result["goals"]] == ["keep 0.98", "keep 0.95"]
    assert result["goal"] == {"keep": 0.98, "reference": "dense"}
    assert result["methods"] == result["goals"][0]["methods"]
    for goal in result["goals"]:
        assert set(goal["methods"]) == set(COMPARED)
        for entry in goal["methods"].values():
            for metric in ("score", "accuracy", "macs_ratio", "latency_ratio"):
                low, high = entry[metric]["ci95"]
                assert low <= entry[metric]["iqm"] <= high
            assert entry["trainings_per_task"] == 1
            assert entry["shortfall"] >= 0
    pair = result["paired"]["policy-dense"]
    means = (result["methods"][name]["score"]["mean"] for name in ("policy", "dense"))
    assert pair["difference"] == pytest.approx(next(means) - next(means))
    assert 0 <= pair["probability_of_improvement"] <= 1
    # of two scenarios: two that standardise observations and two rollouts of six; three evaluations of four tasks
    assert result["cost"]["agent_trainings"] == 2 * 2 + 2 * 2 * 6 + 3 * 4
    evaluations = [json.loads(line) for line in (tmp_path / "a" / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations == result["evaluations"]
    assert [row["iteration"] for row in evaluations] == [0, 1, 2]
    best = max(evaluations, key=lambda row: row["score"])  # type: ignore[no-any-return]
    assert result["shipped_iteration"] == best["iteration"]
    if best["iteration"] == 0:
        assert not load_bundle(tmp_path / "a" / "policy").policy.weights["action.weight"].any()

    accumulator = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    wanted = {"rollout/ep_rew_mean", "train/loss", "student/score", "student/goal_met", "action/temperature"}
    wanted |= {"rollout/ep_len_mean", "time/fps", "train/approx_kl", "eval/mean_reward"}
    wanted |= {"reward/return", "eval/score", "eval/goal_met", "eval/shortfall", "eval/latency_saving"}
    assert wanted <= tags
    named = {"hparam/test_score": result["methods"]["policy"]["score"]["mean"]}  # the columns of the HPARAMS tab
    named |= {f"hparam/{name}": row["difference"] for name, row in result["paired"].items()}
    for name, value in named.items():
        assert [e.value for e in accumulator.Scalars(name)] == pytest.approx([value], abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [e.value for e in accumulator.Scalars("student/score")] == pytest.approx([r["score"] for r in rows])
    assert [e.value for e in accumulator.Scalars("eval/score")] == pytest.approx([e["score"] for e in evaluations])
    assert [e.step for e in accumulator.Scalars("eval/score")] == [0, 6 * 5, 2 * 6 * 5]
    assert not any("wall" in key or "_per_s" in key for row in rows for key in row)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class FailsLate(Silent):
    """Fails when the last phase begins."""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        if name.startswith("one clean student"):
            raise UserError("the last phase fails")


@pytest.mark.slow
def test_a_failure_in_the_last_phase_keeps_what_the_others_found(small: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the last phase fails"):
        train_experiment(small, tmp_path, 7, FailsLate())
    result = json.loads((tmp_path / "result.json").read_text())
    assert [entry["name"] for entry in result["goals"]] == [f"keep {keep:g}" for keep in small.comparison.keeps]
    assert (tmp_path / "policy" / "bundle.json").exists()
    whole = train_experiment(small, tmp_path, 7, Silent(), Journal(tmp_path, resume=True))
    assert whole["methods"] == result["methods"]
    assert (tmp_path / "student" / "student.json").exists()


class Interrupting(Silent):
    """Presses Ctrl-C in the middle of PPO."""

    def __init__(self) -> None:
        self.name, self.windows = "", 0

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        self.name, self.windows = name, 0

    def advance(self, num_students: int) -> None:
        self.windows += 1
        if self.name == "PPO" and self.windows == 5 + 3 + 5 + 3 + 2:  # in the second rollout
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_policy_and_says_how_to_go_on(
    caplog: pytest.LogCaptureFixture, small: ExperimentConfig, tmp_path: Path
) -> None:
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        train_experiment(small, tmp_path, 0, progress)
    assert load_bundle(tmp_path / "policy").provenance["interrupted"] is True
    assert "rlkd distil --policy" in caplog.messages[-1]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1  # the one rollout that was done


def restless_policy(scenario: Scenario) -> Policy:
    """Random weights large enough to move the controls."""
    g = torch.Generator().manual_seed(2)
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(6, num_seen), (6,), (6, 6), (6,), (num_set, 6), (num_set,)]
    weights = {name: torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    mean, deviation = torch.zeros(num_seen), torch.ones(num_seen)
    return Policy(weights, mean, deviation, scenario.start, scenario.config.controls)


@pytest.mark.parametrize(
    "student",
    [StudentConfig(widths=(24, 16, 12), exits=(1, 2)), StudentConfig("conv", (4, 8), (1,)), StudentConfig(exits=())],
    ids=["deeper", "conv", "no_exit"],
)
def test_a_policy_replays_on_students_it_never_saw(small: ExperimentConfig, student: StudentConfig) -> None:
    scenario = build_scenario(replace(small.envs(small.scenarios)[0], student=student, task=TaskDistribution()))
    rows: list[dict[str, float]] = []
    done = distil(scenario, restless_policy(scenario).controller(), 4, lambda row, observation: rows.append(row))
    assert [row["window"] for row in rows] == [1, 2, 3]
    moved = [name for name in rows[0] if name.startswith("u_") and rows[0][name] != rows[-1][name]]
    assert moved
    assert done.figures["compacted_accuracy"] == pytest.approx(done.figures["accuracy"], abs=1e-6)
    assert sum(done.figures["exit_rates"]) == pytest.approx(1.0)
    assert done.measured["batch_64"]["latency_s"] > 0


def test_a_student_that_diverges_stops_and_its_best_window_before_ships(small: ExperimentConfig) -> None:
    controls = ControlConfig(learning_rate=(1e30, 1e30))
    hot: EnvConfig = replace(small.envs(small.scenarios)[0], controls=controls, task=TaskDistribution())
    rows: list[dict[str, float]] = []
    done = distil(build_scenario(hot), hold_start, 0, lambda row, observation: rows.append(row))
    assert not done.diverged
    assert done.figures["best_window"] in (1, 2)
    assert done.figures["compacted_accuracy"] == pytest.approx(done.figures["accuracy"], abs=1e-6)
    assert done.figures["num_rollbacks"] == 2
    assert [row["num_rollbacks"] for row in rows] == [1.0, 2.0, 2.0]
    assert [row["num_diverged"] for row in rows] == [0.0, 0.0, 1.0]
    assert [row["score"] == 0.0 for row in rows] == [False, False, True]
