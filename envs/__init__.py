"""The distillation environment: a student's training loop under Gymnasium's interface.

Importing this package registers `rlkd/Distillation-v0` for `gymnasium.make` (one student) and
`gymnasium.make_vec` (the lock-step population).
"""

if __name__ == "envs":
    raise ImportError("import this package as rlkd.envs, not as envs")

import gymnasium

from rlkd.envs.action import CONTROLS, ControlConfig, FlattenAction
from rlkd.envs.episodes import Episodes, Outcome
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.envs.single import DistillationEnv
from rlkd.envs.vector import DistillationVectorEnv

ENV_ID = "rlkd/Distillation-v0"

if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID,
        entry_point="rlkd.envs.single:DistillationEnv",
        vector_entry_point="rlkd.envs.vector:DistillationVectorEnv",
    )

__all__ = [
    "CONTROLS",
    "ENV_ID",
    "OBSERVATIONS",
    "ControlConfig",
    "DistillationEnv",
    "DistillationVectorEnv",
    "EnvConfig",
    "Episodes",
    "FlattenAction",
    "Outcome",
    "Scenario",
    "build_scenario",
]
