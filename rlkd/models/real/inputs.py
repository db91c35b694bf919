"""Make samples as a model takes them: its channels, its longest text, its padding, its vocabulary."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlkd.data.examples import PADDING_MASK, Examples
from rlkd.data.loading import load_examples
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import Table
from rlkd.errors import UserError
from rlkd.io.memory import enough_memory
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.pretrained import as_user_error, device_of

logger = logging.getLogger(__name__)
STEADY = 1e-5  # answers to a text alone and in a padded batch that are this near are the same, relative to the largest


def examples_for(
    model: nn.Module, described: Any, table: Table, processor: Any, columns: ColumnConfig, *, name: str
) -> tuple[Examples, ColumnConfig]:
    """Make the samples as `model` takes them: with its channels, no longer than its positions.

    Args:
        model: gets the samples.
        described: configuration of the model that names the classes.
        table: of `load_table`.
        processor: tokenizer or image processor, or None.
        columns: give the length that is wanted.
        name: of the model, for messages.

    Returns:
        The samples, and `columns` with the length that they were cut to.

    Raises:
        UserError: the model does not take them at any length.
    """
    own: Any = model.config
    channels = getattr(own, "num_channels", None)
    if table.kind == "image" and channels == 1:
        table = dataclasses.replace(table, samples=[image.convert("L") for image in table.samples])
    data = load_examples(table, processor, described, columns=columns, model=name)
    if "pixel_values" in data.inputs or (table.kind == "array" and channels is not None):
        return _with_channels(data, channels, name), columns
    if hasattr(processor, "all_special_ids"):
        _check_words(name, data, processor)

    def remake(shorter: ColumnConfig) -> Examples:
        return load_examples(table, processor, described, columns=shorter, model=name)

    return fit_texts(model, data, columns, remake, name=name)


def fit_texts(
    model: nn.Module,
    data: Examples,
    columns: ColumnConfig,
    remake: Callable[[ColumnConfig], Examples],
    *,
    name: str,
) -> tuple[Examples, ColumnConfig]:
    """Return texts of at most the length that `model` takes, padded as it needs; all else as it is.

    Args:
        model: gets the samples.
        data: its samples.
        columns: that `data` was made with.
        remake: makes the samples anew with other columns.
        name: of the model, for messages.

    Returns:
        The samples, and `columns` with the length that they were cut to.

    Raises:
        UserError: the model does not take them at any length.
    """
    if PADDING_MASK not in data.inputs:
        return data, columns
    check_vocabulary(name, model, data)
    most = most_tokens(model, data, name)
    if most < int(data.inputs["input_ids"].shape[1]):
        logger.warning(f"{name}: takes {most} tokens; longer texts are cut to that")
        columns = dataclasses.replace(columns, max_length=most)
        data = dataclasses.replace(remake(columns), fixed_length=data.fixed_length)
    if not data.fixed_length and depends_on_padding(model, data):
        length = int(data.inputs["input_ids"].shape[1])
        logger.warning(
            f"{name}: its answers depend on padding; every text is padded to {length} tokens, at inference, too"
        )
        data = dataclasses.replace(data, fixed_length=True)
    return data, columns


def _with_channels(data: Examples, channels: int | None, name: str) -> Examples:
    """Images [S, channels, H, W] of arrays [S, H, W], [S, C, H, W] or [S, H, W, C]; grey ones in every channel."""
    (values,) = data.inputs.values()
    if values.ndim == 3:
        values = values[:, None]
    if channels is None or values.ndim != 4:
        return data
    if values.shape[1] not in (1, channels) and values.shape[3] in (1, channels):
        logger.info(f"{data.name}: its arrays are read as [samples, height, width, channels]")
        values = values.movedim(3, 1)
    if values.shape[1] == 1 and channels > 1:
        logger.info(f"{data.name}: its grey images are put into all {channels} channels of {name}")
        values = values.expand(-1, channels, -1, -1)
    if values.shape[1] != channels:
        raise UserError(f"{data.name}: got images of {values.shape[1]} channels; allowed: {channels}, those of {name}")
    return dataclasses.replace(data, inputs={"pixel_values": values.contiguous()})


def _check_words(name: str, data: Examples, tokenizer: Any) -> None:
    """Warn of a tokenizer that knows less than half of the words: transformers makes one where its files are missing.

    Raises:
        UserError: it knows none.
    """
    ids = data.inputs["input_ids"][data.inputs[PADDING_MASK].bool()]  # [M]
    num_known = int((~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))).sum())
    num_unknown = 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
    if not num_known:
        raise UserError(
            f"{name}: no text of {data.name} keeps a token that its tokenizer knows (it has {len(tokenizer)}); its "
            "files (tokenizer.json, vocab.txt, ...) are missing or another model's, or --columns.max_length is too "
            "small"
        )
    if num_unknown > num_known:
        logger.warning(
            f"WARNING: the tokenizer of {name} does not know {num_unknown} of {num_unknown + num_known} tokens of "
            f"{data.name}: it may be another model's"
        )


def check_vocabulary(name: str, model: nn.Module, data: Examples) -> None:
    """Raise UserError for token ids beyond the model's vocabulary."""
    size, highest = getattr(model.config, "vocab_size", None), int(data.inputs["input_ids"].max())
    if isinstance(size, int) and highest >= size:
        raise UserError(f"{name}: its vocabulary has {size} tokens; the data have token {highest}")


