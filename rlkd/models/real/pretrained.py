"""Models of transformers: loaded from a local folder or the hub, and students made from a teacher's layers.

No code of a model's own is run (`trust_remote_code` stays off) and only safetensors are read unless told otherwise:
other weight files are pickles. Attention is the eager implementation, which alone gives attention weights.
"""

import functools
import importlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlkd.errors import UserError
from rlkd.io.files import read_json

logger = logging.getLogger(__name__)

Kind = Literal["sequence_classification", "image_classification", "causal_lm", "module"]  # module: a user's own class
AUTO_CLASSES: dict[Kind, str] = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "causal_lm": "AutoModelForCausalLM",
}
HIDDEN_UNITS = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")  # what configs call them
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
OPTIONS: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": "eager"}


def transformers() -> Any:
    """Import the package transformers.

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
    """Load the configuration in a folder, in a JSON file, or of a hub id.

    Raises:
        UserError: there is none, or it cannot be had without network.
    """
    folder = Path(source)
    if source.strip() and folder.is_dir() and not (folder / "config.json").exists():
        inside = next((folder / n for n in ("model", "student/model") if (folder / n / "config.json").exists()), None)
        hint = f"; did you mean {inside}?" if inside else ""
        raise UserError(f"{source}: holds no config.json; allowed: the folder of a transformers model{hint}")
    return _load(source, transformers().AutoConfig, trust_remote_code=False)


@functools.cache
def class_names(kind: Kind) -> frozenset[str]:
    """Return the names of the classes of transformers for `kind`."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    table: Mapping[str, str | tuple[str, ...]] = getattr(auto, f"MODEL_FOR_{kind.upper()}_MAPPING_NAMES")
    return frozenset(n for names in table.values() for n in ((names,) if isinstance(names, str) else names))


def kind_of(config: Any, source: str) -> Kind:
    """Return the kind of a model, from the architecture that its configuration names.

    Raises:
        UserError: none of the three kinds.
    """
    names = list(config.architectures or [])
    for kind in AUTO_CLASSES:
        if class_names(kind) & set(names):
            return kind
    raise UserError(
        f"{source}: got architectures {names}; allowed: a classifier of texts or images, or a causal language model, "
        "such as ...ForSequenceClassification, ...ForImageClassification, ...ForCausalLM"
    )


def _class_of(config: Any, kind: Kind) -> Any:
    """Return the class that the configuration names, where it is one for `kind`, else transformers' choice.

    Raises:
        UserError: transformers has none.
    """
    named = sorted(class_names(kind) & set(config.architectures or ()))
    if named:
        return getattr(transformers(), named[0])
    try:
        found = getattr(transformers(), AUTO_CLASSES[kind])._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(
            f"got a model of type {config.model_type}; allowed: one for {kind.replace('_', ' ')}, as the teacher is"
        ) from error
    return found[0] if isinstance(found, tuple | list) else found


