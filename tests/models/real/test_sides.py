"""A teacher and a student, each with the data as it takes them."""

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from real_sides import TEXT, both, saved, sources, write_texts
from safetensors.torch import load_file, save_file

from rlkd.errors import UserError
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.pretrained import Kind, kind_of, load_config, load_model, load_processor
from rlkd.models.real.sides import load_teacher

tiny_models.need_transformers()


@pytest.mark.parametrize("family", ["llama_classifier", "gpt2_classifier"])
def test_a_tokenizer_without_padding_pads_with_its_end_token(
    caplog: pytest.LogCaptureFixture, family: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"pad_token_id": None, "eos_token_id": 3}
    model = (
        tiny_models.tiny("llama_classifier", **changes)
        if family == "llama_classifier"
        else architectures.tiny_model("GPT2ForSequenceClassification", num_classes=2)
    )
    model.config.pad_token_id = None
    teacher = saved(model, tmp_path / "t")
    tokenizer = load_processor(str(teacher), TEXT)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(teacher)
    student, side = both(sources(teacher, write_texts(tmp_path)))
    assert any("pads with [SEP]" in line for line in caplog.messages)
    for model in (student.model, side.model):
        assert model.config.pad_token_id == 3
    assert logits_of(forward(student.model, student.data.batch(student.data.few()))).shape == (5, 2)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(teacher)
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        load_teacher(sources(teacher, tmp_path / "texts.csv"), TEXT)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module.", "net._orig_mod.module."])
def test_weights_with_a_prefix_are_loaded_without_it(prefix: str, tmp_path: Path) -> None:
    model = tiny_models.tiny("bert")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({prefix + k: v for k, v in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    for num_classes in (None, 2):  # as a teacher, and as a student
        loaded = load_model(str(tmp_path), TEXT, num_classes=num_classes)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_a_student_whose_body_is_not_in_its_file_is_refused(tmp_path: Path) -> None:
    model = tiny_models.tiny("bert")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"x{i}": v for i, v in enumerate(weights.values())}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack bert\.") as error:
        load_model(str(tmp_path), TEXT, num_classes=2)
    assert "\n" not in str(error.value)
    weights["bert.embeddings.word_embeddings.weight"] = torch.zeros(39, 32)  # of another vocabulary
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="in another size"):
        load_model(str(tmp_path), TEXT, num_classes=2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GPT2LMHeadModel", "causal_lm"),
        ("OpenAIGPTLMHeadModel", "causal_lm"),
        ("DeiTForImageClassificationWithTeacher", "image_classification"),
    ],
)
def test_a_class_is_known_by_its_place_in_transformers_not_by_its_ending(name: str, kind: Kind, tmp_path: Path) -> None:
    model = architectures.tiny_model(name)
    model.save_pretrained(tmp_path)
    assert kind_of(load_config(str(tmp_path)), "x") == kind
    loaded = load_model(str(tmp_path), kind)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_a_configuration_that_has_no_names_of_classes_gets_the_default_ones(tmp_path: Path) -> None:
    model: Any = architectures.tiny_model("PvtForImageClassification")  # its configuration has num_labels alone
    assert getattr(model.config, "id2label", None) is None
    model.save_pretrained(tmp_path / "t")
    data = architectures.write_data(tmp_path, "images")  # labels 0, 1, 2
    student, side = both(sources(tmp_path / "t", data), "image_classification")
    for described in (student.model.config, side.model.config):
        assert described.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}  # type: ignore[union-attr]
    assert student.plan.num_classes == 3
    assert student.data.labels.tolist() == [i % 3 for i in range(60)]


def test_layers_are_not_left_out_at_random(tmp_path: Path) -> None:
    model = architectures.tiny_model("BartForSequenceClassification", decoder_layerdrop=0.9, encoder_layerdrop=0.9)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), TEXT)
    dropped = [m.layerdrop for m in loaded.modules() if hasattr(m, "layerdrop")]
    assert dropped == [0.0] * len(dropped)
    assert dropped
