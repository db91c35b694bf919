"""Damage the files that rlkd reads."""

import torch

from rlkd.agents.policy import TENSORS, Policy
from rlkd.agents.search import StaticSettings
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig


def some_policy(hidden: int = 5) -> Policy:
    """A small policy with random weights."""
    g = torch.Generator().manual_seed(0)
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(hidden, num_seen), (hidden,), (hidden, hidden), (hidden,), (num_set, hidden), (num_set,)]
    weights = {name: torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    static = StaticSettings(torch.rand(2, num_set, generator=g), torch.rand(2, 3, generator=g))
    mean, deviation = torch.rand(num_seen, generator=g), 0.1 + torch.rand(num_seen, generator=g)
    return Policy(weights, mean, deviation, torch.rand(num_set, generator=g), static, ControlConfig(step=0.2))
