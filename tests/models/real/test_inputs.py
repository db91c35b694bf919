"""Samples as a model takes them: channels, lengths, padding, vocabulary."""

from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny_models
import torch
from real_sides import TEXT, both, saved, sources, write_texts
from torch import nn

from rlkd.errors import UserError
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.inputs import most_tokens
from rlkd.models.real.pretrained import Kind
from rlkd.models.real.sides import load_teacher

tiny_models.need_transformers()


def test_texts_are_cut_to_the_positions_that_a_model_has(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    teacher = saved(tiny_models.tiny("roberta", max_position_embeddings=10, pad_token_id=1), tmp_path / "t")
    student, side = both(sources(teacher, write_texts(tmp_path)))
    assert student.data.inputs["input_ids"].shape[1] == 8  # two positions stand ahead of the first token
    assert side.columns.max_length == 8
    assert [line for line in caplog.messages if "takes 8 tokens; longer texts are cut" in line]
    assert all("\n" not in line for line in caplog.messages)


def test_a_student_with_fewer_positions_shortens_the_teachers_texts_too(tmp_path: Path) -> None:
    teacher = saved(tiny_models.tiny("bert"), tmp_path / "t")
    small = tiny_models.tiny("bert", max_position_embeddings=9).config
    small.to_json_file(tmp_path / "small.json", use_diff=False)
    student, side = both(sources(teacher, write_texts(tmp_path), str(tmp_path / "small.json")))
    assert student.data is side.data
    assert side.data.inputs["input_ids"].shape[1] == 9


@pytest.mark.parametrize(
    ("family", "size", "most"),
    [
        ("Bert", "max_position_embeddings", 8),  # sizes that differ
        ("Deberta", "max_position_embeddings", 8),
        ("Camembert", "max_position_embeddings", 7),  # an index out of bounds; one position stands ahead
        ("GPT2", "n_positions", 8),  # an index out of range
    ],
)
def test_every_way_of_refusing_a_long_text_is_read(family: str, size: str, most: int, tmp_path: Path) -> None:
    data = load_teacher(sources(saved(tiny_models.tiny("bert"), tmp_path / "t"), write_texts(tmp_path)), TEXT).data
    model = architectures.tiny_model(f"{family}ForSequenceClassification", num_classes=2, **{size: 8})
    assert most_tokens(model, data, "t") == most


def test_a_model_without_a_position_for_any_token_is_refused(tmp_path: Path) -> None:
    teacher = saved(tiny_models.tiny("roberta", max_position_embeddings=2, pad_token_id=1), tmp_path / "t")
    with pytest.raises(UserError, match="t: RobertaForSequenceClassification does not take inputs of shapes"):
        load_teacher(sources(teacher, write_texts(tmp_path)), TEXT)


FAILURES = {
    "memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory for t on a text of 1"),
    "shapes": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), r"\(RuntimeError: mat1 and mat2 shapes"),
    "value": (ValueError("Input language unknown"), r"\(ValueError: Input language unknown"),
    "type": (TypeError("got an unexpected type"), r"\(TypeError: got an unexpected type"),
    "file": (OSError("weights were moved"), r"\(OSError: weights were moved"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_that_long_texts_meet_is_not_taken_for_too_long(name: str, tmp_path: Path) -> None:
    """The layer fails for texts of more than six tokens, as memory or a file on a disk may."""
    error, words = FAILURES[name]
    side = load_teacher(sources(saved(tiny_models.tiny("bert"), tmp_path / "t"), write_texts(tmp_path)), TEXT)

    def fail(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] > 6:
            raise error

    side.model.get_submodule("bert.encoder.layer.0").register_forward_pre_hook(fail)
    with pytest.raises(UserError, match=words) as refused:
        most_tokens(side.model, side.data, "t")
    assert "\n" not in str(refused.value)


def test_a_model_whose_answers_depend_on_padding_always_gets_the_same(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    teacher = saved(architectures.tiny_model("FNetForSequenceClassification", num_classes=2), tmp_path / "t")
    student, _ = both(sources(teacher, write_texts(tmp_path)))
    data = student.data
    assert any("answers depend on padding" in line for line in caplog.messages)
    rows = data.splits["train"]
    short = rows[data.by_length(rows)][:1]
    with torch.no_grad():
        alone = logits_of(forward(student.model, data.batch(short)))
        among = logits_of(forward(student.model, data.batch(torch.cat([short, rows]))))[:1]
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-4)
    bert = saved(tiny_models.tiny("bert"), tmp_path / "b")
    assert not both(sources(bert, write_texts(tmp_path)))[0].data.fixed_length


def test_a_tokenizer_without_the_words_of_the_texts_is_refused_or_warned_of(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    teacher, data = saved(tiny_models.tiny("bert"), tmp_path / "t"), write_texts(tmp_path)
    both(sources(teacher, data))
    assert not any("WARNING" in line for line in caplog.messages)
    tiny_models.save_tokenizer(teacher, ["film", "other"])
    both(sources(teacher, data))
    assert any("does not know" in line for line in caplog.messages)
    for name in ("vocab.txt", "tokenizer.json"):  # transformers then makes a tokenizer for which every word is [UNK]
        (teacher / name).unlink()
    with pytest.raises(
        UserError, match=r"no text of texts keeps a token that its tokenizer knows \(it has 5\)"
    ) as error:
        both(sources(teacher, data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("channels", "shape"),
    [(1, (60, 16, 16)), (1, (60, 1, 16, 16)), (3, (60, 16, 16)), (3, (60, 16, 16, 3)), (3, (60, 3, 16, 16))],
)
def test_images_of_arrays_get_the_channels_of_the_model(channels: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    tiny_models.tiny("vit", num_channels=channels).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    np.savez(tmp_path / "images.npz", inputs=pixels, labels=np.arange(60) % 2)
    student, _ = both(sources(tmp_path / "vit", tmp_path / "images.npz"), "image_classification")
    values = student.data.inputs["pixel_values"]
    assert values.shape == (60, channels, 16, 16)
    grey = pixels.reshape(60, 16, 16) if pixels.size == 60 * 256 else pixels[..., 0] if shape[-1] == 3 else pixels[:, 0]
    np.testing.assert_array_equal(values[:, 0], grey)


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    tiny_models.tiny("vit", num_channels=1).save_pretrained(tmp_path / "vit")
    np.savez(tmp_path / "images.npz", inputs=np.random.default_rng(0).random((60, 3, 16, 16)), labels=np.arange(60) % 2)
    with pytest.raises(UserError, match="got images of 3 channels; allowed: 1") as error:
        load_teacher(sources(tmp_path / "vit", tmp_path / "images.npz"), "image_classification")
    assert "\n" not in str(error.value)


def test_image_files_are_made_grey_for_a_model_of_one_channel(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    t = tiny_models.need_transformers()
    tiny_models.tiny("vit", num_channels=1).save_pretrained(tmp_path / "vit")
    t.ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "vit"
    )
    draw = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "pictures" / f"LABEL_{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    student, _ = both(sources(tmp_path / "vit", tmp_path / "pictures"), "image_classification")
    assert student.data.inputs["pixel_values"].shape == (60, 1, 16, 16)
    assert float(student.data.inputs["pixel_values"].std()) > 0.1


@pytest.mark.parametrize("name", ["XmodForSequenceClassification", "ImageGPTForImageClassification"])
def test_a_model_that_takes_other_inputs_is_one_line(name: str, tmp_path: Path) -> None:
    model = architectures.tiny_model(name)
    teacher = saved(model, tmp_path / "t")
    architectures.save_tokenizer(teacher)
    kind: Kind = "image_classification" if "Image" in name else TEXT
    data = architectures.write_data(tmp_path, "images" if "Image" in name else "texts")
    with pytest.raises(UserError, match="does not take inputs of shapes") as error:
        load_teacher(sources(teacher, data), kind)
    assert "\n" not in str(error.value)
