"""Hooks on an ordinary module: what is caught is what the module computed."""

import pytest
import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.hooks import UnitScale, build_adapters, capture, link_places, link_table, pool, resolve


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.linear(x)
        return y, (y.softmax(-1) if y.shape[-1] > 3 else None)


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Pair(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x)[0])
        return x


X = torch.arange(24.0).reshape(2, 4, 3) / 24


def test_what_is_caught_is_the_module_s_output_and_carries_its_gradient() -> None:
    net = Net(4, 2)
    with capture(net, ["blocks.*", "blocks.1:1", "stem"]) as seen:
        y = net(X)
    assert set(seen) == {"stem", "blocks.0", "blocks.1", "blocks.1:1"}
    torch.testing.assert_close(torch.relu(seen["blocks.1"]), y)
    torch.testing.assert_close(seen["blocks.1:1"], seen["blocks.1"].softmax(-1))
    seen["blocks.0"].sum().backward()
    assert net.stem.weight.grad is not None
    seen.clear()
    net(X)
    assert not seen  # the hooks are gone


def test_patterns_keep_the_module_s_order_and_do_not_cross_dots() -> None:
    net = Net(4, 12)
    assert resolve(net, ["blocks.*"]) == [f"blocks.{i}" for i in range(12)]  # 2 before 10
    assert resolve(net, ["blocks.1", "blocks.[01]", "stem"]) == ["stem", "blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("place", "words"),
    [("block.1", "closest is blocks.1"), ("blocks.*.linar", "linear"), ("stem:x", "item 'x'"), ("", "no module")],
)
def test_a_wrong_place_names_the_closest(place: str, words: str) -> None:
    with pytest.raises(UserError, match="place") as error:
        resolve(Net(4, 2), [place])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_place_without_a_tensor_says_so() -> None:
    net = Net(3, 1)
    with pytest.raises(UserError, match=r"no tensor at item 1 .* eager"), capture(net, ["blocks.0:1"]):
        net(X)


def test_pooling_leaves_padding_out() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    pooled = pool(X, mask)
    torch.testing.assert_close(pooled, torch.stack([X[0, :2].mean(0), X[1].mean(0)]))
    torch.testing.assert_close(pool(X.reshape(2, 3, 2, 2)), X.reshape(2, 3, 4).mean(-1))
    torch.testing.assert_close(pool(X[:, 0]), X[:, 0])


def test_links_spread_over_the_teacher_and_adapt_the_width() -> None:
    links = link_places(Net(4, 2), Net(6, 5), ["blocks.*"], ["blocks.*"], X, X)
    assert [(k.student, k.teacher) for k in links] == [("blocks.0", "blocks.2"), ("blocks.1", "blocks.4")]
    assert [k.adapter for k in links] == ["linear 4 -> 6"] * 2
    adapted = build_adapters(links)[0](torch.zeros(2, 4))
    assert adapted.shape == (2, 6)
    same = link_places(Net(4, 2), Net(4, 2), ["blocks.1"], ["blocks.*"], X, X)
    assert (same[0].teacher, same[0].adapter) == ("blocks.1", "scale")
    lines = link_table(links).splitlines()
    assert len(lines) == 3
    assert "blocks.4" in lines[2]
    assert "[4, 6]" in lines[2]


def test_a_student_deeper_than_its_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="3 student places for 2"):
        link_places(Net(4, 3), Net(4, 2), ["blocks.*"], ["blocks.*"], X, X)


def test_a_copy_of_the_teacher_has_no_feature_loss_at_any_scale() -> None:
    hidden = 300.0 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))  # as large as a language model's
    teacher = hidden / hidden.square().mean().sqrt()  # what signals hold
    hidden.requires_grad_()
    adapter = build_adapters(link_places(Net(4, 2), Net(4, 2), ["blocks.1"], ["blocks.*"], X, X))[0]
    assert isinstance(adapter, UnitScale)
    adapter.find(hidden.detach())
    loss = (adapter(hidden) - teacher).square().mean()
    loss.backward()
    assert loss.item() < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max().item() < 1e-9
