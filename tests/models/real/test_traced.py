"""Units of modules of any class: which are found, and that cutting them out changes no answer of the masked module."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from rlkd.compression.real.choice import unit_masks
from rlkd.compression.real.cut import ship
from rlkd.compression.real.own import load_own_module, own_weights
from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.errors import UserError
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.blocks import block_paths, group_importance, mask_groups
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.shrink import cut_group, zero_group
from rlkd.models.real.traced import free_exits, traced_groups


class Convolutional(nn.Module):
    """A residual connection holds the channels of the second convolution fast; the others can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 5, 1)])
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(5 * 4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.body[0](image)))
        hidden = self.body[1](hidden)
        hidden = hidden + hidden.mean()
        hidden = torch.relu(self.body[2](hidden))
        return self.head(nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1))


class Branching(nn.Module):
    """Control flow that depends on data: it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](rows)
        return self.layers[1](hidden if hidden.sum() > 0 else -hidden)


MODELS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)
        ),
        (4,),
        [("0", "3", 8, 1, ("1",)), ("3", "5", 6, 1, ())],
    ),
    "convolutions": (
        Convolutional,
        (1, 6, 6),
        [("body.0", "body.1", 6, 1, ("norm",)), ("body.2", "head", 5, 4, ())],
    ),
    "rows": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3), nn.Flatten(), nn.Linear(20, 3)),
        (2, 8),
        [("0", "2", 4, 1, ()), ("2", "4", 5, 4, ())],
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_units_with_one_reader_are_found_and_cut(name: str) -> None:
    make, shape, expected = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    model(torch.randn(16, *shape))  # running statistics of their own
    model.eval()
    groups = traced_groups(model, block_paths(model))
    assert [(g.writers[0], g.reader, g.size, g.width, g.norms) for g in groups] == expected
    assert [len(score) for score in group_importance(model, groups)] == [g.size for g in groups]
    masks = tuple((torch.arange(g.size) % 3 != 1).float() for g in groups)
    inputs = torch.randn(5, *shape)
    handles = mask_groups(model, groups, lambda: masks)
    masked = model(inputs)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(masked, model(inputs), atol=1e-4)
    small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    for group, mask in zip(groups, masks, strict=True):
        cut_group(small, group, mask)
        zero_group(zeroed, group, mask)
    torch.testing.assert_close(small(inputs), masked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(zeroed(inputs), masked, atol=1e-5, rtol=1e-5)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, zeroed, model)]
    assert sizes[0] < sizes[1] == sizes[2]
    loaded = load_own_module(make(), own_weights(small), "student")
    assert torch.equal(loaded(inputs), small(inputs))


def test_what_cannot_be_traced_keeps_its_units() -> None:
    model = Branching()
    assert traced_groups(model, block_paths(model)) == []


def test_a_layer_that_is_used_twice_keeps_its_units() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    assert [g.writers for g in traced_groups(model, block_paths(model))] == []


def test_exits_stand_where_no_units_cross() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    blocks = block_paths(model)
    assert free_exits(traced_groups(model, blocks), blocks) == [1]
    assert free_exits([], blocks) == [1, 2, 3, 4, 5]


class Residual(nn.Module):
    """Adds to its input what two layers make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_blocks_of_an_own_module_are_skipped_and_loaded_into_its_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(3)), nn.Linear(6, 2)).eval()
    inputs = {"input": torch.rand(5, 6)}
    plan = make_plan(model, inputs, AttachConfig(blocks="[012]", exits=(), units="depth"), None)
    with torch.no_grad(), Instrumented(model, plan, []).eval() as student:
        masks = unit_masks(plan, group_importance(model, plan.groups), torch.tensor(0.5))
        wanted = student(inputs, masks, 1.0).logits[-1]
        assert not torch.allclose(wanted, model(inputs["input"]), atol=1e-4)
        shipped = ship(student, "module", masks, 1.0, 1.0)
        assert shipped.shipment.skipped == (plan.blocks[plan.order[-1] - 1],)
        save_module_student(shipped, tmp_path / "s", None, {})
        for answers in (shipped, load_module_student(tmp_path / "s", student.clean_copy())):
            torch.testing.assert_close(answers(**inputs), wanted, atol=1e-5, rtol=1e-5)


def test_weights_of_another_class_are_refused() -> None:
    blob = own_weights(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(UserError, match="give a module of the class"):
        load_own_module(nn.Linear(4, 3), blob, "file")
    with pytest.raises(UserError, match=r"another number of axes|expected|does not fit"):
        load_own_module(nn.Sequential(nn.Conv1d(4, 3, 2)), blob, "file")
