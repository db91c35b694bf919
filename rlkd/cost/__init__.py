"""Cost of one inference: counted MACs, latency from a measured profile, energy from a labelled estimate."""

from rlkd.cost.profile import Cost, CostConfig, CostProfile, load_profile, save_profile
from rlkd.cost.timing import calibrate, compare_latency, load_or_calibrate, time_calls
from rlkd.cost.workload import Workload, dense_workload, workload

__all__ = [
    "Cost",
    "CostConfig",
    "CostProfile",
    "Workload",
    "calibrate",
    "compare_latency",
    "dense_workload",
    "load_or_calibrate",
    "load_profile",
    "save_profile",
    "time_calls",
    "workload",
]