@torch.no_grad()
def most_tokens(model: nn.Module, data: Examples, name: str) -> int:
    """Return the length of the longest text, or of the longest beginning of it that the model takes.

    Raises:
        UserError: it takes none, or fails for another reason than the length.
    """
    mask = data.inputs[PADDING_MASK]
    row = data.batch(mask.sum(1).argmax()[None])
    length = row[PADDING_MASK].shape[1]

    def refusal(count: int) -> Exception | None:
        """Return the error that says that a beginning of `count` tokens is too long; None where the model takes it."""
        shorter = {k: v[:, :count].to(device_of(model)) for k, v in row.items()}
        with (
            as_user_error(not_taken(model, data, name)),
            enough_memory(f"{name} on a text of {count} tokens", "lower --columns.max_length"),
        ):
            try:
                forward(model.eval(), shorter)
            except Exception as error:
                if not _is_too_long(error):
                    raise
                return error
        return None

    refused = refusal(length)
    if refused is None:
        return length
    fits, beyond = 0, length
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if refusal(middle) is None:
            fits = middle
        else:
            beyond = middle
    if fits < 2:
        with as_user_error(not_taken(model, data, name)):
            raise refused
    return fits


def _is_too_long(error: Exception) -> bool:
    """Whether an error of a forward pass says that the text has more tokens than the model has positions.

    A learned embedding of positions raises IndexError. A stored range of positions that the text is longer than raises
    RuntimeError, because sizes differ (BERT, DeBERTa) or an index is out of bounds (CamemBERT). A model that checks the
    length itself raises ValueError and names its maximum (CLIP).
    """
    words = str(error)
    if isinstance(error, RuntimeError):
        return "out of bounds" in words or ("size of" in words and "must match" in words)
    return isinstance(error, IndexError) or (isinstance(error, ValueError) and "max" in words.lower())


@torch.no_grad()
def depends_on_padding(model: nn.Module, data: Examples) -> bool:
    """Whether the model answers a text otherwise in a batch with longer ones, or takes it only in such a batch."""
    few = data.few()
    device = device_of(model)

    def answers(rows: Tensor) -> Tensor:
        return logits_of(forward(model.eval(), {k: v.to(device) for k, v in data.batch(rows).items()})).float().cpu()

    try:
        together = answers(few)  # [B, C] or [B, L, V]
    except Exception:  # what it does not take, the look for its blocks will say
        return False
    for place, row in enumerate(few.tolist()):
        try:
            (alone,) = answers(torch.tensor([row]))
        except Exception:  # too short for it
            return True
        batched = together[place][: len(alone)] if alone.ndim == 2 else together[place]
        if float((alone - batched).abs().max()) > STEADY * max(1.0, float(batched.abs().max())):
            return True
    return False


def not_taken(model: nn.Module, data: Examples, name: str) -> str:
    """Say that a model does not take the samples; what it raised follows in the message."""
    shapes = {key: list(values.shape[1:]) for key, values in data.inputs.items()}
    return f"{name}: {type(model).__name__} does not take inputs of shapes {shapes}"
