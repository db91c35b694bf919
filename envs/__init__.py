"""The distillation environment: a student's training loop under Gymnasium's interface.

Importing this package registers `rlkd/Distillation-v0` for `gymnasium.make` (one student) and
`gymnasium.make_vec` (the lock-step population). `rlkd/DistillationFlat-v0` takes its actions as one flat Box, as
stable-baselines3's algorithms need it.
"""

if __name__ == "envs":
    raise ImportError("import this package as rlkd.envs, not as envs")

import gymnasium

from rlkd.envs.action import CONTROLS, ControlConfig, FlattenAction
from rlkd.envs.episodes import Episodes, Outcome
from rlkd.envs.observation import OBSERVATIONS
from rlkd.envs.page import page
from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
from rlkd.envs.single import DistillationEnv, FlatDistillationEnv
from rlkd.envs.vector import DistillationVectorEnv, FlatDistillationVectorEnv

DistillationEnv.__doc__ = f"{(DistillationEnv.__doc__ or '').strip()}\n\n{page()}"

ENV_ID = "rlkd/Distillation-v0"
FLAT_ENV_ID = "rlkd/DistillationFlat-v0"

for _id, _entry, _vector_entry in (
    (ENV_ID, "rlkd.envs.single:make_env", "rlkd.envs.vector:make_vector_env"),
    (FLAT_ENV_ID, "rlkd.envs.single:make_flat_env", "rlkd.envs.vector:make_flat_vector_env"),
):
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_entry, vector_entry_point=_vector_entry)

__all__ = [
    "CONTROLS",
    "ENV_ID",
    "FLAT_ENV_ID",
    "OBSERVATIONS",
    "ControlConfig",
    "DistillationEnv",
    "DistillationVectorEnv",
    "EnvConfig",
    "Episodes",
    "FlatDistillationEnv",
    "FlatDistillationVectorEnv",
    "FlattenAction",
    "Outcome",
    "Scenario",
    "build_scenario",
]
