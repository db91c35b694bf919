"""Other algorithms, several seeds, and the search of hyperparameters, from the command line."""

import json
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml

from rlkd.agents.policy.bundle import load_bundle
from rlkd.cli.main import main


@pytest.mark.slow
def test_another_algorithm_is_compared_on_the_same_tasks(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *tiny, "--agent.algorithm", "a2c", "--out", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["algorithm"] == "a2c"
    assert {"policy-dense", "policy-nncf"} <= set(result["paired"])
    assert load_bundle(run / "policy").digest == result["policy_sha256"]
    load_bundle(run / "best_model")
    evaluations = np.load(run / "evaluations.npz")
    rewards = [row["mean_reward"] for row in result["evaluations"]]
    assert evaluations["results"][:, 0].tolist() == pytest.approx(rewards)
    assert len(rewards) == len(evaluations["timesteps"]) > 1
    assert "A2C learned a policy" in (run / "report.html").read_text()
    assert main(["train", "--resume", str(run), "--agent.algorithm", "a2c"]) == 2
    assert "got a run of a2c; allowed: one of ppo" in capsys.readouterr().err


@pytest.mark.slow
def test_several_seeds_end_with_means_and_intervals(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny, "--seeds", "0,3", "--out", str(tmp_path)]) == 0
    assert "mean [95 %] over seeds 0, 3" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    scores = [
        json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text())["goals"][0]["methods"]["policy"]["score"]
        for seed in (0, 3)
    ]
    name = next(iter(summary["goals"]))
    assert summary["goals"][name]["policy"]["score"]["mean"] == pytest.approx(np.mean([s["mean"] for s in scores]))
    evaluations = np.load(tmp_path / "seed-0" / "evaluations.npz")
    assert len(evaluations["timesteps"]) == len(evaluations["results"]) == len(evaluations["ep_lengths"])
    rows = [json.loads(line) for line in (tmp_path / "seed-0" / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations["results"][:, 0].tolist() == pytest.approx([row["mean_reward"] for row in rows])
    assert load_bundle(tmp_path / "seed-0" / "best_model").digest == load_bundle(tmp_path / "seed-0" / "policy").digest


@pytest.mark.slow
def test_a_search_of_hyperparameters_goes_on_where_it_stopped(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["tune", *tiny, "--out", str(tmp_path / "study")]
    assert main([*call, "--num_trials", "1"]) == 0
    assert main([*call, "--num_trials", "2"]) == 0
    assert "of 2 trials" in capsys.readouterr().out
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "study" / "study.log"))
    )
    study = optuna.load_study(study_name="ppo", storage=storage)
    best = yaml.safe_load((tmp_path / "study" / "best.yaml").read_text())
    assert best["ppo"]["learning_rate"] == study.best_params["learning_rate"]
    assert len(study.trials) == 2


def test_what_cannot_be_combined_is_refused(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *tiny, "--seeds", "1"]) == 2
    assert "--seeds: got '1'; allowed: two or more different whole numbers" in capsys.readouterr().err
    assert main(["train", *tiny, "--track", "mlfow"]) == 2
    assert "--track: got 'mlfow'; allowed: wandb, mlflow, trackio" in capsys.readouterr().err
