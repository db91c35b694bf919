"""Signals of a teacher whose answers are stored: of a language model, or of a classifier; it has no hidden features."""

import logging
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data.anchors import Anchors
from rlkd.data.examples import PADDING_MASK, Examples, TokenExamples
from rlkd.errors import UserError
from rlkd.losses.tokens import TopK, masked_mean
from rlkd.teachers.real.shards import Answers, Description, data_digest, mapped_answers
from rlkd.teachers.real.token_signals import TokenSignals
from rlkd.teachers.signals import Signals

logger = logging.getLogger(__name__)

AT_ONCE = 256  # samples
LEAST = 1e-10  # probability of all tokens that are not stored, where rounding leaves none


def check_belongs(folder: Path, found: Description, data: Examples, kind: str, names_sha256: str) -> None:
    """Refuse answers to other samples, of another vocabulary, or of another kind of model.

    Raises:
        UserError: names what differs.
    """
    length = data.inputs[PADDING_MASK].shape[1] if kind == "causal_lm" else 1
    expected = {
        "kind": kind,
        "vocabulary": data.num_classes,
        "names_sha256": names_sha256,
        "num_samples": len(data.labels),
        "length": length,
        "data_sha256": data_digest(data),
    }
    words = {
        "kind": "the kind of model differs",
        "vocabulary": "the size of the vocabulary differs",
        "names_sha256": "the tokenizer's vocabulary or the names of the classes differ",
        "num_samples": "the number of samples differs",
        "length": "the length of the texts differs",
        "data_sha256": "the samples or their order differ",
    }
    for name, value in expected.items():
        if getattr(found, name) != value:
            raise UserError(
                f"{folder}: {words[name]}: {getattr(found, name)!s:.16} stored, {value!s:.16} here; use the --data, "
                "--columns and --teacher that it was written with"
            )


def rest_of_answers(log_probs: Tensor) -> Tensor:
    """Return the log-probability of all other tokens, [..., L], for log-probabilities [..., L, k]."""
    return (1 - log_probs.exp().sum(-1)).clamp_min(LEAST).log()


def token_signals_of(answers: Answers, described: Description, data: TokenExamples, anchors: Anchors) -> TokenSignals:
    """Return the signals of a language model.

    Where a next token's log-probability is not stored and it is not among the k, the others' probability is spread
    evenly over them; a line says for how many tokens. The entropy is taken so, too.
    """
    size, length = data.inputs["input_ids"].shape
    rest, losses = torch.empty(size, length), torch.empty(size, length - 1)
    hits, entropy = torch.empty(size, length - 1), torch.empty(size, length - 1)
    num_spread = 0
    for rows in torch.split(torch.arange(size), AT_ONCE):  # the answers are mapped, and may be larger than memory
        part = Answers(*(tensor[rows] for tensor in answers))
        target = data.inputs["input_ids"][rows, 1:]
        rest[rows] = rest_of_answers(part.log_probs)
        losses[rows], entropy[rows], is_spread = _figures(part, rest[rows], target, described)
        hits[rows] = (part.ids[:, :-1, 0] == target).float()
        num_spread += int(is_spread[data.counted[rows]].sum())
    if num_spread:
        logger.warning(
            f"the teacher's answers have no probability for {num_spread} of {int(data.counted.sum())} next tokens; its "
            "perplexity is an estimate"
        )
    validation, train = data.splits["validation"], data.splits["train"]
    nats = masked_mean(losses[validation], data.counted[validation])
    mean = masked_mean(entropy[train], data.counted[train])
    return TokenSignals(
        logits=torch.zeros(1, size, 0),
        features=torch.zeros(1, size, 0),
        maps=torch.zeros(1, size, 0),
        accuracy=anchors.quality(nats)[None],
        entropy=(mean / math.log(described.vocabulary))[None],
        are_conv=False,
        tokens=TopK(answers.log_probs, answers.ids, rest),
        losses=losses,
        hits=hits,
        counted=data.counted,
        anchors=anchors,
    )


def _figures(part: Answers, rest: Tensor, target: Tensor, described: Description) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy and entropy of every next token, and whether the former is spread evenly; [n, L - 1] each.

    Args:
        part: answers to n samples.
        rest: [n, L], of `rest_of_answers`.
        target: [n, L - 1] int64, the next tokens.
        described: gives vocabulary and k.
    """
    log_probs, others = part.log_probs[:, :-1], rest[:, :-1]  # [n, L - 1, k], [n, L - 1]
    num_others = described.vocabulary - described.k
    is_target = part.ids[:, :-1] == target[..., None]  # [n, L - 1, k]
    among = torch.where(is_target, log_probs, 0.0).sum(-1)
    is_spread = part.targets.isnan() & ~is_target.any(-1)
    spread = others - math.log(max(1, num_others))
    found = torch.where(is_target.any(-1), among, torch.where(is_spread, spread, part.targets))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return -found, entropy - others.exp() * spread if num_others else entropy, is_spread


def class_signals_of(answers: Answers, described: Description, data: Examples) -> Signals:
    """Return the signals of a classifier; classes that are not stored share the rest evenly."""
    log_probs, ids = answers.log_probs[:, 0], answers.ids[:, 0]  # [S, k]
    others = max(1, described.vocabulary - described.k)
    spread = rest_of_answers(log_probs)[:, None] - math.log(others)  # [S, 1]
    logits = spread.expand(-1, described.vocabulary).scatter(1, ids, log_probs)  # [S, C]
    size, validation, train = len(data.labels), data.splits["validation"], data.splits["train"]
    accuracy = (logits[validation].argmax(-1) == data.labels[validation]).float().mean()
    log_p = F.log_softmax(logits[train], -1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean() / math.log(data.num_classes)
    empty = torch.zeros(1, size, 0)
    return Signals(logits[None], empty, empty, accuracy[None], entropy[None], False)


def stored_signals(folder: Path, data: Examples, kind: str, names_sha256: str, anchors: Anchors | None) -> Signals:
    """Return the signals of the answers in a folder.

    Args:
        folder: of `rlkd signals`.
        data: the samples as the teacher takes them.
        kind: of the teacher.
        names_sha256: of `names_digest`.
        anchors: of a language model's perplexity.

    Raises:
        UserError: answers that are damaged or belong to something else.
    """
    described, answers = mapped_answers(folder)
    check_belongs(folder, described, data, kind, names_sha256)
    if isinstance(data, TokenExamples):
        assert anchors is not None
        return token_signals_of(answers, described, data, anchors)
    return class_signals_of(answers, described, data)
