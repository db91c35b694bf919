"""Sound files of every kind that rlkd reads, to be damaged."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlkd.agents.policy.bundle import save_bundle
from rlkd.agents.policy.policy import TENSORS, Policy
from rlkd.compression import compact, save_student
from rlkd.cost import CostProfile, save_profile
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.data import load_dataset
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig
from rlkd.models import StudentConfig, build_student, initialise
from rlkd.teachers import TeacherConfig, load_teachers

TEACHERS = TeacherConfig(widths=(6,), num_samples=(24, 40), num_steps=1)


def some_policy(hidden: int = 5) -> Policy:
    """A small policy with random weights."""
    g = torch.Generator().manual_seed(0)
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(hidden, num_seen), (hidden,), (hidden, hidden), (hidden,), (num_set, hidden), (num_set,)]
    weights = {name: torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    mean, deviation = torch.rand(num_seen, generator=g), 0.1 + torch.rand(num_seen, generator=g)
    return Policy(weights, mean, deviation, torch.rand(num_set, generator=g), ControlConfig(step=0.2))


@dataclass
class Samples:
    """Sound files of every kind, and where their damaged copies go."""

    folder: Path
    more: tuple[Callable[[Path], None], ...] = ()  # write further files
    sound: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ["RLKD_CACHE"] = str(self.folder / "cache")
        self.data = load_dataset("digits")
        save_bundle(some_policy(), self.folder / "policy", {"seed": 3, "config": {"a": [1, 2]}})
        for name, config in (("mlp", StudentConfig()), ("conv", StudentConfig("conv", (4, 6), (1,)))):
            student = build_student(config, (8, 8), 10)
            initialise(student, torch.Generator().manual_seed(0))
            masks = student.full_masks()
            masks[0][: len(masks[0]) // 2] = 0
            save_student(compact(student, masks, 0.4), self.folder / name, {"figures": {"score": 0.5}})
        save_profile(
            CostProfile(256, (1e-6,) * 8, dict(ENERGY_MODEL), {"grid": [{"a": 1.0}]}), self.folder / "profile.json"
        )
        load_teachers(TEACHERS, self.data)
        self.teachers = next((self.folder / "cache").glob("teachers-*"))
        self.events = self._run()
        for make in self.more:
            make(self.folder)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                self.sound[str(path.relative_to(self.folder))] = path.read_bytes()

    def _run(self) -> Path:
        from torch.utils.tensorboard import SummaryWriter

        run = self.folder / "run"
        writer = SummaryWriter(str(run / "tensorboard"))  # type: ignore[no-untyped-call]
        for step in range(1, 6):
            for tag in ("student/score", "student/num_trainings", "action/temperature"):
                writer.add_scalar(tag, step / 10, step)  # type: ignore[no-untyped-call]
        writer.add_text("config", "a: 1")  # type: ignore[no-untyped-call]
        writer.close()  # type: ignore[no-untyped-call]
        figure = {"mean": 0.5, "iqm": 0.51, "ci95": [0.4, 0.6]}
        entry: dict[str, Any] = {"goal_met": 1.0, "goal_met_within_1_point": 1.0, "shortfall": 0.0}
        entry |= dict.fromkeys(("score", "accuracy", "macs_ratio", "latency_ratio", "energy_ratio"), figure)
        pair = {"difference": 0.0421, "ci95": [0.03, 0.05], "probability_of_improvement": 0.9}
        table = {"methods": {"policy": entry, "nncf": entry}, "paired": {"policy-nncf": pair}}
        table |= {"name": "keep 0.98", "goal": {"keep": 0.98, "reference": "dense"}, "num_feasible": 8}
        cost = {"agent_trainings": 24, "wall_s": 3.0, "trainings_per_s": 100.0, "search_trainings": 3}
        result = {**table, "goals": [table], "cost": cost, "num_tasks": 8, "split": "test"}
        (run / "result.json").write_text(json.dumps(result))
        (run / "command.txt").write_text("rlkd train\n")
        return next((run / "tensorboard").iterdir())

    def restore(self) -> None:
        """Make every file sound again."""
        for name, blob in self.sound.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != blob:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(blob)

    def place(self, name: str) -> Path:
        """Path of a file to damage."""
        return self.folder / name
