import pytest
import torch

from rlkd.models.adapters import (
    Bottleneck,
    adapter,
    pooled,
    positions_to_tokens,
    resample_tokens,
    tokens_to_positions,
)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("linear", (2, 5), (2, 7)),
        ("linear", (2, 3, 5), (2, 3, 7)),
        ("conv", (2, 5, 4, 4), (2, 7, 4, 4)),
        ("bottleneck", (2, 3, 5), (2, 3, 7)),
    ],
)
def test_adapters_bring_features_to_the_teachers_width(
    kind: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert adapter(kind, 5, 7)(torch.ones(shape)).shape == expected  # type: ignore[arg-type]


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="linear, conv, bottleneck"):
        adapter("mlp", 2, 3)  # type: ignore[arg-type]


def test_a_bottleneck_begins_as_its_residual_path() -> None:
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Bottleneck(4, 4)(features), features)
    wide = Bottleneck(4, 6)
    torch.testing.assert_close(wide(features), wide.shortcut(features))
    wide(features).square().sum().backward()
    assert wide.up.weight.grad is not None
    assert wide.up.weight.grad.abs().sum() > 0


def test_tokens_and_positions_lead_to_each_other() -> None:
    features = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    tokens = positions_to_tokens(features, 16)
    assert tokens.shape == (2, 16, 3)
    torch.testing.assert_close(tokens_to_positions(tokens, 4, 4), features)
    with_class = torch.cat([torch.full((2, 1, 3), 99.0), tokens], 1)
    torch.testing.assert_close(tokens_to_positions(with_class, 4, 4), features)
    torch.testing.assert_close(tokens_to_positions(tokens, 1, 1).flatten(1), pooled(features))
    with pytest.raises(ValueError, match="got 7 tokens"):
        tokens_to_positions(torch.zeros(1, 7, 3), 2, 2)


def test_fewer_tokens_are_means_and_more_lie_between() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]])
    torch.testing.assert_close(resample_tokens(tokens, 2), torch.tensor([[[2.0], [6.0]]]))
    more = resample_tokens(tokens, 8)
    assert more.shape == (1, 8, 1)
    assert (more.diff(dim=1) >= 0).all()
