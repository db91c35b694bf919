import json
from pathlib import Path

import pytest
import torch
from silent import Silent
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlkd.agents.baselines.search import SearchConfig, Shortlist
from rlkd.agents.planner.planning import PlanningConfig
from rlkd.agents.planner.surrogate import SurrogateConfig
from rlkd.agents.policy.bundle import load_bundle
from rlkd.agents.policy.controllers import hold_start
from rlkd.agents.policy.policy import TENSORS, Policy
from rlkd.agents.ppo.train import PPOConfig
from rlkd.configs import ComparisonConfig, ExperimentConfig
from rlkd.cost import CostConfig
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig, Scenario, build_scenario
from rlkd.envs.single import MAX_SEED
from rlkd.errors import UserError
from rlkd.io.journal import Journal
from rlkd.models import StudentConfig
from rlkd.runs.distil import distil
from rlkd.runs.train import held_out_seeds, train_experiment
from rlkd.students import TrainConfig
from rlkd.teachers import TeacherConfig


@pytest.fixture
def small(profile_file: Path) -> ExperimentConfig:
    return ExperimentConfig(
        num_windows=3,
        teacher=TeacherConfig(num_samples=(40, 897), num_steps=60),
        train=TrainConfig(4, 16),
        cost=CostConfig(profile=str(profile_file)),
        search=SearchConfig(3, 4, 2, 4),
        planning=PlanningConfig(
            num_decisions=2,
            num_wide=6,
            num_rounds=2,
            tasks_per_round=4,
            surrogate=SurrogateConfig(2, 8, 8, num_steps=3),
        ),
        ppo=PPOConfig(num_students=6, num_iterations=2, batch_size=9, num_epochs=1, hidden=8, num_gate_tasks=4),
        comparison=ComparisonConfig(8, (0.6, 0.9)),
    )


def test_held_out_tasks_come_from_a_range_of_their_own() -> None:
    seeds = held_out_seeds(0, 200)
    assert len(set(seeds)) == 200
    assert min(seeds) >= MAX_SEED  # training draws below it
    assert held_out_seeds(0, 200) == seeds != held_out_seeds(1, 200)


