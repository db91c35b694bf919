"""Models of transformers: loaded from a local folder or the hub, and students made from a teacher's layers.

No code of a model's own is run (`trust_remote_code` stays off) and only safetensors are read unless told otherwise:
other weight files are pickles. Attention is the eager implementation, which alone gives attention weights.
"""

import copy
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlkd.errors import UserError
from rlkd.io.files import read_json
from rlkd.models.real.blocks import block_paths

Kind = Literal["sequence_classification", "image_classification", "causal_lm"]
CLASSES: dict[str, tuple[str, str]] = {  # kind: the end of an architecture's name, the class that loads it
    "sequence_classification": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "image_classification": ("ForImageClassification", "AutoModelForImageClassification"),
    "causal_lm": ("ForCausalLM", "AutoModelForCausalLM"),
}
HIDDEN_UNITS = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")  # what configs call them
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
OPTIONS: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": "eager"}


@dataclass(frozen=True)
class StudentCut:
    """How a student is cut from its teacher."""

    layers: int | None = None
    """Blocks that are kept; by default half of them, at least one."""
    keep: Literal["spread", "first"] = "spread"
    """Which blocks: evenly spread with the first and the last among them (cf. Sun et al. 2019), or the first ones."""
    width: float = 1.0
    """Share of the hidden size, heads and hidden units that is kept; leading rows and columns stay."""

    def check(self) -> None:
        """Raises UserError for a student without a layer or wider than its teacher."""
        if self.layers is not None and self.layers < 1:
            raise UserError(f"cut.layers: got {self.layers}; allowed: at least 1")
        if not 0 < self.width <= 1:
            raise UserError(f"cut.width: got {self.width:g}; allowed: above 0, at most 1")


def transformers() -> Any:
    """The package transformers.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import transformers as package
    except ImportError as error:
        raise UserError("real models need the package transformers; run `pip install 'rlkd[hf]'`") from error
    return package


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only from transformers inside the block, and no progress bars."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_config(source: str) -> Any:
    """The configuration in a folder, in a JSON file, or of a hub id.

    Raises:
        UserError: there is none, or it cannot be had without network.
    """
    return _load(source, transformers().AutoConfig, trust_remote_code=False)


def kind_of(config: Any, source: str) -> Kind:
    """What a model is for, from the architecture that its configuration names.

    Raises:
        UserError: none of the three kinds.
    """
    names = list(config.architectures or [])
    for kind, (ending, _) in CLASSES.items():
        if any(name.endswith(ending) for name in names):
            return kind  # type: ignore[return-value]
    allowed = ", ".join(f"...{ending}" for ending, _ in CLASSES.values())
    raise UserError(f"{source}: got architectures {names}; allowed: {allowed}")


def load_model(
    source: str,
    kind: Kind,
    allow_pickle: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    device_map: str | None = None,
) -> nn.Module:
    """A pretrained model in float32 and evaluation mode.

    Args:
        source: a folder with config.json and safetensors, or a hub id where there is network.
        kind: what it is for.
        allow_pickle: read weight files that are pickles, too; they can run code.
        num_classes: replace a head of another size by a fresh one; by default the folder's own head is required.
        seed: of a fresh head.
        device_map: of accelerate, for a model that fits on no single device: see `read_device_map`.

    Raises:
        UserError: no such model, no network, weights that are no safetensors, or a head that is missing.
    """
    options: dict[str, Any] = {**OPTIONS, "dtype": torch.float32, "use_safetensors": None if allow_pickle else True}
    if num_classes is not None:
        options |= {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    if device_map is not None:
        options |= read_device_map(device_map)
    loader = getattr(transformers(), CLASSES[kind][1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _load(source, loader, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing and num_classes is None:
        raise UserError(
            f"{source}: its weights lack {missing[0]}{' and more' if len(missing) > 1 else ''}; give a model that was "
            f"trained for {kind.replace('_', ' ')}"
        )
    return model.eval()  # type: ignore[no-any-return]


def read_device_map(text: str) -> dict[str, Any]:
    """What `from_pretrained` takes for it: a word of accelerate's, or a JSON file of module paths and devices.

    Parts on `disk` are read from the model's own safetensors when they are needed.

    Raises:
        UserError: neither.
    """
    if text in DEVICE_MAPS:
        return {"device_map": text}
    if Path(text).suffix != ".json":
        raise UserError(f"teacher_device_map: got {text!r}; allowed: {', '.join(DEVICE_MAPS)}, or a .json file")
    return {"device_map": read_json(Path(text), "a map from module paths to devices")}


def state_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """`model.state_dict()`, with the parts that a device map has put on a disk."""
    own = model.state_dict()
    if not any(parameter.is_meta for parameter in model.parameters()):
        return own
    modeling: Any = importlib.import_module("accelerate.utils.modeling")
    state: Mapping[str, torch.Tensor] = modeling.get_state_dict_offloaded_model(model)
    return {name: state[name] for name in own}


def new_model(config: Any, kind: Kind, seed: int) -> nn.Module:
    """A model of `config` with fresh weights drawn from `seed`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        loader = getattr(transformers(), CLASSES[kind][1])
        return loader.from_config(config, **OPTIONS).eval()  # type: ignore[no-any-return]


def load_processor(source: str, kind: Kind) -> Any:
    """The tokenizer, or the image processor, that stands beside a model.

    Raises:
        UserError: there is none.
    """
    name = "AutoImageProcessor" if kind == "image_classification" else "AutoTokenizer"
    return _load(source, getattr(transformers(), name), trust_remote_code=False)


