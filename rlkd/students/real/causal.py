"""A causal language model as the student: every counted token is a sample.

It differs from other real students in three ways. Hard label and response are token-level losses on the teacher's top-k
next tokens (`rlkd.losses.tokens`), or on its whole vocabulary, with the teacher beside the student in memory
(`rlkd.losses.chunked`). Accuracy is the quality (`Anchors`) of the cross entropy of the next token, each
predicted at the exit where it leaves, and so is every exit's. Evaluation adds up batch by batch: logits of a whole
split over a vocabulary would not fit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.compression.selection import exits_taken, spread
from rlkd.data import Split
from rlkd.data.anchors import Anchors
from rlkd.data.examples import TokenExamples, to_device
from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.io.memory import enough_memory
from rlkd.losses import FAMILIES, LossConfig
from rlkd.losses.chunked import Divergence, chunked_losses
from rlkd.losses.tokens import TopK, token_cross_entropy, token_response_top_k
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.pretrained import device_of
from rlkd.models.real.sharding import is_sharded, release
from rlkd.students.interface import Metrics
from rlkd.students.real.headless import check_head, headless, hidden_head
from rlkd.students.real.module import EVALUATE_LESS, PUBLISHED_RATE, ModuleStudent
from rlkd.students.real.train_config import ModuleTrainConfig, confirming_samples
from rlkd.teachers.real.token_signals import TokenSignals


@dataclass(frozen=True)
class TokenConfig:
    """Token-level distillation of language models."""

    top_k: int = 32
    """The teacher's likeliest next tokens that are kept a position; all others together are one more outcome."""
    divergence: Divergence = "forward"
    """forward: KL(teacher || student), covers all that the teacher may say; reverse: KL(student || teacher), stays
    where the teacher is; js: Jensen-Shannon, with teacher_in_memory."""
    teacher_in_memory: bool = False
    """The response term compares whole vocabularies with the teacher, which stays beside the student in training;
    logits exist one block of the vocabulary at a time. Evaluation reads the cached top_k as before."""
    worst_perplexity: float | None = None
    """Perplexity that counts as accuracy 0 in the score; by default the vocabulary's size, a guess."""
    best_perplexity: float = 1.0
    """Perplexity that counts as accuracy 1."""

    def check(self) -> None:
        """Raise UserError for an empty cache or anchors that are not a range."""
        if self.top_k < 1:
            raise UserError(f"tokens.top_k: got {self.top_k}; allowed: at least 1")
        if not self.best_perplexity >= 1.0:
            raise UserError(f"tokens.best_perplexity: got {self.best_perplexity:g}; allowed: at least 1")
        if self.divergence == "js" and not self.teacher_in_memory:
            raise UserError(
                "tokens.divergence: got js with cached answers; allowed: forward, reverse, or js with "
                "--tokens.teacher_in_memory true"
            )
        if self.worst_perplexity is not None and not self.worst_perplexity > self.best_perplexity:
            raise UserError(
                f"tokens.worst_perplexity: got {self.worst_perplexity:g}; allowed: above best_perplexity, "
                f"{self.best_perplexity:g}"
            )

    def anchors(self, vocabulary: int) -> Anchors:
        """For a vocabulary of that size.

        Raises:
            UserError: the best perplexity is not below the worst.
        """
        worst = float(vocabulary) if self.worst_perplexity is None else self.worst_perplexity
        if not self.best_perplexity < worst:
            raise UserError(f"tokens.best_perplexity: got {self.best_perplexity:g}; allowed: below {worst:g}")
        return Anchors(worst, self.best_perplexity)


class TokenSums(NamedTuple):
    """Of one batch, summed over its counted tokens."""

    num_tokens: Tensor  # scalar
    nats: Tensor  # scalar, cross entropy at the exit taken
    agreed: Tensor  # scalar, answers at the exit taken that are the teacher's
    divergence: Tensor  # scalar, KL from teacher to the last exit, over its k + 1 outcomes
    exit_nats: Tensor  # [E]
    left: Tensor  # [E], tokens that left there


