"""A learned plan that nobody trained: random networks, the same for the same numbers."""

import torch

from rlkd.envs.action import NUM_CONTROLS
from rlkd.envs.schedule import ControlPlan, PhaseNetwork, network_shapes


def network_plan(starts: tuple[float, ...], num_networks: int, hidden: int = 6, seed: int = 0) -> ControlPlan:
    g = torch.Generator().manual_seed(seed)
    networks = []
    for phase in range(num_networks):
        shapes = network_shapes(phase, len(starts), hidden)
        drawn = {name: torch.randn(*shape, generator=g) / shape[0] ** 0.5 for name, shape in shapes.items()}
        layers = tuple(drawn[f"layers.{k}"] for k in range(6))
        half = torch.full(shapes["mean"], 0.5)  # in the middle of what random observations are
        networks.append(PhaseNetwork(phase, half, half.clone(), layers))
    return ControlPlan(starts, torch.full((len(starts), NUM_CONTROLS), 0.5), tuple(networks))
