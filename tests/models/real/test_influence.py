"""Blocks of least influence go first; the model is left as it was."""

from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import Tensor, nn

from rlkd.models.real import influence
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.cutting import StudentCut, student_from_teacher
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.influence import influential_blocks
from rlkd.models.real.pretrained import Kind

tiny_models.need_transformers()
FAMILIES: dict[str, Kind] = {
    **dict.fromkeys(("bert", "roberta", "electra", "distilbert", "llama_classifier"), "sequence_classification"),
    "vit": "image_classification",
    "llama": "causal_lm",
    "gpt2": "causal_lm",
}
OUT = {  # layers whose zeros make a block an identity of a model that normalises first
    "vit": ("attention.o_proj", "mlp.fc2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


def weaken(model: nn.Module, family: str, number: int, factor: float) -> None:
    """Multiply what a block adds to its input."""
    block = model.get_submodule(block_paths(model)[number])
    with torch.no_grad():
        for path in OUT[family]:
            for parameter in block.get_submodule(path).parameters():
                parameter.mul_(factor)


@pytest.mark.parametrize("family", OUT)
def test_blocks_that_add_least_go_first(family: str) -> None:
    model, inputs = tiny_models.tiny(family, layers=5), tiny_models.batch(family)
    for number, factor in ((0, 30.0), (1, 0.0), (2, 30.0), (3, 0.01), (4, 30.0)):
        weaken(model, family, number, factor)
    assert influential_blocks(model, inputs, 4) == [0, 2, 3, 4]
    assert influential_blocks(model, inputs, 3) == [0, 2, 4]
    assert influential_blocks(model, inputs, 5) == [0, 1, 2, 3, 4]


class Step(nn.Module):
    """Scales what it takes, then adds to its second feature."""

    def __init__(self, scale: float, added: float) -> None:
        super().__init__()
        self.scale, self.added = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor([0.0, added]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.added


class Chain(nn.Module):
    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_influence_is_measured_anew_after_each_removal() -> None:
    """Cosines by hand: (1, 0) -> (10, 0) -> (10, 3) -> (10, 8), and without the first block -> (1, 3) -> (1, 8)."""
    model, inputs = Chain(Step(10.0, 0.0), Step(1.0, 3.0), Step(1.0, 5.0)), {"x": torch.tensor([[1.0, 0.0]])}
    ten_three, ten_eight = torch.tensor([10.0, 3.0]), torch.tensor([10.0, 8.0])
    second, third = 1 - 10 / 109**0.5, 1 - float(torch.cosine_similarity(ten_three, ten_eight, dim=0))
    assert influence._influences(model, inputs, block_paths(model), [0, 1, 2]) == pytest.approx(
        [0.0, second, third], abs=1e-6
    )
    assert second < third  # measured once, the first two would go
    assert influential_blocks(model, inputs, 1) == [1]  # now 1 - 1 / sqrt(10) against 1 - 25 / sqrt(10 * 65)


def test_padding_does_not_count() -> None:
    entering, leaving = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert influence._influence(entering, leaving, torch.tensor([[1, 0]])) == pytest.approx(0.0)
    assert influence._influence(entering, leaving, torch.tensor([[1, 1]])) == pytest.approx(0.5)
    assert influence._influence(entering, leaving, None) == pytest.approx(0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_has_the_most_influential_blocks_and_its_teacher_is_unchanged(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, inputs = tiny_models.tiny(family, layers=4), tiny_models.batch(family)
    caplog.set_level("INFO", logger="rlkd")
    with torch.no_grad():
        before = logits_of(forward(teacher, inputs))
        cut = StudentCut(layers=2, keep="influence")
        student, chosen = student_from_teacher(teacher, FAMILIES[family], cut, inputs)
        assert chosen == influential_blocks(teacher, inputs, 2)
        numbers = tuple(number + 1 for number in chosen)
        named, _ = student_from_teacher(teacher, FAMILIES[family], StudentCut(blocks=numbers))
        torch.testing.assert_close(logits_of(forward(student, inputs)), logits_of(forward(named, inputs)))
        torch.testing.assert_close(logits_of(forward(teacher, inputs)), before)
    assert f"begins with blocks {list(numbers)} of the teacher" in caplog.text
    assert student_from_teacher(teacher, FAMILIES[family], StudentCut(layers=2, keep="spread"), inputs)[1] == [0, 3]
    assert student_from_teacher(teacher, FAMILIES[family], cut)[1] == [0, 3]  # no samples to measure it on
    by_default = student_from_teacher(teacher, FAMILIES[family], StudentCut(layers=2), inputs)[1]
    assert by_default == chosen


def test_blocks_that_make_no_student_give_way_to_spread_ones(caplog: pytest.LogCaptureFixture) -> None:
    """The first block of a T5 has a table that the others lack, so that it cannot be left out."""
    teacher: Any = architectures.tiny_model("T5ForSequenceClassification")
    end = teacher.config.eos_token_id
    inputs = {"input_ids": torch.tensor([[5, 6, 7, end], [8, 9, 4, end]])}
    caplog.set_level("INFO", logger="rlkd")
    with torch.no_grad():
        for name, parameter in teacher.get_submodule(block_paths(teacher)[0]).named_parameters():
            parameter.mul_(0.0 if name.endswith(("o.weight", "wo.weight")) else 1.0)
    influential = influential_blocks(teacher, inputs, 2)
    assert influential is not None
    assert 0 not in influential
    student, chosen = student_from_teacher(teacher, "sequence_classification", StudentCut(keep="influence"), inputs)
    assert chosen == [0, 3]
    assert len(block_paths(student)) == 2
    assert f"blocks {[n + 1 for n in influential]} have most influence, but make no student" in caplog.text


@pytest.mark.parametrize("name", ["ConvNextForImageClassification", "SwinForImageClassification"])
def test_a_model_in_stages_has_no_order(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = architectures.tiny_model(name)
    inputs = {"pixel_values": torch.randn(2, model.config.num_channels, 32, 32)}
    assert influential_blocks(model, inputs, 1) is None
    caplog.set_level("INFO", logger="rlkd")
    student_from_teacher(model, "image_classification", StudentCut(keep="influence"), inputs)
    assert "the influence of these blocks cannot be measured" in caplog.text
