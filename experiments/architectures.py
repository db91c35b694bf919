"""Try what rlkd makes of the architectures of transformers: tiny models, distilled by default from files to a student.

Every model has a few thousand random weights and is built from its configuration; nothing is downloaded. For each one
the default student is cut, rehearsed, trained for two steps under controls that leave out half of everything, shipped,
and its answers are compared with the trained one's. The table says which control works on which architecture, and which
architecture is refused, in the line that a user reads.

Example:
    python experiments/architectures.py --docs docs/architectures.md
"""

import argparse
import csv
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.envs import CONTROLS, ControlConfig
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.io.files import write_whole
from rlkd.models.real.attachment import Plan
from rlkd.models.real.pretrained import quiet, transformers
from rlkd.runs.distil_real import distil_module
from rlkd.runs.folder import use_one_thread
from rlkd.students.real.train_config import ModuleTrainConfig

NUM_CLASSES, NUM_WORDS, NUM_BLOCKS, IMAGE_SIZE, MOST_WEIGHTS = 3, 30, 4, 32, 300_000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(SPECIAL) + NUM_WORDS
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
SIZES: dict[str, int] = {  # what configurations call their sizes; those that one has are set
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 16),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "hidden_dim",
            "d_inner",
            "n_inner",
            "dff",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_key_value_heads",
            "type_vocab_size",
        ),
        2,
    ),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "patch_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_position"), 64),
    **dict.fromkeys(DEPTHS, NUM_BLOCKS),
    "vocab_size": VOCABULARY,
    "image_size": IMAGE_SIZE,
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [2, 2]}
WINDOWS: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
PYRAMID: dict[str, Any] = {
    **STAGES,
    "num_encoder_blocks": 2,
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
FURTHER: dict[str, dict[str, Any]] = {  # by model type
    "canine": {"num_hash_buckets": 64, "num_hash_functions": 2, "local_transformer_stride": 4, "downsampling_rate": 2},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "position_buckets": 8,
    },
    "esm": {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "mask_token_id": 4,
        "token_dropout": False,
        "position_embedding_type": "rotary",
    },
    "funnel": {"block_sizes": [2, 2], "num_decoder_layers": 1},
    "squeezebert": {
        "q_groups": 2,
        "k_groups": 2,
        "v_groups": 2,
        "post_attention_groups": 1,
        "intermediate_groups": 2,
        "output_groups": 2,
    },
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "longformer": {"attention_window": 4},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "convnext": {**STAGES, "num_stages": 2, "patch_size": 2},
    "convnextv2": {**STAGES, "num_stages": 2, "patch_size": 2},
    "resnet": {**STAGES, "embedding_size": 8},
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 4},
    "mobilenet_v1": {"depth_multiplier": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.1},
    "mobilevitv2": {"width_multiplier": 0.1, "image_size": 64, "patch_size": 2},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.4, "hidden_dim": 128},
    "poolformer": {**STAGES, "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
    "pvt": {**PYRAMID, "patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
    "segformer": {**PYRAMID, "patch_sizes": [7, 3], "sr_ratios": [2, 1]},
    "swin": WINDOWS,
    "swinv2": {**WINDOWS, "pretrained_window_sizes": [0, 0]},
    "focalnet": {**STAGES, "embed_dim": 8, "focal_levels": [2, 2], "focal_windows": [3, 3], "patch_size": 4},
}
ARCHITECTURES: dict[str, str] = {
    "texts": "Albert Bart Bert BigBird Bloom Camembert Canine ConvBert Deberta DebertaV2 DistilBert Electra Ernie Esm Falcon Flaubert "
    "FNet Funnel Gemma GPT2 GPTNeoX IBert Llama Longformer MegatronBert Mistral MobileBert ModernBert MPNet MT5 NomicBert "
    "Nystromformer OPT Phi3 Qwen2 Qwen3Moe RemBert Roberta RoFormer SqueezeBert T5 XLM XLNet",
    "images": "Beit ConvNext ConvNextV2 DeiT Dinov2 EfficientNet FocalNet MobileNetV2 MobileViTV2 PoolFormer Pvt RegNet ResNet Segformer "
    "Swin Swinv2 ViT ViTMSN",
    "language": "Bart Bert BioGpt Bloom Codegen Falcon Gemma2 GPT2 GPTNeo GPTNeoX GPTJ Granite Jamba Llama Mamba Mixtral Olmo2 OPT "
    "Phi Phi3 Qwen2 Qwen3 SmolLM3 StableLm",
}
ENDINGS = {"texts": "ForSequenceClassification", "images": "ForImageClassification", "language": "ForCausalLM"}
OTHER_ENDINGS = {("GPT2", "language"): "LMHeadModel", ("Bert", "language"): "LMHeadModel"}
HALF = torch.full((1, len(CONTROLS)), 0.5)


@dataclass(frozen=True)
class Row:
    """What one architecture gave."""

    name: str
    outcome: str  # "runs", or the line of the refusal
    controls: dict[str, bool]
    difference: float  # between trained and shipped answers, of the largest one
    note: str
    cut: str = ""  # what is gone from the shipped student of what its controls left out, and what loads it


def class_of(task: str, family: str) -> str:
    """The name of the class of transformers."""
    name = family + OTHER_ENDINGS.get((family, task), ENDINGS[task])
    return {"CodegenForCausalLM": "CodeGenForCausalLM"}.get(name, name)


def tiny_model(name: str, num_classes: int = NUM_CLASSES, **changes: Any) -> nn.Module:
    """A model of that class with random weights, in evaluation mode."""
    made = getattr(transformers(), name)
    config_class = made.config_class
    given = config_class().to_dict()
    sizes = {key: size for key, size in SIZES.items() if type(given.get(key)) is int}
    config = config_class(**{**sizes, "num_labels": num_classes, **FURTHER.get(config_class.model_type, {}), **changes})
    tokens = {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "decoder_start_token_id": 2,
    }
    for key, token in tokens.items():
        if key in given or key in ("pad_token_id", "decoder_start_token_id"):
            setattr(config, key, token)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = made._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no bias stays at zero and no norm at one
                parameter.add_(torch.randn_like(parameter) * 0.05)
    num_weights = sum(p.numel() for p in model.parameters())
    if num_weights > MOST_WEIGHTS:
        raise UserError(f"{name}: got {num_weights} weights; allowed: {MOST_WEIGHTS}")
    return model  # type: ignore[no-any-return]


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer: [CLS] words [SEP]."""
    words = [*SPECIAL, *(f"w{i}" for i in range(NUM_WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers().BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def write_data(folder: Path, task: str, size: int = IMAGE_SIZE, channels: int = 3) -> Path:
    """60 texts of 3 to 9 words, or 60 images, in three classes."""
    draw, pixels = random.Random(0), np.random.default_rng(0)
    if task == "images":
        path = folder / "images.npz"
        np.savez(
            path, inputs=pixels.random((60, channels, size, size), dtype=np.float32), labels=np.arange(60) % NUM_CLASSES
        )
        return path
    path = folder / "texts.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "source"])
        for i in range(60):
            rows.writerow(
                [
                    " ".join(f"w{draw.randrange(NUM_WORDS)}" for _ in range(draw.randint(3, 9))),
                    f"LABEL_{i % NUM_CLASSES}",
                    f"text {i}",
                ]
            )
    return path


def try_architecture(task: str, family: str, folder: Path) -> Row:
    """Distil the default student of a tiny teacher, from files to a folder that is loaded again."""
    name = class_of(task, family)
    model: Any = tiny_model(name)
    (folder / "teacher").mkdir()
    with quiet():
        model.save_pretrained(folder / "teacher")
    if task != "images":
        save_tokenizer(folder / "teacher")
    config = RealConfig(
        teacher=str(folder / "teacher"),
        data=str(write_data(folder, task, getattr(model.config, "image_size", None) or IMAGE_SIZE)),
        num_windows=1,
        train=ModuleTrainConfig(steps_per_window=2, batch_size=8, learning_rate=5e-5),
        cost=RealCostConfig(batch_size=4, batches=()),
    )
    try:
        scenario = build_real_scenario(config, ControlConfig())
    except UserError as error:
        return Row(name, str(error).replace(str(folder / "teacher"), "teacher"), {}, 0.0, "")
    done = distil_module(scenario, lambda observation, episodes, window: HALF, 0)
    save_module_student(done.student, folder / "student", scenario.processor, {})
    load_module_student(folder / "student")
    note = ""
    if scenario.data.fixed_length:
        length = int(scenario.data.inputs["input_ids"].shape[1])
        note = f"its answers depend on padding; every text is padded to {length} tokens, at inference, too"
    return Row(
        name,
        "runs",
        controls_of(scenario.student.plan, bool(scenario.student.links)),
        done.figures["shipped_difference"],
        note,
        _about_cut(scenario.student.plan, folder / "student"),
    )


def _about_cut(plan: Plan, student: Path) -> str:
    """Say what is gone: all units, some kinds of them or none, and whether transformers alone loads the folder."""
    kinds = {group.kind for group in plan.groups}
    if not kinds:
        return ""
    gone = "all" if kinds == set(plan.cuts) else ", ".join(plan.cuts) or "none, zeros"
    card = json.loads((student / "student.json").read_text())
    return f"{gone}; {'plain' if card['loads_with'] != 'rlkd' else 'rlkd'}"


def controls_of(plan: Plan, has_hints: bool) -> dict[str, bool]:
    """Which controls work."""
    return {
        "units": bool(plan.groups),
        "exits": bool(plan.exits),
        "tokens": plan.select_after is not None,
        "features": has_hints,
        "attention": bool(plan.attention) or plan.is_conv,
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown: one architecture a row."""
    names = ("units", "exits", "tokens", "features", "attention")
    heads = ("architecture", *names, "gone; loader", "trained - shipped", "remark")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        marks = [("yes" if row.controls[n] else "no") if row.controls else "" for n in names]
        difference = f"{row.difference:.0e}" if row.controls else ""
        remark = row.note if row.outcome == "runs" else f"refused before training: {row.outcome}"
        lines.append(f"| {row.name} | {' | '.join(marks)} | {row.cut} | {difference} | {remark.replace('|', '/')} |")
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> str:
    """The page of docs."""
    running = [row for row in rows if row.outcome == "runs"]
    worst = max(row.difference for row in running)
    return f"""# Architectures of transformers

`python experiments/architectures.py --docs docs/architectures.md` makes this page: {len(rows)} architectures, each a tiny
model with random weights, distilled by default (half of its blocks) with half of everything left out. {len(running)} run;
{len(rows) - len(running)} are refused in one line before any training (see their remarks). Trained and shipped answers differ by at
most {worst:.0e} of the largest answer. transformers {transformers().__version__}.

- *units*: hidden units, heads or inner channels can be left out. *exits*: samples, or tokens, can leave early.
- *tokens*: little attended tokens can be left out; only where the answer is read from the first token and later blocks do
  not tell tokens by their place. *features*, *attention*: these distillation losses have what they need.
- *gone; loader*: which of the units that were left out are cut out of the shipped student (the rest stay as zeros), and whether
  its folder is a *plain* one of transformers or needs *rlkd*'s loader, because the configuration cannot say the sizes.
- Weights, temperature and learning rate work everywhere.

Before every training `rlkd` finds this out for the model in hand, on a copy: it attaches, leaves half out, cuts, exports,
loads and compares. Other architectures are treated the same.

{table(rows)}
"""


def main() -> int:
    """Try all architectures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="page to write")
    parser.add_argument("--only", nargs="*", default=[], help="families, such as Bert")
    options = parser.parse_args()
    use_one_thread()
    warnings.simplefilter("ignore")  # of tiny models that no user has
    rows = []
    for task, families in ARCHITECTURES.items():
        for family in families.split():
            if options.only and family not in options.only:
                continue
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                os.environ["RLKD_CACHE"] = f"{folder}/cache"
                rows.append(try_architecture(task, family, Path(folder)))
            row = rows[-1]
            print(
                f"{row.name:<40} {row.outcome[:150]} {row.difference:.0e} {row.controls} ({time.perf_counter() - began:.1f} s)",
                flush=True,
            )
    if options.docs is not None:
        write_whole(options.docs, page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
