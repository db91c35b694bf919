"""Two and three exits by hand, and the exact gradient against the mean of sampled exits."""

import math

import pytest
import torch
from torch import Tensor

from rlkd.losses.exit_gate import exit_probabilities, exit_rewards, expected_reward


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_who_left_at_the_first_exit_cannot_leave_at_the_second() -> None:
    gates = (torch.tensor([logit(0.5), logit(0.9)]), torch.tensor([logit(0.2), logit(0.5)]))
    # sample 1: 0.5, 0.5 * 0.2, 0.5 * 0.8; sample 2: 0.9, 0.1 * 0.5, 0.1 * 0.5
    wanted = [[0.5, 0.9], [0.1, 0.05], [0.4, 0.05]]
    torch.testing.assert_close(exit_probabilities(gates), torch.tensor(wanted))


@pytest.mark.parametrize("z", [-200.0, 200.0])
def test_a_certain_gate_has_finite_gradients(z: float) -> None:
    gate = torch.tensor([z, 0.0], requires_grad=True)
    probabilities = exit_probabilities((gate,))
    assert probabilities[:, 0].tolist() == [float(z > 0), float(z < 0)]
    (probabilities[0] * torch.tensor([2.0, 3.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert gate.grad is not None
    assert gate.grad.tolist() == pytest.approx([0.0, 0.75])  # 3 g (1 - g) at g = 1/2


def test_a_right_answer_earns_the_accuracy_weight_less_the_cost_of_its_exit() -> None:
    early = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # answers 0, 1
    late = torch.tensor([[0.0, 1.0], [0.0, 3.0]])  # answers 1, 1
    rewards = exit_rewards((early, late), torch.tensor([0, 0]), torch.tensor(0.6), torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(rewards, torch.tensor([[0.5, -0.1], [-0.3, -0.3]]))


def test_the_expected_reward_and_its_gradient_by_hand() -> None:
    gate = torch.tensor([logit(0.25), logit(0.5)], requires_grad=True)
    rewards = torch.tensor([[0.5, -0.1], [-0.3, 0.7]])
    value = expected_reward((gate,), rewards)
    # (0.25 * 0.5 - 0.75 * 0.3 + 0.5 * -0.1 + 0.5 * 0.7) / 2
    assert value.item() == pytest.approx((-0.1 + 0.3) / 2)
    value.backward()  # type: ignore[no-untyped-call]
    assert gate.grad is not None  # g (1 - g) (R_early - R_late) / 2
    assert gate.grad.tolist() == pytest.approx([0.1875 * 0.8 / 2, 0.25 * -0.8 / 2])


def test_the_exact_gradient_is_the_mean_of_the_sampled_one() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(2, 1, generator=generator, requires_grad=True)
    rewards = torch.tensor([[0.5], [0.1], [0.9]])
    expected_reward(tuple(gates), rewards).backward()  # type: ignore[no-untyped-call]
    exact = gates.grad
    probabilities = exit_probabilities(tuple(gates))[:, 0]  # [3]
    drawn = torch.multinomial(probabilities, 20_000, replacement=True, generator=generator)
    surrogate = (probabilities[drawn].log() * rewards[drawn, 0]).mean()  # REINFORCE
    (sampled,) = torch.autograd.grad(surrogate, gates)
    assert exact is not None
    torch.testing.assert_close(sampled, exact, atol=5e-3, rtol=0)


def test_rewards_carry_no_gradient_to_the_answers() -> None:
    logits = torch.tensor([[1.0, 0.0]], requires_grad=True)
    rewards: Tensor = exit_rewards((logits, logits), torch.tensor([0]), torch.tensor(0.6), torch.zeros(2))
    assert not rewards.requires_grad
