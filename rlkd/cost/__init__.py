"""What one inference costs: MACs counted, latency from a measured profile, energy from a labelled estimate."""

from rlkd.cost.profile import Cost, CostConfig, CostProfile, load_or_calibrate, load_profile, save_profile
from rlkd.cost.timing import calibrate, median_latency_s
from rlkd.cost.workload import Workload, dense_workload, workload

__all__ = [
    "Cost",
    "CostConfig",
    "CostProfile",
    "Workload",
    "calibrate",
    "dense_workload",
    "load_or_calibrate",
    "load_profile",
    "median_latency_s",
    "save_profile",
    "workload",
]
