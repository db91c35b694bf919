"""What experiments/ideas.py builds on: that each idea changes what it says, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
from idea_agents import NUM_PRIVILEGED, VARIANTS, PrivilegedVecEnv, controller_of, new_agent
from idea_students import ScaledPopulation, Scales, put_back, scaled
from ideas import joined, verdict
from stable_baselines3.common.policies import ActorCriticPolicy

from rlkd.agents.controllers import hold_start, run
from rlkd.agents.policy import Policy
from rlkd.agents.ppo import PPOConfig
from rlkd.agents.search import Shortlist
from rlkd.envs import World
from rlkd.envs.episodes import Episodes
from rlkd.envs.observation import OBSERVATIONS

PPO = PPOConfig(num_students=6, num_iterations=1, batch_size=12, num_epochs=1, hidden=8)


def trained(world: World, scales: Scales, num_windows: int = 1) -> tuple[Episodes, ScaledPopulation]:
    episodes = Episodes(scaled(world, scales), 2)
    episodes.reset([3, 4])
    for _ in range(num_windows):
        episodes.step(episodes.start)
    students = episodes.students
    assert isinstance(students, ScaledPopulation)
    return episodes, students


def one_step(world: World) -> World:
    train = dataclasses.replace(world.config.train, steps_per_window=1)
    return dataclasses.replace(world, config=dataclasses.replace(world.config, train=train))


def test_factors_of_one_change_nothing(world: World) -> None:
    plain = Episodes(world, 2)
    plain.reset([3, 4])
    plain.step(plain.start)
    for scales in (Scales(), Scales(units=(1.0, 1.0))):
        for name, value in trained(world, scales)[1].state_dict().items():
            assert torch.equal(value, plain.students.state_dict()[name]), name


def test_each_group_goes_its_share_of_a_step(world: World) -> None:
    world = one_step(world)
    begin = trained(world, Scales(), 0)[1].state_dict()
    whole = trained(world, Scales())[1].state_dict()
    scaled_down = trained(world, Scales(rates=(0.0, 0.5, 2.0)))[1].state_dict()
    factors = {"layers.0.weight": 0.0, "layers.1.weight": 0.5, "heads.0.weight": 2.0, "adapter.weight": 2.0}
    for name, factor in factors.items():
        went = whole[name] - begin[name]
        assert went.abs().max() > 1e-4  # Adam's first step
        torch.testing.assert_close(scaled_down[name] - begin[name], factor * went, atol=1e-7, rtol=0)


def test_each_block_keeps_its_share_of_units(world: World) -> None:
    episodes, students = trained(world, Scales(units=(0.5, 2.0)), 0)
    position = episodes.start.clone()
    position[:, 6:8] = 0.5  # input share and unit share in the middle of their log ranges
    _, plain = trained(world, Scales(), 0)
    for made in (students, plain):
        episodes.students = made
        episodes.step(position)
    share = (0.05 * 1.0) ** 0.5  # the geometric mean of the range's ends
    assert [int(mask[0].sum()) for mask in plain.masks()[1:]] == [round(48 * share)] * 2
    assert [int(mask[0].sum()) for mask in students.masks()[1:]] == [round(24 * share), round(96 * share)]
    assert torch.equal(students.masks()[0], plain.masks()[0])


def test_students_that_go_back_leave_the_others_and_the_batches(world: World) -> None:
    episodes, students = trained(world, Scales())
    before = students.training_state()
    episodes.step(episodes.start)
    after = students.training_state()
    put_back(students, before, torch.tensor([True, False]))
    now = students.training_state()
    weight = "parameters.student.layers.0.weight"
    assert torch.equal(now[weight][0], before[weight][0])
    assert torch.equal(now[weight][1], after[weight][1])
    assert torch.equal(now["num_updates"], torch.stack([before["num_updates"][0], after["num_updates"][1]]))
    assert torch.equal(now["batches"], after["batches"])
    assert not torch.equal(before[weight][0], after[weight][0])


@pytest.fixture
def policy(world: World) -> Policy:
    size = len(OBSERVATIONS)
    static = Shortlist(torch.full((1, 9), 0.5), torch.zeros(1, 3))
    return Policy({}, torch.zeros(size), torch.ones(size), world.plan, static, world.config.controls)


def test_only_the_critic_sees_privileged_figures(world: World, policy: Policy) -> None:
    agent, env = new_agent(VARIANTS["privileged"], [world], policy, PPO, 0)
    assert isinstance(env, PrivilegedVecEnv)
    seen = env.reset()
    tasks = env.envs[0].episodes.tasks
    reached = run(world, hold_start, [task.seed for task in tasks], world.config.task, final_split="validation").score
    np.testing.assert_allclose(seen[:, -1], (reached - 0.8) / 0.1, atol=1e-5)
    np.testing.assert_allclose(seen[:, -3], [(task.label_noise - 0.4) / 0.25 for task in tasks], atol=1e-5)
    assert env.num_references == PPO.num_students
    networks = agent.policy
    assert isinstance(networks, ActorCriticPolicy)
    torch.nn.init.normal_(networks.action_net.weight)
    other = torch.from_numpy(seen).clone()
    other[:, -NUM_PRIVILEGED:] += 1.0
    both = [networks.get_distribution(x).distribution.mean for x in (torch.from_numpy(seen), other)]
    assert torch.equal(*both)
    assert not torch.equal(networks.predict_values(torch.from_numpy(seen)), networks.predict_values(other))


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_an_agent_that_has_learned_nothing_is_the_plan(world: World, policy: Policy) -> None:
    agent, _ = new_agent(VARIANTS["plain"], [world], policy, PPO, 0)
    episodes = Episodes(world, 2)
    observation = episodes.reset([1, 2])
    controller = controller_of(agent, policy)
    assert torch.equal(controller(observation, episodes, 0), hold_start(observation, episodes, 0))
    torch.nn.init.normal_(agent.policy.action_net.weight)
    assert not torch.equal(controller(observation, episodes, 0), hold_start(observation, episodes, 0))


def row(what: str, difference: float, low: float, **more: object) -> dict[str, object]:
    return {"what": what, "difference": difference, "ci95": [low, 2 * difference - low], "bound": False, **more}


def test_a_verdict_needs_every_row_of_a_way() -> None:
    assert verdict([row("a", 0.004, 0.001), row("a", 0.002, 0.0005)]) == "worth keeping (a)"
    assert verdict([row("a", 0.004, 0.001), row("a", 0.002, -0.001)]).startswith(
        "not kept; the largest lead is +0.0040"
    )
    assert verdict([row("a", 0.002, 0.001)]).startswith("not kept")
    assert verdict([row("a", 0.01, 0.005) | {"bound": True}, row("b", 0.0, -0.1)]).endswith("(b)")


def test_other_seeds_of_an_agent_stay() -> None:
    old = {"rows": [row("a", 0.1, 0.0, seed=0), row("a", 0.2, 0.0, seed=1)], "num_trainings": 5, "wall_s": 1.0}
    new = {"rows": [row("a", 0.3, 0.0, seed=1)], "num_trainings": 3, "wall_s": 2.0}
    kept = joined(old, new)
    assert [r["difference"] for r in kept["rows"]] == [0.1, 0.3]
    assert joined(None, new) == new