@torch.no_grad()
def token_sums(
    logits: tuple[Tensor, ...],
    tokens: Tensor,
    counted: Tensor,
    *,
    teacher: TopK,
    exit_threshold: Tensor,
    patience: int = 0,
) -> TokenSums:
    """How the counted tokens of one batch were predicted.

    Args:
        logits: one [B, L, V] an exit.
        tokens: [B, L] int64.
        counted: [B, L - 1] bool.
        teacher: of the same [B, L].
        exit_threshold: [1], of confidence; at 1/V or less all tokens leave at the first exit, at 1 or more none.
        patience: as in `summarise`.
    """
    vocabulary = logits[0].shape[-1]
    target = tokens[:, 1:][counted]  # [M]
    nats, confidence, answer = [], [], []
    for z in logits:
        chosen = z[:, :-1][counted]  # [M, V]
        total = chosen.logsumexp(-1)  # [M]
        best = chosen.max(-1)
        nats.append(total - chosen.gather(-1, target[:, None])[:, 0])
        confidence.append((best.values - total).exp())
        answer.append(best.indices)
    each = torch.stack(nats)  # [E, M]
    answers = torch.stack(answer)  # [E, M]
    left_at = exits_taken(torch.stack(confidence)[None], answers[None], exit_threshold, vocabulary, patience)[0]
    theirs = teacher.indices[:, :-1, 0][counted]  # [M], the likeliest: `top_k` sorts
    count = counted.sum()
    return TokenSums(
        count,
        each[left_at].sum(),
        (left_at & (answers == theirs)).sum(),
        token_response_top_k(logits[-1], teacher, counted, temperature=1.0) * count,
        each.sum(-1),
        left_at.sum(-1),
    )