def load_model(
    source: str,
    kind: Kind,
    allow_pickle: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    device_map: str | None = None,
) -> nn.Module:
    """Load a pretrained model in float32 and evaluation mode.

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
    loader = _class_of(load_config(source), kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _load(source, loader, output_loading_info=True, **options)
        prefix = _shared_prefix(model, info)
        if prefix:
            torch.manual_seed(seed)
            options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
            model, info = _load(source, loader, output_loading_info=True, **options)
    missing = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
    if num_classes is not None:
        missing = [name for name in missing if not _is_of_head(model, name)]
    if missing:
        raise UserError(
            f"{source}: its weights lack {missing[0]}{' and more' if len(missing) > 1 else ''}, or have it in another "
            f"size; give a model that was trained for {kind.replace('_', ' ')}"
        )
    return whole_depth(model.eval())


def _shared_prefix(model: Any, info: Mapping[str, Any]) -> str:
    """Return the prefix of the names in a file of weights, such as `module.`, or "" where the names fit as they are."""
    strangers, missing = set(info["unexpected_keys"]), set(info["missing_keys"])
    base = f"{model.base_model_prefix}."
    wanted = missing | {name.removeprefix(base) for name in missing}
    best, most = "", 0
    for name in sorted(strangers)[:1] + sorted(strangers)[-1:]:
        parts = name.split(".")
        for i in range(1, len(parts)):
            prefix = ".".join(parts[:i]) + "."
            hits = sum(s.startswith(prefix) and s.removeprefix(prefix) in wanted for s in strangers)
            if hits > most:
                best, most = prefix, hits
    return best


def _is_of_head(model: Any, name: str) -> bool:
    """Whether a parameter may be fresh in a student: it lies outside the part that the family's models share, or is
    its pooler."""
    if not hasattr(model, model.base_model_prefix):
        return False
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def read_device_map(text: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a word of accelerate's, or a JSON file of module paths and devices.

    Parts on `disk` are read from the model's own safetensors when they are needed.

    Raises:
        UserError: neither.
    """
    if text in DEVICE_MAPS:
        return {"device_map": text}
    if Path(text).suffix != ".json":
        raise UserError(f"teacher_device_map: got {text!r}; allowed: {', '.join(DEVICE_MAPS)}, or a .json file")
    return {"device_map": read_json(Path(text), "a map from module paths to devices")}


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first part that is not on a disk."""
    held = (p.device for p in model.parameters() if not p.is_meta)
    return next(held, torch.device("cpu"))


def state_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """`model.state_dict()`, with the parts that a device map has put on a disk."""
    own = model.state_dict()
    if not any(parameter.is_meta for parameter in model.parameters()):
        return own
    modeling: Any = importlib.import_module("accelerate.utils.modeling")
    state: Mapping[str, torch.Tensor] = modeling.get_state_dict_offloaded_model(model)
    return {name: state[name] for name in own}


def new_model(config: Any, kind: Kind, seed: int) -> nn.Module:
    """Return a model of `config` with fresh weights drawn from `seed`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = _class_of(config, kind)._from_config(config, attn_implementation=OPTIONS["attn_implementation"])
        return whole_depth(model.eval())


def on_meta(config: Any, kind: Kind) -> nn.Module | None:
    """Return the model of a configuration without its weights, or None where it cannot be built."""
    try:
        written = type(config).from_dict(config.to_dict())  # as the student's folder will have it
        with torch.device("meta"):
            return new_model(written, kind, seed=0)
    except Exception:  # whatever its parts raise, the configuration is no model's
        return None


def whole_depth(model: nn.Module) -> nn.Module:
    """Switch off layers that are left out at random in training: hooks wait for every block."""
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            setattr(module, "layerdrop", 0.0)  # noqa: B010, no attribute of every module
    return model


def load_processor(source: str, kind: Kind) -> Any:
    """Load the tokenizer, or the image processor, from a model's folder.

    A tokenizer without a padding token pads with its end token, which a warning reports.

    Raises:
        UserError: there is none, or a tokenizer that can pad with nothing.
    """
    name = "AutoImageProcessor" if kind == "image_classification" else "AutoTokenizer"
    processor = _load(source, getattr(transformers(), name), trust_remote_code=False)
    if kind != "image_classification" and processor.pad_token_id is None:
        if processor.eos_token is None:
            raise UserError(f"{source}: its tokenizer has neither a padding nor an end token; set its pad_token")
        processor.pad_token = processor.eos_token
        logger.warning(f"{source}: its tokenizer has no padding token; it pads with {processor.eos_token}")
    return processor


def share_padding(model: nn.Module, processor: Any) -> None:
    """Tell a model without a padding token the tokenizer's: a classifier of a decoder looks for the last real token."""
    described: Any = model.config
    if hasattr(described, "pad_token_id") and described.pad_token_id is None and hasattr(processor, "pad_token_id"):
        described.pad_token_id = processor.pad_token_id


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn whatever a model's own code raises inside the block into one line that begins with `what`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers has hundreds of models, each with errors of its own
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{what} ({type(error).__name__}{': ' if reason else ''}{reason})") from error


def _load(source: str, loader: Any, **options: Any) -> Any:
    """`loader.from_pretrained`, whose many exceptions become one line."""
    if not source.strip():
        raise UserError("model: got no name; allowed: a folder with config.json, or a hub id such as OWNER/NAME")
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


def vocabulary_differences(teacher: Any, student: Any) -> str | None:
    """Describe the first difference between two tokenizers; None where they give the same ids for the same text."""
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
