"""Statistics of batch normalisation that a model has for a while."""

import pytest
import torch
from torch import nn

from rlkd.models.real.batch_norm import own_statistics


def model() -> nn.Sequential:
    """Normalisation of two channels whose running statistics are those of other inputs."""
    made = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
    made[0].running_mean.copy_(torch.tensor([10.0, 20.0]))
    made[0].num_batches_tracked.fill_(7)
    return made


def test_statistics_are_means_over_the_batches_and_only_for_a_while() -> None:
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    batches = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[5.0, 1.0], [9.0, 5.0]])]
    with own_statistics(made, lambda: [made(batch) for batch in batches]):
        # means 2 and 7, 0 and 3; unbiased variances 2 and 8, 0 and 8
        torch.testing.assert_close(made[0].running_mean, torch.tensor([4.5, 1.5]))
        torch.testing.assert_close(made[0].running_var, torch.tensor([5.0, 4.0]))
        torch.testing.assert_close(made(torch.tensor([[4.5, 3.5]])), torch.tensor([[0.0, 1.0]]))
        assert not made[0].training
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert made[0].momentum == 0.1
    assert not any(part.training for part in made.modules())


def test_an_error_puts_the_statistics_back() -> None:
    made = model()

    def fail() -> None:
        made(torch.ones(4, 2))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), own_statistics(made, fail):
        pass
    assert made[0].running_mean.tolist() == [10.0, 20.0]
    assert not made[0].training


def test_a_model_without_batch_normalisation_is_not_called() -> None:
    def fail() -> None:
        raise AssertionError("called")

    with own_statistics(nn.Linear(2, 2), fail), own_statistics(nn.BatchNorm1d(2, track_running_stats=False), fail):
        pass
