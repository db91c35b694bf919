"""The scenario of a real model, built from models and data on disk."""

import csv
from pathlib import Path

import pytest
import tiny_models
import torch

from rlkd.envs import ControlConfig
from rlkd.envs.build_real import build_real_scenario, describe_length
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.models.real.cutting import StudentCut
from rlkd.students.real.train_config import ModuleTrainConfig


@pytest.mark.parametrize(
    ("num_samples", "end"),
    [
        (19_200, "2.00 epochs of 19,200 samples"),
        (
            38_400,
            "1.00 epochs of 38,400 samples; a floor close to the teacher may need more: "
            "--train.steps_per_window 300 makes 3 epochs",
        ),
    ],
)
def test_a_training_that_is_short_is_told(num_samples: int, end: str) -> None:
    line = describe_length(RealConfig("teacher", "data.csv"), num_samples)
    assert line == f"training: 12 windows of 100 steps of 32 samples, {end}"


@pytest.mark.slow
def test_answers_of_several_teachers_are_combined(tmp_path: Path) -> None:
    folder = tmp_path
    for name, family, seed in (("first", "bert", 0), ("second", "distilbert", 1), ("other", "bert", 2)):
        model = tiny_models.tiny(family, seed=seed)
        names = ["neg", "pos"] if name != "other" else ["pos", "neg"]
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {label: i for i, label in enumerate(names)}
        model.save_pretrained(folder / name)
        tiny_models.save_tokenizer(folder / name)
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "source"])
        rows.writerows(
            ("good film" if i % 2 else "bad plot", "pos" if i % 2 else "neg", f"review {i // 2}") for i in range(60)
        )

    def built(*more: str) -> RealScenario:
        config = RealConfig(
            teacher=str(folder / "first"),
            data=str(folder / "reviews.csv"),
            more_teachers=tuple(str(folder / name) for name in more),
            num_windows=1,
            cut=StudentCut(layers=1),
            train=ModuleTrainConfig(steps_per_window=1, batch_size=8),
            cost=RealCostConfig(batch_size=4),
        )
        return build_real_scenario(config, ControlConfig())

    alone, both, twice = built(), built("second"), built("first")
    torch.testing.assert_close(twice.signals.logits, alone.signals.logits)
    assert not torch.allclose(both.signals.logits, alone.signals.logits)
    assert torch.equal(both.signals.features, alone.signals.features)
    with pytest.raises(UserError, match=r"more_teachers: .*other has the classes"):
        built("other")
