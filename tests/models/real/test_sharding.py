"""Models whose weights cannot be sharded."""

import pytest
import torch
from torch import nn

from rlkd.errors import UserError
from rlkd.models.real.sharding import shard_weights


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norms_are_refused_before_anything_is_sharded(norm: type[nn.Module]) -> None:
    with pytest.raises(UserError, match=r"train\.shard: got a model with batch norms"):
        shard_weights(nn.Sequential(nn.Linear(2, 2), norm(2)), [], torch.device("cpu"), "train.shard")
