"""What an experiment is made of, as frozen dataclasses; the YAML files beside this hold their values.

The command line and the YAML files share one set of keys: `--task.label_noise.high 0.5` and
`task: {label_noise: {high: 0.5}}` are the same.
"""

if __name__ == "configs":
    raise ImportError("import this package as rlkd.configs, not as configs")

from rlkd.configs.schema import CompareConfig, ComparisonConfig, DistilConfig, ExperimentConfig, OnlineConfig

__all__ = ["CompareConfig", "ComparisonConfig", "DistilConfig", "ExperimentConfig", "OnlineConfig"]
