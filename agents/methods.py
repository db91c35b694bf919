"""The controllers that `rlkd compare --methods` knows, built for a world."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlkd.agents.controllers import Controller, published, run, schedule
from rlkd.agents.policy import Policy
from rlkd.agents.search import StaticSettings
from rlkd.envs.world import World
from rlkd.errors import UserError

NUM_ABLATION_TASKS = 128

METHODS = {
    "policy": "closed loop: the learned policy (needs --policy)",
    "static": "best static setting of the search, or of the policy's own, for the preference",
    "published": "CE : KL : feature : attention = 0.5 : 0.3 : 0.15 : 0.05, T = 4, the whole student",
    "schedule": "temperature 5 to 1, kept units 0.8 to 0.3, weight from teacher to labels, cosine learning rate",
    "open_loop": "the policy's mean schedule over training tasks, blind to the student (needs --policy)",
    "mean_action": "the policy's mean setting over training tasks, held constant (needs --policy)",
}
NEED_POLICY = ("policy", "open_loop", "mean_action")


def build_methods(
    names: list[str],
    world: World,
    policy: Policy | None,
    static: StaticSettings | None,
    seed: int,
    on_window: Callable[[int], object],
) -> dict[str, Controller]:
    """The named controllers. The two ablations of a policy read its mean behaviour off fresh training tasks."""
    methods: dict[str, Controller] = {}
    for name in names:
        if name in NEED_POLICY and policy is None:
            raise UserError(f"--methods: {name!r} needs a policy; give its folder with --policy")
        if name == "policy" and policy is not None:
            methods[name] = policy.controller()
        elif name == "static" and static is not None:
            methods[name] = static.controller()
        elif name == "published":
            methods[name] = published(world.config.controls)
        elif name == "schedule":
            methods[name] = schedule(world.config.controls, world.config.num_windows)
        elif policy is not None:
            methods[name] = _blind(name, mean_offsets(world, policy, seed, on_window))
    return methods


def mean_offsets(world: World, policy: Policy, seed: int, on_window: Callable[[int], object]) -> Tensor:
    """[W, 9], the policy's mean distance from the start setting in every window over training tasks."""
    offsets: list[Tensor] = []
    controller = policy.controller()

    def recorded(observation: Tensor, start: Tensor, window: int) -> Tensor:
        position = controller(observation, start, window)
        offsets.append((position - start).mean(0))
        return position

    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**59, (NUM_ABLATION_TASKS,), generator=generator).tolist()
    run(world, recorded, seeds, world.config.task, final_split="validation", on_window=on_window)
    return torch.stack(offsets)


def _blind(name: str, offsets: Tensor) -> Controller:
    """The mean schedule, or its mean held constant, around each student's start setting."""
    schedule_of = offsets if name == "open_loop" else offsets.mean(0, keepdim=True).expand_as(offsets)
    return lambda observation, start, window: (start + schedule_of[min(window, len(schedule_of) - 1)]).clamp(0.0, 1.0)
