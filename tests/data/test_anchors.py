"""Perplexity between two anchors, by hand."""

import math

import pytest
import torch

from rlkd.data.anchors import Anchors


def test_quality_by_hand() -> None:
    anchors = Anchors(worst=16.0, best=1.0)
    nats = torch.tensor([math.log(16), math.log(4), 0.0, math.log(32), math.log(2)])
    torch.testing.assert_close(anchors.quality(nats), torch.tensor([0.0, 0.5, 1.0, 0.0, 0.75]))
    narrow = Anchors(worst=100.0, best=10.0)
    assert float(narrow.quality(torch.tensor(math.log(10**1.5)))) == pytest.approx(0.5)
    assert float(narrow.quality(torch.tensor(math.log(5.0)))) == 1.0  # better than best
