"""Students cut from teachers of every build: smaller, or refused in one line."""

from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import nn

from rlkd.errors import UserError
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.cutting import StudentCut, drop_blocks, student_from_teacher
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.pretrained import Kind

tiny_models.need_transformers()
TEXT: Kind = "sequence_classification"


def num_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["BartForSequenceClassification", "T5ForSequenceClassification"])
def test_an_encoder_decoder_loses_blocks_of_its_decoder(name: str) -> None:
    teacher = architectures.tiny_model(name)
    student, chosen = student_from_teacher(teacher, TEXT, StudentCut())
    assert chosen == [0, 3]
    assert (len(block_paths(teacher)), len(block_paths(student))) == (4, 2)
    path = block_paths(teacher)[0].rpartition(".")[0]
    ours, theirs = student.state_dict(), teacher.state_dict()
    for key in ours:
        source = key.replace(f"{path}.1.", f"{path}.3.") if key.startswith(f"{path}.1.") else key
        torch.testing.assert_close(ours[key], theirs[source])


def test_marks_of_blocks_follow_the_blocks() -> None:
    teacher: Any = architectures.tiny_model("SmolLM3ForCausalLM")
    assert teacher.config.no_rope_layers == [1, 1, 1, 0]  # numbers, one a block, that are no depths of stages
    student, chosen = student_from_teacher(teacher, "causal_lm", StudentCut())
    described: Any = student.config
    assert chosen == [0, 3]
    assert described.no_rope_layers == [1, 0]
    assert len(block_paths(student)) == 2


def test_a_block_that_runs_repeatedly_runs_less_often() -> None:
    teacher: Any = architectures.tiny_model("AlbertForSequenceClassification")
    student: Any = student_from_teacher(teacher, TEXT, StudentCut())[0]
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (4, 2)
    assert num_weights(student) == num_weights(teacher)  # it has one block for all


@pytest.mark.parametrize("name", ["ConvNextForImageClassification", "SwinForImageClassification"])
def test_a_model_in_stages_loses_half_of_every_stage(name: str) -> None:
    teacher: Any = architectures.tiny_model(name)
    student: Any = student_from_teacher(teacher, "image_classification", StudentCut())[0]
    assert (teacher.config.depths, student.config.depths) == ([2, 2], [1, 1])
    assert num_weights(student) < num_weights(teacher)
    with pytest.raises(UserError, match="cannot be cut into 1 layers") as error:
        student_from_teacher(teacher, "image_classification", StudentCut(layers=1))
    assert "\n" not in str(error.value)


def test_the_names_of_a_backbones_stages_follow() -> None:
    teacher = architectures.tiny_model("Dinov2ForImageClassification")
    student: Any = student_from_teacher(teacher, "image_classification", StudentCut())[0]
    assert student.config.stage_names == ["stem", "stage1", "stage2"]
    assert student.config.out_features == ["stage2"]


def test_a_model_of_a_class_of_its_own_stays_of_that_class() -> None:
    teacher = architectures.tiny_model("DeiTForImageClassificationWithTeacher")
    student, _ = student_from_teacher(teacher, "image_classification", StudentCut())
    assert type(student) is type(teacher)


@pytest.mark.parametrize(
    ("name", "kind", "cut"),
    [
        ("MobileNetV2ForImageClassification", "image_classification", StudentCut()),
        ("ConvNextForImageClassification", "image_classification", StudentCut(width=0.5)),
        ("BertForSequenceClassification", TEXT, StudentCut(layers=5)),
    ],
)
def test_what_cannot_be_cut_is_one_line(name: str, kind: Kind, cut: StudentCut) -> None:
    with pytest.raises(UserError, match="cut") as error:
        student_from_teacher(architectures.tiny_model(name), kind, cut)
    assert "\n" not in str(error.value)


def test_a_teacher_of_one_block_has_no_smaller_student() -> None:
    with pytest.raises(UserError, match="cannot be cut into layers"):
        student_from_teacher(tiny_models.tiny("bert", layers=1), TEXT, StudentCut())


FAMILIES: dict[str, Kind] = {
    **dict.fromkeys(("bert", "roberta", "electra", "distilbert", "llama_classifier"), TEXT),
    "vit": "image_classification",
    "llama": "causal_lm",
    "qwen2": "causal_lm",
    "gpt2": "causal_lm",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [(2,), (1, 4), (2, 3, 4)])
def test_a_model_without_some_blocks_answers_as_if_they_were_identities(family: str, keep: tuple[int, ...]) -> None:
    model, inputs = tiny_models.tiny(family, layers=4), tiny_models.batch(family)
    small = drop_blocks(model, FAMILIES[family], keep)
    assert len(block_paths(small)) == len(keep)

    def identity(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for number, path in enumerate(block_paths(model), start=1):
        if number not in keep:
            model.get_submodule(path).register_forward_hook(identity, with_kwargs=True)
    with torch.no_grad():
        wanted = logits_of(forward(model, inputs))
        torch.testing.assert_close(logits_of(forward(small, inputs)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (StudentCut(blocks=(2, 1)), r"cut.blocks: got \[2, 1\]; allowed: rising numbers from 1"),
        (StudentCut(blocks=(0, 1)), "rising numbers from 1"),
        (StudentCut(blocks=()), "rising numbers from 1"),
        (StudentCut(blocks=(1, 5)), r"cut.blocks: got \[1, 5\]; allowed: 1 to 4, the teacher's"),
        (StudentCut(blocks=(1,), layers=2), "beside cut.layers; allowed: rising numbers from 1, without cut.layers"),
    ],
)
def test_impossible_blocks_are_refused(cut: StudentCut, words: str) -> None:
    with pytest.raises(UserError, match=words):
        student_from_teacher(tiny_models.tiny("bert", layers=4), TEXT, cut)
