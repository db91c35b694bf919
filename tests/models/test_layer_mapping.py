from itertools import pairwise

import pytest
import torch
from torch import nn

from rlkd.models.adapters import DomainNorm
from rlkd.models.layer_mapping import LayerHints, Pair, active_pairs, layer_paths, map_layers


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), nn.Sequential(*layers), nn.Linear(sizes[-1], 3))


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [(3, 3, [1, 2, 3]), (2, 6, [3, 6]), (3, 4, [2, 3, 4]), (4, 2, [1, 1, 2, 2]), (1, 5, [5])],
)
def test_layers_at_the_same_relative_depth_are_paired(n: int, m: int, expected: list[int]) -> None:
    student, teacher = [f"s{i}" for i in range(1, n + 1)], [f"t{i}" for i in range(1, m + 1)]
    assert map_layers(student, teacher) == [Pair(s, f"t{t}") for s, t in zip(student, expected, strict=True)]


def test_paths_are_those_of_the_repeated_layers() -> None:
    assert layer_paths(mlp(4, 5, 6, 7)) == ["1.0", "1.1", "1.2"]
    with pytest.raises(ValueError, match="give module paths"):
        layer_paths(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 and 1 layers"):
        map_layers([], ["a"])


def test_stages_add_deeper_pairs() -> None:
    assert [active_pairs(6, 3, progress) for progress in (0.0, 0.3, 0.34, 0.67, 1.0)] == [2, 2, 4, 6, 6]
    assert active_pairs(4, 1, 0.0) == 4
    assert active_pairs(2, 4, 0.0) == 1


def test_progressive_hints_bring_students_of_other_depth_near() -> None:
    torch.manual_seed(0)
    teacher, student, inputs = mlp(4, 8, 8, 8, 8), mlp(4, 5, 6), torch.randn(40, 4)
    hints = LayerHints(student, teacher, map_layers(layer_paths(student), layer_paths(teacher)), inputs[:2])
    assert hints.pairs == [Pair("1.0", "1.1"), Pair("1.1", "1.3")]
    optimizer = torch.optim.Adam([*student.parameters(), *hints.parameters()], lr=0.01)
    losses = []
    teacher(inputs)
    for step in range(60):
        student(inputs)
        loss = hints.loss(active_pairs(len(hints.pairs), 2, step / 60))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:  # the deeper pair waits for its stage
            assert hints.adapters[1].weight.grad is None
        optimizer.step()
        losses.append(loss.item())
    assert hints.adapters[1].weight.grad is not None
    assert losses[29] < losses[0]
    assert losses[-1] < losses[30]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_domain_has_statistics_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(64, 3, generator=generator), 5 + 2 * torch.randn(64, 3, generator=generator)
    layer = DomainNorm(3, 2)
    for _ in range(60):
        layer(first, 0), layer(second, 1)
    layer.eval()
    for domain, features in enumerate((first, second)):
        torch.testing.assert_close(layer(features, domain).mean(0), torch.zeros(3), atol=0.05, rtol=0)
        torch.testing.assert_close(layer(features, domain).std(0), torch.ones(3), atol=0.05, rtol=0)
    assert layer(second, 0).mean() > 2  # the wrong domain's statistics do not fit