def test_the_same_seed_and_profile_give_the_same_bytes(small: ExperimentConfig, tmp_path: Path) -> None:
    results = [train_experiment(small, made(tmp_path / name), 7, Silent()) for name in "ab"]
    for name in ("metrics.jsonl", "policy/policy.safetensors", "student/student.safetensors", "cost_profile.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert results[0]["policy_sha256"] == results[1]["policy_sha256"]
    other = train_experiment(small, made(tmp_path / "c"), 8, Silent())
    assert other["policy_sha256"] != results[0]["policy_sha256"]

    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (result["schema"], result["split"], result["num_tasks"], result["num_seeds"]) == (1, "test", 8, 1)
    assert set(result["methods"]) == {"policy", "static", "plan", "published", "annealed"}
    for entry in result["methods"].values():
        for figure in ("score", "accuracy", "macs_ratio", "latency_ratio"):
            low, high = entry[figure]["ci95"]
            assert low <= entry[figure]["iqm"] <= high
        assert entry["trainings_per_task"] == 1
    pair = result["paired"]["policy-static"]
    means = (result["methods"][name]["score"]["mean"] for name in ("policy", "static"))
    assert pair["difference"] == pytest.approx(next(means) - next(means))
    assert 0 <= pair["probability_of_improvement"] <= 1
    assert result["cost"]["planning_trainings"] == 6 + 2 * 4
    assert result["ppo_gain"]["num_tasks"] == 4
    if not result["ppo_gain"]["kept"]:
        assert result["paired"]["policy-plan"]["difference"] == 0.0
    assert result["cost"]["agent_trainings"] == 3 * 6  # two rollouts, and the one that standardises observations
    assert set(result["preferences"]) == {"0.6", "0.9"}

    accumulator = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    wanted = {"rollout/ep_rew_mean", "train/loss", "student/score", "action/temperature", "reward/return"}
    assert wanted <= tags
    named = {"hparam/test_score": result["methods"]["policy"]["score"]["mean"]}  # the columns of the HPARAMS tab
    named |= {f"hparam/{name}": row["difference"] for name, row in result["paired"].items()}
    for name, value in named.items():
        assert [e.value for e in accumulator.Scalars(name)] == pytest.approx([value], abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [e.value for e in accumulator.Scalars("student/score")] == pytest.approx([r["score"] for r in rows])
    assert not any("wall" in key or "_per_s" in key for row in rows for key in row)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class FailsLate(Silent):
    """Fails when the last phase begins."""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        if name.startswith("one clean student"):
            raise UserError("the last phase fails")


def test_a_failure_in_the_last_phase_keeps_what_the_others_found(small: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the last phase fails"):
        train_experiment(small, tmp_path, 7, FailsLate())
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["preferences"]) == {"0.6", "0.9"}
    assert (tmp_path / "policy" / "bundle.json").exists()
    whole = train_experiment(small, tmp_path, 7, Silent(), Journal(tmp_path, resume=True))
    assert whole["methods"] == result["methods"]
    assert (tmp_path / "student" / "student.json").exists()


class Interrupting(Silent):
    """Presses Ctrl-C in the middle of PPO."""

    def __init__(self) -> None:
        self.name, self.windows, self.lines = "", 0, [""]

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        self.name, self.windows = name, 0

    def advance(self, num_students: int) -> None:
        self.windows += 1
        if self.name == "PPO" and self.windows == 8:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_ctrl_c_keeps_the_policy_and_says_how_to_go_on(small: ExperimentConfig, tmp_path: Path) -> None:
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        train_experiment(small, tmp_path, 0, progress)
    assert load_bundle(tmp_path / "policy").provenance["interrupted"] is True
    assert "rlkd replay --policy" in progress.lines[-1]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1  # the one rollout that was done


def restless_policy(scenario: Scenario) -> Policy:
    """Random weights large enough to move the controls."""
    g = torch.Generator().manual_seed(2)
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(6, num_seen), (6,), (6, 6), (6,), (num_set, 6), (num_set,)]
    weights = {name: torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    static = Shortlist(scenario.plan.settings, torch.zeros(1, 3))
    return Policy(weights, torch.zeros(num_seen), torch.ones(num_seen), scenario.plan, static, scenario.config.controls)


@pytest.mark.parametrize(
    "student",
    [StudentConfig(widths=(24, 16, 12), exits=(1, 2)), StudentConfig("conv", (4, 8), (1,)), StudentConfig(exits=())],
    ids=["deeper", "conv", "no_exit"],
)
def test_a_policy_replays_on_students_it_never_saw(small: ExperimentConfig, student: StudentConfig) -> None:
    config = ExperimentConfig(
        small.num_windows, student=student, teacher=small.teacher, train=small.train, cost=small.cost
    )
    scenario = build_scenario(config)
    rows: list[dict[str, float]] = []
    done = distil(scenario, restless_policy(scenario).controller(), 4, lambda row, observation: rows.append(row))
    assert [row["window"] for row in rows] == [1, 2, 3]
    moved = [name for name in rows[0] if name.startswith("position_") and rows[0][name] != rows[-1][name]]
    assert moved
    assert done.figures["compacted_accuracy"] == pytest.approx(done.figures["accuracy"], abs=1e-6)
    assert sum(done.figures["exit_rates"]) == pytest.approx(1.0)
    assert done.measured["batch_64"]["latency_s"] > 0


def test_a_diverged_replay_scores_worst_and_stops(small: ExperimentConfig) -> None:
    hot = ExperimentConfig(
        small.num_windows,
        teacher=small.teacher,
        train=small.train,
        cost=small.cost,
        controls=ControlConfig(learning_rate=(1e30, 1e30)),
    )
    rows: list[dict[str, float]] = []
    done = distil(build_scenario(hot), hold_start, 0, lambda row, observation: rows.append(row))
    assert done.diverged
    assert done.figures["score"] == 0.0
    assert done.figures["num_rollbacks"] == 2
    assert [row["num_rollbacks"] for row in rows] == [1.0, 2.0, 2.0]
    assert [row["num_diverged"] for row in rows] == [0.0, 0.0, 1.0]
    assert [row["score"] == 0.0 for row in rows] == [False, False, True]