def _load(source: str, loader: Any, **options: Any) -> Any:
    """`loader.from_pretrained`, whose many exceptions become one line."""
    path = Path(source)
    is_local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_local and not path.exists():
        raise UserError(f"{source}: no such folder; give a folder with config.json, or a hub id such as OWNER/NAME")
    try:
        with quiet():
            return loader.from_pretrained(source, **options)
    except MemoryError:
        raise
    except Exception as error:  # whatever its parsers raise, the folder is at fault
        reason = " ".join(str(error).split())[:160]
        if is_local:
            hint = "; weights must be safetensors" if options.get("use_safetensors") else ""
            raise UserError(f"{source}: {loader.__name__} cannot load it ({reason}){hint}") from error
        raise UserError(
            f"{source}: no such local folder, and the hub did not give it ({reason}); where there is no network, give "
            "a folder downloaded elsewhere with `hf download ID --local-dir FOLDER`"
        ) from error


def kept_layers(num_layers: int, cut: StudentCut) -> list[int]:
    """Teacher blocks (from 0) that the student begins with: for 2 of 6 `spread` gives 0 and 5, `first` 0 and 1."""
    count = cut.layers or max(1, num_layers // 2)
    if count > num_layers:
        raise UserError(f"cut.layers: got {count}; allowed: 1 to {num_layers}, the teacher's")
    if cut.keep == "first":
        return list(range(count))
    return [round(i * (num_layers - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]


def student_from_teacher(teacher: nn.Module, kind: Kind, cut: StudentCut) -> tuple[nn.Module, list[int]]:
    """A smaller copy: some of the teacher's blocks, narrower if asked for, embeddings and head copied.

    Where the width is cut, every tensor is the leading part of the teacher's: a start better than random weights,
    not a working model.

    Returns:
        The student in evaluation mode, and the teacher block (from 0) that each of its blocks was copied from.

    Raises:
        UserError: an impossible cut.
    """
    cut.check()
    blocks = block_paths(teacher)
    chosen = kept_layers(len(blocks), cut)
    config = _smaller_config(teacher.config, chosen, len(blocks), cut.width)
    student = new_model(config, kind, seed=0)
    prefix = blocks[0].rpartition(".")[0]
    source = state_of(teacher)
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            theirs = source[_teacher_name(name, prefix, chosen)]
            part = tuple(slice(size) for size in tensor.shape)
            tensor.copy_(theirs[part])
    return student, chosen


def _teacher_name(name: str, prefix: str, chosen: Sequence[int]) -> str:
    if not name.startswith(prefix + "."):
        return name
    number, _, rest = name[len(prefix) + 1 :].partition(".")
    return f"{prefix}.{chosen[int(number)]}.{rest}"


def _smaller_config(config: Any, chosen: Sequence[int], num_layers: int, width: float) -> Any:
    """`config` with fewer blocks and, for width below 1, fewer heads, hidden units and a smaller hidden size."""
    smaller = copy.deepcopy(config)
    for name, value in config.to_dict().items():  # a list with one entry a block: the kept blocks' entries
        if isinstance(value, list) and len(value) == num_layers and len(chosen) < num_layers and name != "depths":
            setattr(smaller, name, [value[i] for i in chosen])
    if getattr(config, "num_hidden_layers", None) != num_layers:
        if len(chosen) == num_layers and width == 1.0:
            return smaller
        raise UserError(
            f"cut: a model of type {config.model_type} cannot be cut into layers; give its config with --student"
        )
    smaller.num_hidden_layers = len(chosen)
    if width < 1.0:
        _narrow(smaller, config, width)
    return smaller


def _narrow(smaller: Any, config: Any, width: float) -> None:
    """Heads keep their dimension, so that a head of the student is a head of the teacher."""
    head = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    num_heads = max(shared, round(config.num_attention_heads * width / shared) * shared)
    smaller.num_attention_heads, smaller.hidden_size = num_heads, num_heads * head
    if hasattr(config, "num_key_value_heads"):
        smaller.num_key_value_heads = num_heads // shared
    for name in HIDDEN_UNITS:
        if isinstance(getattr(config, name, None), int):
            setattr(smaller, name, max(1, round(getattr(config, name) * width)))


def vocabulary_differences(teacher: Any, student: Any) -> str | None:
    """What first differs between two tokenizers, in words; None where they give the same ids for the same text."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        return f"{len(theirs)} against {len(ours)} tokens, first at {_first_difference(theirs, ours)}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(teacher, name, None) != getattr(student, name, None):
            return f"{name} {getattr(teacher, name, None)} against {getattr(student, name, None)}"
    sides = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (teacher, student)]
    if all(side is not None for side in sides):
        rules = [json.loads(side.to_str()) for side in sides if side is not None]
        for part in ("normalizer", "pre_tokenizer", "model", "post_processor"):
            if rules[0][part] != rules[1][part]:
                return f"their {part.replace('_', '-')}s"
    return None


def _first_difference(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    token = min(set(theirs.items()) ^ set(ours.items()), key=lambda pair: (pair[1], pair[0]))[0]
    return f"{token!r} ({theirs.get(token, 'no id')} against {ours.get(token, 'no id')})"


def check_same_tokenizer(teacher: Any, student: Any) -> None:
    """Token-level distillation compares distributions over one vocabulary.

    Raises:
        UserError: the tokenizers differ; names what differs first.
    """
    difference = vocabulary_differences(teacher, student)
    if difference is not None:
        raise UserError(
            f"tokenizers: teacher and student differ in {difference}; token-level distillation needs one tokenizer: "
            "give the student the teacher's"
        )
