"""Knowledge distillation to a goal, steered by a policy that reinforcement learning has learned.

The names below are the public interface; each is loaded on first use, so that `import rlkd` takes no time and a shipped
student loads with torch and safetensors alone.

The core (this package less `envs`, `agents`, `cli`) distils a student under given controls and knows nothing of
reinforcement learning. Imports run core <- envs <- agents <- cli.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_PUBLIC = {
    "ControlConfig": "rlkd.envs.action",
    "DataSet": "rlkd.data",
    "EnvConfig": "rlkd.envs.scenario",
    "Goal": "rlkd.data",
    "Preference": "rlkd.data",
    "Result": "rlkd.api",
    "SB3VecEnv": "rlkd.envs.sb3",
    "Scenario": "rlkd.envs.scenario",
    "StudentConfig": "rlkd.models",
    "UserError": "rlkd.errors",
    "build_scenario": "rlkd.envs.scenario",
    "distil": "rlkd.api",
    "load_policy": "rlkd.api",
    "load_student": "rlkd.compression.loading",
    "loss_term": "rlkd.losses.registry",
    "make_env": "rlkd.envs.single",
    "make_flat_env": "rlkd.envs.single",
    "make_sb3_env": "rlkd.envs.sb3",
    "policy_from_sb3": "rlkd.agents.policy.sb3",
    "register_dataset": "rlkd.data",
    "save_policy": "rlkd.api",
}

if TYPE_CHECKING:
    from rlkd.agents.policy.sb3 import policy_from_sb3
    from rlkd.api import Result, distil, load_policy, save_policy
    from rlkd.compression.loading import load_student
    from rlkd.data import DataSet, Goal, Preference, register_dataset
    from rlkd.envs.action import ControlConfig
    from rlkd.envs.sb3 import SB3VecEnv, make_sb3_env
    from rlkd.envs.scenario import EnvConfig, Scenario, build_scenario
    from rlkd.envs.single import make_env, make_flat_env
    from rlkd.errors import UserError
    from rlkd.losses.registry import term as loss_term
    from rlkd.models import StudentConfig

__all__ = [
    "ControlConfig",
    "DataSet",
    "EnvConfig",
    "Goal",
    "Preference",
    "Result",
    "SB3VecEnv",
    "Scenario",
    "StudentConfig",
    "UserError",
    "build_scenario",
    "distil",
    "load_policy",
    "load_student",
    "loss_term",
    "make_env",
    "make_flat_env",
    "make_sb3_env",
    "policy_from_sb3",
    "register_dataset",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlkd' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = getattr(module, {"loss_term": "term"}.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
