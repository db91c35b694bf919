"""Loading from folders, students cut from teachers, tokenizers compared."""

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from rlkd.errors import UserError
from rlkd.models.real.cutting import StudentCut, kept_layers, student_from_teacher
from rlkd.models.real.pretrained import (
    Kind,
    check_same_tokenizer,
    kind_of,
    load_config,
    load_model,
    load_processor,
    new_model,
)

KINDS: dict[str, Kind] = {
    "bert": "sequence_classification",
    "distilbert": "sequence_classification",
    "vit": "image_classification",
    "llama": "causal_lm",
}


def saved(family: str, folder: Path) -> nn.Module:
    model = tiny_models.tiny(family)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", KINDS)
def test_a_folder_gives_back_the_model_and_says_what_it_is_for(family: str, tmp_path: Path) -> None:
    model, inputs = saved(family, tmp_path), tiny_models.batch(family)
    assert kind_of(load_config(str(tmp_path)), "") == KINDS[family]
    loaded = load_model(str(tmp_path), KINDS[family])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert not loaded.training


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    tiny_models.need_transformers()
    with pytest.raises(UserError, match="no such folder") as error:
        load_model("./gone", "causal_lm")
    assert one_line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config.json") as error:
        load_config(str(tmp_path / "empty"))
    assert one_line(error)


def test_without_network_a_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    t = tiny_models.need_transformers()

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files.")

    monkeypatch.setattr(t.AutoConfig, "from_pretrained", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf download ID --local-dir") as error:
        load_config("someone/some-model")
    assert "someone/some-model" in one_line(error)


def test_pickled_weights_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    model = saved("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors") as error:
        load_model(str(tmp_path), "sequence_classification")
    assert one_line(error)
    loaded = load_model(str(tmp_path), "sequence_classification", allow_pickle=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path))
    assert one_line(error)
    assert not (tmp_path / "ran").exists()


def test_a_missing_head_is_an_error_for_a_teacher_and_fresh_for_a_student(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    with pytest.raises(UserError, match="its weights lack"):
        load_model(str(tmp_path), "causal_lm")
    assert load_model(str(tmp_path), "sequence_classification", num_classes=5).config.num_labels == 5


def test_a_fresh_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    heads = []
    for noise, seed in enumerate((1, 1, 2)):
        torch.manual_seed(noise)
        heads.append(load_model(str(tmp_path), "sequence_classification", num_classes=5, seed=seed).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_architecture_for_something_else_is_named(tmp_path: Path) -> None:
    t = tiny_models.need_transformers()
    config = t.BertConfig(architectures=["BertForMaskedLM"])
    with pytest.raises(UserError, match="BertForMaskedLM"):
        kind_of(config, "x")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'rlkd\[hf\]'"):
        load_config("x")


@pytest.mark.parametrize(
    ("num_layers", "cut", "expected"),
    [
        (6, StudentCut(2), [0, 5]),
        (6, StudentCut(3, "first"), [0, 1, 2]),
        (12, StudentCut(4), [0, 4, 7, 11]),
        (6, StudentCut(1), [0]),
        (5, StudentCut(), [0, 4]),
    ],
)
def test_which_layers_are_kept(num_layers: int, cut: StudentCut, expected: list[int]) -> None:
    assert kept_layers(num_layers, cut) == expected


def test_impossible_cuts() -> None:
    with pytest.raises(UserError, match=r"cut\.layers: got 3"):
        kept_layers(2, StudentCut(3))
    with pytest.raises(UserError, match=r"cut\.width"):
        StudentCut(width=0.0).check()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit", "llama", "gpt2"])
def test_a_student_of_all_layers_is_its_teacher_and_of_fewer_has_the_kept_ones(family: str) -> None:
    teacher, inputs = tiny_models.tiny(family, layers=3), tiny_models.batch(family)
    kind = KINDS.get(family, "sequence_classification" if family == "roberta" else "causal_lm")
    whole, _ = student_from_teacher(teacher, kind, StudentCut(3))
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits, teacher(**inputs).logits)
    student, chosen = student_from_teacher(teacher, kind, StudentCut(2))
    assert chosen == [0, 2]
    mine, theirs = student.state_dict(), teacher.state_dict()
    last = [name for name in mine if ".1." in name]
    assert last
    for name in last:
        torch.testing.assert_close(mine[name], theirs[name.replace(".1.", ".2.")])
    student(**inputs)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "distilbert"])
def test_a_narrower_student_holds_the_leading_part_of_its_teacher(family: str) -> None:
    teacher = tiny_models.tiny(family)
    student, _ = student_from_teacher(teacher, KINDS[family], StudentCut(2, width=0.5))
    theirs = teacher.state_dict()
    shapes = set()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name][tuple(slice(n) for n in tensor.shape)])
        shapes.add(tuple(tensor.shape))
    assert student.config.hidden_size == 16
    assert (32, 16) in shapes  # hidden units by hidden size
    assert torch.isfinite(student(**tiny_models.batch(family)).logits).all()


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    config = tiny_models.tiny("bert").config
    before = torch.random.get_rng_state()
    a, b, c = (new_model(config, "sequence_classification", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    name = "classifier.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


def test_tokenizers_that_differ_are_told_apart(tmp_path: Path) -> None:
    teacher = tiny_models.save_tokenizer(tmp_path / "a")
    check_same_tokenizer(teacher, load_processor(str(tmp_path / "a"), "causal_lm"))
    words = tiny_models.WORDS
    swapped = tiny_models.save_tokenizer(tmp_path / "b", [words[1], words[0], *words[2:]])
    with pytest.raises(UserError, match=r"first at 'bad' \(6 against 5\)") as error:
        check_same_tokenizer(teacher, swapped)
    assert one_line(error)
    cased = tiny_models.save_tokenizer(tmp_path / "c")
    cased.pad_token = "[MASK]"
    with pytest.raises(UserError, match="pad_token_id 0 against 4"):
        check_same_tokenizer(teacher, cased)


def test_a_folder_around_a_model_names_the_model(tmp_path: Path) -> None:
    saved("bert", tmp_path / "run" / "student" / "model")
    with pytest.raises(UserError, match=r"run: holds no config.json; .*; did you mean .*run/student/model\?"):
        load_config(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"model: got no name; allowed: a folder with config.json"):
        load_config(" ")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no config.json; allowed: the folder of a transformers model$"):
        load_config(str(tmp_path / "empty"))
