import math

import pytest
import torch
import torch.nn.functional as F

from rlkd.teachers.several import TeacherGate, chain, combine, confidence_weights, mean_weights

LOGITS = torch.tensor([[[3.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 3.0]]]).log()  # (3/4, 1/4), (1/2, 1/2); and back
LABELS = torch.tensor([0, 0])


def test_combine_weighs_each_sample() -> None:
    signals = torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]])
    weights = torch.tensor([[0.25, 1.0], [0.75, 0.0]])
    assert combine(signals, weights).tolist() == [[2.5], [2.0]]
    assert combine(signals, mean_weights(LOGITS)).tolist() == [[2.0], [4.0]]
    with pytest.raises(ValueError, match=r"weights \[2\].*expand"):
        combine(signals, torch.ones(2))


def test_confidence_weights_by_hand() -> None:
    # exp(CE) is 1 / p_label: 4/3 and 2 for the first sample, 2 and 4 for the second
    expected = torch.tensor([[2 / (10 / 3), 4 / 6], [(4 / 3) / (10 / 3), 2 / 6]])
    # the paper's softmax runs over CE, so exp(CE_k) over its sum
    torch.testing.assert_close(confidence_weights(LOGITS, LABELS), expected)
    with pytest.raises(ValueError, match="at least 2"):
        confidence_weights(LOGITS[:1], LABELS)


def test_a_gate_begins_as_the_mean_and_learns_who_knows_what() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    right = F.one_hot(labels, 4) * 3.0
    noise = torch.randn(2, 200, 4, generator=generator)
    # the first teacher knows classes 0 and 1, the second the others
    knows = torch.stack([labels < 2, labels >= 2])
    logits = noise * 0.3 + right * knows[..., None]
    gate = TeacherGate(2, 4)
    torch.testing.assert_close(gate(logits), mean_weights(logits))
    mixture = (logits.softmax(-1).mean(0))[torch.arange(200), labels]
    assert gate.loss(logits, labels).item() == pytest.approx(-mixture.log().mean().item(), rel=1e-5)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(100):
        loss = gate.loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = gate(logits)
    torch.testing.assert_close(weights.sum(0), torch.ones(200))
    assert weights[0, labels < 2].mean() > 0.8
    assert weights[1, labels >= 2].mean() > 0.8
    assert loss.item() < -math.log(0.6)


def test_each_student_of_a_chain_is_taught_by_the_one_before() -> None:
    pairs = []
    assert chain("teacher", ["large", "small"], lambda student, teacher: pairs.append((student, teacher))) == "small"
    assert pairs == [("large", "teacher"), ("small", "large")]