class CausalStudent(ModuleStudent):
    """Implements `Students` for one causal language model.

    Args:
        student: as in `ModuleStudent`.
        data: texts.
        signals: of one teacher with the same tokenizer.
        config: checked here.
        num_windows: as in `ModuleStudent`.
        divergence: of the response term.
        loss: terms of the objective; hard label and response have those of tokens alone.
        teacher: of the same tokens and vocabulary; the response term compares whole vocabularies with it.
        start_rate: as in `ModuleStudent`.

    Raises:
        UserError: another hard-label or response term; a model whose logits are not its output layer's.
    """

    def __init__(
        self,
        student: Instrumented,
        data: TokenExamples,
        signals: TokenSignals,
        config: ModuleTrainConfig,
        num_windows: int,
        divergence: Divergence = "forward",
        loss: LossConfig | None = None,
        *,
        teacher: nn.Module | None = None,
        channel_multiple: int = 1,
        start_rate: float = PUBLISHED_RATE,
    ) -> None:
        super().__init__(
            student,
            data,
            signals,
            config,
            num_windows,
            loss,
            channel_multiple=channel_multiple,
            start_rate=start_rate,
        )
        by_token = [term.name for family in FAMILIES[:2] for term in self._objective.terms[family]]
        if by_token != ["cross_entropy", "kl"]:
            raise UserError(
                f"loss.terms: got {', '.join(by_token)} for a language model; allowed: cross_entropy and kl, which are "
                "computed for each token, with terms of features or attention"
            )
        self._texts, self._teacher, self._divergence = data, signals, divergence
        self._beside = teacher if teacher is None or is_sharded(teacher) else teacher.to(self._device)
        if self._beside is not None:
            few = data.batch(data.few())
            check_head(self._beside.eval(), to_device(few, self._device), "the teacher")
            check_head(student.model, to_device(few, device_of(student.model)), "the student")

    def _draw(self, generator: torch.Generator) -> None:
        """As of any real student; the exits' norms begin at one."""
        super()._draw(generator)
        for head in self._whole.heads:
            head.reset_parameters()  # type: ignore[operator]

    def _shares(self, part: Tensor, positions: Tensor) -> Tensor:
        """Token losses are means over counted tokens, the others over texts."""
        shares = super()._shares(part, positions)
        counts = self._texts.counted.sum(1)[self._task.samples]  # [num samples]
        shares[:2] = counts[part].sum() / counts[positions].sum()
        return shares

    def _losses(self, positions: Tensor, temperature: Tensor) -> Tensor:
        samples = self._task.samples[positions]  # [B]
        if self._beside is not None:
            return self._whole_losses(self._beside, samples, temperature)
        device = self._device
        outputs = self._forward(samples)
        logits = tuple(z.float() for z in outputs.logits)  # [B, L, V] each
        length = logits[0].shape[1]
        tokens = self._texts.inputs["input_ids"][samples, :length].to(device)
        counted = self._texts.counted_of(samples, length).to(device)
        teacher = TopK(*(values.to(device) for values in self._teacher.top(samples, length)))
        zero = logits[0].new_zeros(())
        hard = sum((token_cross_entropy(z, tokens, counted) for z in logits), start=zero) / len(logits)
        is_reverse = self._divergence == "reverse"
        soft = (token_response_top_k(z, teacher, counted, temperature=temperature, reverse=is_reverse) for z in logits)
        ready = {"hard_label": hard, "response": sum(soft, start=zero) / len(logits)}
        return self._objective({"exit_logits": logits, **self._hidden(samples, outputs)}, self.student.terms, ready)

    def _whole_losses(self, teacher: nn.Module, samples: Tensor, temperature: Tensor) -> Tensor:
        """[4], of the texts `samples` [B], with hidden states in the place of logits."""
        device = self._device
        with headless(self.student.model):
            outputs = self._forward(samples)
        inputs = to_device(self._data.batch(samples), device)
        length = inputs["input_ids"].shape[1]
        counted = self._texts.counted_of(samples, length).to(device)
        answering, answered = F.pad(counted, (0, 1)), F.pad(counted, (1, 0))  # [B, L] each
        has_tokens = bool(counted.any())
        if not has_tokens:  # one stands for them, times zero: every process needs a gradient of every tensor
            answering[0, 0] = answered[0, 0] = True
        is_half = self._config.precision == "bfloat16"
        with torch.no_grad(), headless(teacher), torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_half):
            theirs = logits_of(forward(teacher, inputs))[answering]  # [M, E]
        targets = inputs["input_ids"][answered]  # [M]
        zero = outputs.logits[-1].new_zeros((), dtype=torch.float32)
        hard, soft = zero, zero
        for hidden in outputs.logits:  # [B, L, D] each
            student = hidden_head(self.student.model, hidden[answering])
            losses = chunked_losses(
                student, hidden_head(teacher, theirs), targets, temperature=temperature, kind=self._divergence
            )
            hard, soft = hard + losses[0] / len(outputs.logits), soft + losses[1] / len(outputs.logits)
        given = {"exit_logits": outputs.logits, **self._hidden(samples, outputs)}
        ready = {"hard_label": hard * has_tokens, "response": soft * has_tokens}
        return self._objective(given, self.student.terms, ready)

    @torch.no_grad()
    def _metrics(self, index: Tensor) -> Metrics:
        """As of any real student, each counted token being a sample; accuracies are qualities of cross entropies."""
        count, nats, agreed, divergence, exit_nats, left = self._sums(index)
        quality, masks, scores = self._teacher.anchors.quality, self.masks(), self._scores()
        return Metrics(
            accuracy=quality(nats / count)[None].float(),
            exit_accuracy=quality(exit_nats / count)[None].float(),
            exit_loss=(exit_nats / count)[None].float(),
            exit_rates=(left / count)[None].float(),
            agreement=(agreed / count)[None].float(),
            divergence=(divergence / count)[None].float(),
            kept=torch.stack([mask.sum(-1) for mask in masks], dim=-1),
            spread=torch.stack([spread(scores[0][None]), spread(scores[1][None])], dim=-1),
        )

    def num_evaluated(self, split: Split) -> int:
        """How many counted tokens `evaluate` looks at."""
        return self._num_tokens(self._evaluated(split))

    def confirm(self) -> tuple[Metrics, int]:
        """As `Students.confirm`, on `confirm_size` texts; the number is of counted tokens."""
        index = confirming_samples(self._data.splits["validation"], self._config)
        return processes.agree(self._metrics(index), self._device), self._num_tokens(index)

    def _num_tokens(self, index: Tensor) -> int:
        return int(self._texts.counted[index].sum())

    def _exit_accuracy(self, index: Tensor) -> Tensor:
        """[1, E], quality of every exit's cross entropy on the texts at `index` [B]."""
        sums = self._sums(index)
        return self._teacher.anchors.quality(sums.exit_nats / sums.num_tokens)[None].float()

    def _sums(self, index: Tensor) -> TokenSums:
        """How the counted tokens of the texts at `index` [B] are predicted, in double precision on the CPU."""
        self.student.eval()
        size, parts = self._config.evaluation_batch_size, []
        with enough_memory(f"evaluating {size} samples at once", EVALUATE_LESS):
            for rows in torch.split(index[self._data.by_length(index)], size):
                logits = tuple(z.float() for z in self._forward(rows).logits)
                length = logits[0].shape[1]
                sums = token_sums(
                    logits,
                    self._texts.inputs["input_ids"][rows, :length].to(self._device),
                    self._texts.counted_of(rows, length).to(self._device),
                    teacher=TopK(*(values.to(self._device) for values in self._teacher.top(rows, length))),
                    exit_threshold=self._threshold.to(self._device),
                    patience=self.plan.patience,
                )
                parts.append([value.double().cpu() for value in sums])
        release(self.student)
        return TokenSums(*(torch.stack(column).sum(0) for column in zip(*parts, strict=True)))
