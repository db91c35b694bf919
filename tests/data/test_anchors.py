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


def test_perplexity_is_the_inverse() -> None:
    anchors = Anchors(worst=50.0, best=3.0)
    for perplexity in (3.0, 7.5, 50.0):
        quality = anchors.quality(torch.tensor(math.log(perplexity), dtype=torch.float64))
        assert anchors.perplexity(float(quality)) == pytest.approx(perplexity)
