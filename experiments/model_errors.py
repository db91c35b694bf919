"""The mistakes of real models for `list_errors.py`: a tiny text classifier, its data, and what can be wrong with them."""

import contextlib
import csv
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from rlkd.cli.main import main

HAS_MODELS = importlib.util.find_spec("transformers") is not None and importlib.util.find_spec("datasets") is not None
WORDS = ("good", "bad", "film", "plot")
START = "replay --policy policy --out out --teacher bert --data"
Call = str | Callable[[Path], object]


def make(folder: Path) -> None:
    """`bert` with a tokenizer and two labels, `llama`, and tables of texts."""
    import transformers

    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = transformers.BertConfig(**small, **names, vocab_size=len(vocabulary), max_position_embeddings=16)
    for name, words in (("bert", vocabulary), ("other", [*vocabulary[:5], *reversed(WORDS)])):
        with _silent():
            transformers.BertForSequenceClassification(config).save_pretrained(folder / name)
        (folder / name / "vocab.txt").write_text("\n".join(words) + "\n")
        with _silent():
            transformers.BertTokenizerFast(vocab=str(folder / name / "vocab.txt")).save_pretrained(folder / name)
    with _silent():
        llama = transformers.LlamaConfig(**small, vocab_size=9, num_key_value_heads=2)
        transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name, labels in (("reviews", ["neg", "pos"]), ("three", ["neg", "pos", "so"]), ("numbers", [0, 1, 2])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows([f"{WORDS[i % 4]} film {i}", labels[i % len(labels)]] for i in range(60))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from rlkd.models.pretrained import quiet

    with quiet():
        yield


def offline(folder: Path) -> None:
    """Ask for a model of the hub where there is no network."""
    import transformers

    from rlkd.models.pretrained import load_config

    error = OSError("We couldn't connect to 'https://huggingface.co' to load the files")
    with patch.object(transformers.AutoConfig, "from_pretrained", side_effect=error):
        load_config("someone/some-model")


def tokenizers(folder: Path) -> None:
    """Distil tokens between models of two tokenizers."""
    from rlkd.models.pretrained import check_same_tokenizer, load_processor

    check_same_tokenizer(*(load_processor(name, "causal_lm") for name in ("bert", "other")))


def module_path(folder: Path) -> None:
    """Name a module that the model does not have."""
    from rlkd.models.hooks import resolve
    from rlkd.models.pretrained import load_model

    resolve(load_model("bert", "sequence_classification"), ["bert.encoder.layers.1"])


def exhausted(words: str) -> Callable[[Path], object]:
    """A command whose memory runs out, as the CPU's or a GPU's allocator says it."""

    def call(folder: Path) -> None:
        with (
            patch("rlkd.envs.modules.build_module_world", side_effect=RuntimeError(words)),
            patch("rlkd.cli.replay_models.build_module_world", side_effect=RuntimeError(words)),
        ):
            assert main([*START.split(" "), "reviews.csv"]) == 2

    return call


def pickled(folder: Path) -> None:
    """Weights as a pickle alone."""
    (folder / "bert/model.safetensors").rename(folder / "bert/pytorch_model.bin")


def not_weights(folder: Path) -> None:
    """A pickle by the name of safetensors."""
    (folder / "bert/model.safetensors").write_bytes(b"\x80\x04" + bytes(60))


def no_weights(folder: Path) -> None:
    """A folder without its weights."""
    (folder / "bert/model.safetensors").unlink()


def broken_arrays(folder: Path) -> None:
    """Arrays that are none."""
    (folder / "arrays.npz").write_bytes(b"PK\x03\x04" + bytes(60))


CASES: list[tuple[str, Call] | tuple[str, Call, Callable[[Path], None]]] = [
    ("no such teacher", "replay --policy policy --out out --teacher ./gone --data reviews.csv"),
    ("a hub id without network", offline),
    ("a folder without weights", f"{START} reviews.csv", no_weights),
    ("weights that are a pickle", f"{START} reviews.csv", pickled),
    ("a pickle by another name", f"{START} reviews.csv", not_weights),
    ("a causal model", "replay --policy policy --out out --teacher llama --data reviews.csv"),
    ("no such data", f"{START} gone.csv"),
    ("data of an unknown format", f"{START} bert/vocab.txt"),
    ("arrays that are none", f"{START} arrays.npz", broken_arrays),
    ("no such column", f"{START} reviews.csv --columns.text review"),
    ("a label that the teacher lacks", f"{START} three.csv"),
    ("more labels than the teacher has", f"{START} numbers.csv"),
    ("more layers than the teacher has", f"{START} reviews.csv --cut.layers 9"),
    ("no layer", f"{START} reviews.csv --cut.layers 0"),
    ("an exit behind a block that is not there", f"{START} reviews.csv --cut.layers 2 --attach.exits [7]"),
    ("no such device", f"{START} reviews.csv --train.device gpu"),
    ("more parts than samples", f"{START} reviews.csv --train.micro_batches 99"),
    ("texts of one token", f"{START} reviews.csv --columns.max_length 1"),
    ("no such cost profile", f"{START} reviews.csv --cost.profile gone.json"),
    ("the cost profile of another student", f"{START} reviews.csv --cost.profile profile.json"),
    ("no such module path", module_path),
    ("two tokenizers for one loss over tokens", tokenizers),
    ("too little memory", exhausted("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")),
    ("too little memory on a GPU", exhausted("CUDA out of memory. Tried to allocate 20.00 MiB")),
]
