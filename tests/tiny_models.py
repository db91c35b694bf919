"""Tiny transformers models with random weights, built from configurations: nothing is downloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlkd.agents.policy.bundle import save_bundle
from rlkd.agents.policy.policy import TENSORS, Policy
from rlkd.cost.real import coefficient_names
from rlkd.cost.real_work import ModuleWork
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig
from rlkd.envs.action import published_setting

WORDS = ["good", "bad", "fine", "dull", "bright", "slow", "great", "poor", "film", "plot", "actor", "the", "was", "not"]


def need_transformers() -> Any:
    return pytest.importorskip("transformers", reason="the extra hf is not installed: pip install 'rlkd[hf]'")


IMAGE_FAMILIES = ("vit", "resnet", "resnet_basic", "convnext", "mobilenet")
CONV_FAMILIES = IMAGE_FAMILIES[1:]


def tiny(family: str, num_classes: int = 2, seed: int = 0, layers: int = 2, **changes: Any) -> nn.Module:
    t = need_transformers()
    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": num_classes,
        "attn_implementation": "eager",
    }
    text: dict[str, Any] = {**small, "vocab_size": 40, "max_position_embeddings": 40}
    image: dict[str, Any] = {"image_size": 16, "patch_size": 4}
    distil = {"dim": 32, "n_layers": layers, "n_heads": 4, "hidden_dim": 64, "vocab_size": 40, "num_labels": 2}
    makers = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**text | changes)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**text | changes)),
        "electra": lambda: t.ElectraForSequenceClassification(
            t.ElectraConfig(**text | {"embedding_size": 16} | changes)
        ),
        "llama_classifier": lambda: t.LlamaForSequenceClassification(
            t.LlamaConfig(**text | {"num_key_value_heads": 2, "pad_token_id": 0} | changes)
        ),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**distil | {"attn_implementation": "eager"} | changes)
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**small | image | changes)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**text | {"num_key_value_heads": 2} | changes)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**text | {"num_key_value_heads": 2} | changes)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=40, n_embd=32, n_layer=layers, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
        "resnet": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=num_classes)
        ),
        "resnet_basic": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=num_classes
            )
        ),
        "convnext": lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(
                patch_size=2,
                hidden_sizes=[8, 16],
                depths=[1, 2],
                num_stages=2,
                layer_scale_init_value=1.0,
                num_labels=num_classes,
                image_size=16,
            )
        ),
        "mobilenet": lambda: t.MobileNetV2ForImageClassification(
            t.MobileNetV2Config(depth_multiplier=0.1, num_labels=num_classes, image_size=32)
        ),
    }
    model: nn.Module = makers[family]()
    return model.eval()


def loud(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights, biases and norms so large that every block changes its answers, also one without units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(family: str, size: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family in IMAGE_FAMILIES:
        return {"pixel_values": torch.rand(size, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, 40, (size, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(size)[:, None] % 3).long()  # rows of 7, 6, 5, 7 tokens
    return {"input_ids": ids * mask, "attention_mask": mask}


def even_speed(work: ModuleWork, run_s: float, mac_s: float) -> tuple[float, ...]:
    """Coefficients of a cost profile by hand: every block costs `run_s` and every MAC `mac_s`."""
    names = coefficient_names(work)
    return tuple(run_s if n.endswith("run_s") else mac_s if n.endswith("mac_s") else 0.0 for n in names)


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> Any:
    """A word-level BERT tokenizer in `folder`."""
    t = need_transformers()
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = t.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_causal_tokenizer(folder: Path, words: list[str] = WORDS) -> Any:
    """A word-level tokenizer in `folder` that begins every text with <s>, and pads with <pad> (0)."""
    t = need_transformers()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_policy(folder: Path) -> None:
    """Untrained, but not idle: its changes depend on what it sees."""
    g = torch.Generator().manual_seed(0)
    seen, controls = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(5, seen), (5,), (5, 5), (5,), (controls, 5), (controls,)]
    weights = {name: 0.5 * torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    config = ControlConfig()
    start = published_setting(config)
    save_bundle(Policy(weights, torch.zeros(seen), torch.ones(seen), start, config), folder, {"seed": 0})


def points(count: int = 240) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that a line separates."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(3))
    return inputs, (inputs[:, 0] > 0).long()
