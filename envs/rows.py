"""Rows of a single student's `metrics.jsonl`: the controls and validation metrics of one student's window."""

from torch import Tensor

from rlkd.envs.action import CONTROLS, decode
from rlkd.envs.episodes import Outcome
from rlkd.envs.scenario import EpisodeScenario
from rlkd.losses import FAMILIES
from rlkd.students import Controls


def window_row(window: int, u: Tensor, outcome: Outcome, scenario: EpisodeScenario) -> dict[str, float]:
    """Return unit controls `u` [1, 12], controls and validation metrics of a student's window, counted from 0.

    Latency is in seconds of one batch by the cost profile; energy in joules and MACs are of one sample.
    """
    controls = decode(u, scenario.config.controls, scenario.data.num_classes)
    return {
        "window": window + 1,
        **_named(controls),
        "step_size": scenario.step_size(float(controls.learning_rate[0])),
        **{f"u_{name}": float(u[0, i]) for i, name in enumerate(CONTROLS)},
        "score": float(outcome.score[0]),
        "accuracy": float(outcome.metrics.accuracy[0]),
        "margin": float(outcome.margin[0]),
        "macs_ratio": float(outcome.cost.macs_ratio[0]),
        "latency_ratio": float(outcome.cost.latency_ratio[0]),
        "energy_ratio": float(outcome.cost.energy_ratio[0]),
        "size_ratio": float(outcome.cost.size_ratio[0]),
        "latency_s": float(outcome.cost.latency_s[0]),
        "energy_j": float(outcome.cost.energy_j[0]),
        "macs": float(outcome.cost.macs[0]),
        "parameters": float(outcome.cost.parameters[0]),
        "first_exit_rate": float(outcome.metrics.exit_rates[0, 0]),
        "num_diverged": float(outcome.diverged[0]),
        "num_rollbacks": float(outcome.telemetry.num_rollbacks[0]),
    }


def _named(controls: Controls) -> dict[str, float]:
    named = {f"weight_{family}": float(controls.weights[0, i]) for i, family in enumerate(FAMILIES)}
    others = ("temperature", "feature_keep", "unit_keep", "exit_threshold", "learning_rate")
    return {**named, **{name: float(getattr(controls, name)[0]) for name in others}}
